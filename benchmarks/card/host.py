"""The host in the process of a leg: started as its own main.py starts it, models loaded by it."""

from __future__ import annotations

import gc
import importlib.metadata
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pack.runner.model_files import Models, offer_models

from . import files
from .job import Job
from .rows import Recorder

_PACKAGES = ("comfy-aimdo", "comfy-kitchen")


class Loaded(NamedTuple):
    """The host's ModelPatcher, CLIP and VAE."""

    model: Any
    clip: Any
    vae: Any


@dataclass
class Host:
    """A host in this process.

    device: where it computes.
    base_dir: what it writes lies below it.
    is_dynamic: whether it keeps weights in the pages of dynamic VRAM.
    """

    job: Job
    device: torch.device
    base_dir: Path
    is_dynamic: bool

    def models(self, kind: files.Kind) -> Models:
        """The names of the models for the loader nodes; the host finds them from now on."""
        import utils.extra_config

        if kind == "small" or self.job.is_rehearsal:
            from pack.testing import widen_detection

            widen_detection.install()  # this process then knows the small widths too
        found = offer_models(files.prepare(self.job, kind), self.base_dir)
        utils.extra_config.load_extra_path_config(str(found.paths_file))
        return found

    def load(self, kind: files.Kind, *, weight_dtype: str = "default") -> Loaded:
        """Loads a set of models with the pack's own loader node."""
        from pack.nodes.load_model import LoadZImageTurbo

        found = self.models(kind)
        with torch.inference_mode():
            loaded = LoadZImageTurbo.execute(*found[:3], weight_dtype=weight_dtype)
        return Loaded(*loaded.args)

    def settle(self) -> None:
        """What the host does between two nodes; torch's unused memory goes back to the card.

        Models stay where they are: clones of one model share its weights.
        """
        import comfy.model_management

        gc.collect()
        if self.is_dynamic:
            import comfy.model_prefetch
            import comfy_aimdo.model_vbar

            comfy.model_management.reset_cast_buffers()
            comfy.model_prefetch.cleanup_prefetch_queues()
            comfy_aimdo.model_vbar.vbars_reset_watermark_limits()
        comfy.model_management.soft_empty_cache()

    def unload(self) -> None:
        """Sends all models to RAM, and settles."""
        import comfy.model_management

        comfy.model_management.unload_all_models()
        self.settle()


def start(job: Job, rows: Recorder) -> Host:
    """Starts the host in this process, as its main.py does, and notes the facts for the rows.

    `PYTORCH_CUDA_ALLOC_CONF` is set already: the campaign does it, since torch reads it once.

    Raises:
        RuntimeError: dynamic VRAM is asked for and does not start.
    """
    # In front: the working directory has a `nodes` of its own.
    sys.path.insert(0, str(job.host_dir))
    from comfy.cli_args import args

    base_dir = job.work / "base"
    base_dir.mkdir(parents=True, exist_ok=True)
    args.base_directory, args.disable_api_nodes = str(base_dir), True
    # Its main.py sets it with the allocator: without it streamed weights share two buffers.
    args.cuda_malloc = job.leg.allocator == "cudaMallocAsync" and not job.is_rehearsal
    if job.is_rehearsal:
        args.cpu, args.use_pytorch_cross_attention = True, True
        torch.set_num_threads(1)
    is_dynamic = job.leg.mode == "dynamic" and not job.is_rehearsal
    if is_dynamic:
        _before_import(args)
    import comfy.model_management

    if is_dynamic:
        _after_import(args)
    import folder_paths  # noqa: F401 (before the pack's nodes, which read it)
    import utils.extra_config  # noqa: F401 (before `nodes`, which hides `utils` up to 0.24)

    import nodes  # noqa: F401 (before the freeze: it imports most of the host)

    # settle() then looks through what the leg makes, not through what it imported.
    gc.collect()
    gc.freeze()
    device = comfy.model_management.get_torch_device()
    rows.facts |= facts(job, device, is_dynamic=is_dynamic)
    return Host(job, device, base_dir, is_dynamic)


def _before_import(args: Any) -> None:
    import comfy_aimdo.control as control

    try:
        control.init(nvml_pressure=not args.disable_nvml_pressure)
    except TypeError:  # comfy-aimdo before 0.4.11
        control.init()
    control.set_log_error()  # its default prints every call


def _after_import(args: Any) -> None:
    import comfy.memory_management
    import comfy.model_management
    import comfy.model_patcher
    import comfy_aimdo.control as control

    devices = [device.index for device in comfy.model_management.get_all_torch_devices()]
    headroom = int(getattr(args, "vram_headroom", 0) * 2**30)
    try:
        is_started = control.init_devices([(index, headroom) for index in devices])
    except TypeError:  # comfy-aimdo 0.4.9
        is_started = control.init_devices(devices)
    if not is_started:
        raise RuntimeError("dynamic VRAM did not start: comfy-aimdo found no card that it can use")
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
    comfy.memory_management.aimdo_enabled = True


def facts(job: Job, device: torch.device, *, is_dynamic: bool) -> dict[str, Any]:
    """What a row must say for others to compare it: versions, card, allocator, attention."""
    import comfyui_version
    from comfy.ldm.modules import attention

    return {
        **torch_facts(device),
        "mode": "dynamic VRAM" if is_dynamic else "loading by estimate",
        "attention": attention.optimized_attention.__name__,
        "dtype": "float32" if job.is_rehearsal else "bfloat16",
        "comfyui": comfyui_version.__version__,
        **{name.replace("-", "_"): _version(name) for name in _PACKAGES},
    }


def torch_facts(device: torch.device) -> dict[str, Any]:
    """The part of the facts that needs no host."""
    found: dict[str, Any] = {
        "device": f"cpu {platform.machine()}", "card_bytes": None, "driver": None,
        "allocator": None, "torch": torch.__version__, "system": platform.system(),
    }  # fmt: skip
    if device.type == "cuda":
        from .driver import driver_version

        properties = torch.cuda.get_device_properties(device)
        found["device"], found["card_bytes"] = properties.name, properties.total_memory
        found["driver"] = driver_version()
        found["allocator"] = torch.cuda.get_allocator_backend()
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
