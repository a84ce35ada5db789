"""The whole decode and encode in strips of rows, without tiles. Knows no host."""
