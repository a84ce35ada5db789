"""Pure functions on tensors. Knows no host."""
