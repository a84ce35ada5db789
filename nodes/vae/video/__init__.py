"""The exact decode and encode of a causal video VAE in strips of rows (Wan 2.1, Qwen-Image)."""
