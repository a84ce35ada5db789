"""What a VRAM Probe measures and how it is told, without the host.

Five words for the lifetimes in here and in nodes/host/probe:

| word | lasts |
|---|---|
| interval | from one reading of a peak counter to the next; one interval belongs to one reader |
| sampling | one call of the host's sampler on a model that went through a probe |
| prompt | one run of a workflow; all its probes share their counters |
| recorder | as long as one probe measures: an interval, or the samplings of a prompt |
| record | what a recorder saw up to one moment, as data that does not change |
"""
