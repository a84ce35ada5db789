"""Weights on disk: headers, shards, indexes, and which model a file holds. Knows no host."""
