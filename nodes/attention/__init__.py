"""Slices and budgets of any model's attention. Knows no host."""
