"""The exact decode and encode in strips of rows. Knows no host."""
