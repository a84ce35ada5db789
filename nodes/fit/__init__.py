"""The stages of a run, what fits, and the planner. Knows no host."""
