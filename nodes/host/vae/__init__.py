"""Puts strips into the host's VAE."""
