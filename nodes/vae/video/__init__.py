"""The exact decode and encode of a causal video VAE in strips of rows (Wan, Qwen-Image)."""
