"""Plans a budget: the stages of a run, what fits, and the planner. Knows no host."""
