"""Z-Image Low VRAM: ComfyUI nodes that run Z-Image-Turbo with a lower memory peak."""

WEB_DIRECTORY = "./js"


async def comfy_entrypoint():
    """The host's entry point of a node pack; imports nothing of the host before it is called."""
    from .nodes.extension import ZImageLowVRAM

    return ZImageLowVRAM()
