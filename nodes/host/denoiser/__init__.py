"""Puts the denoiser's pieces into the host's Z-Image."""
