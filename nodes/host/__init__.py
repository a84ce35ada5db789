"""The only room that knows the host (ComfyUI)."""
