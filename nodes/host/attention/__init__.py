"""Puts slicing between a model and its attention."""
