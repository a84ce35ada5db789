"""The Z-Image forward in pieces: sizes, cuts, bytes and arithmetic. Knows no host."""
