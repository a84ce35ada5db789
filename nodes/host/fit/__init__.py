"""Enforces a budget: asks for plans with the host's memory, and keeps a model within them."""
