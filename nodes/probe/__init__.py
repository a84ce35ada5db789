"""Peak counters, records and reports. Knows no host."""
