"""Watches the host's memory while a prompt runs."""
