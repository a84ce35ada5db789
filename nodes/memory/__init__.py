"""Bytes: shapes, plans, peaks and reports. Knows no host."""
