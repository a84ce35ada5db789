"""Loads checked weights through the host's own loaders."""
