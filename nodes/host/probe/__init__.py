"""Measures the host's memory while a prompt runs, and shows it in the page."""
