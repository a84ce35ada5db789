"""The models of the campaign as files: the user's real ones, or random ones of the true sizes.

Random files are written once, whole: testing/tiny_models.py writes names, shapes and vectors, and
the matrices are filled here. A file with holes would load faster than a real one. Memory and time
do not depend on the values; the scale keeps activations of order one, so that results can be
compared.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from pack.nodes.units import GIB

from .job import Job

Kind = Literal["whole", "short", "small"]
# Of the VAE's last layer: as it is, many pixels would be clamped, and equal for that alone.
LAST_LAYER, CONTRAST = "decoder.conv_out.weight", 0.5
_BLOCK = 2**24  # values that are drawn; a matrix repeats them
_NEEDED_BYTES = {"whole": 20 * GIB, "short": 5 * GIB, "small": GIB}
FOLDER = "diffusers/Z-Image-Turbo"


def prepare(job: Job, kind: Kind) -> Path:
    """A folder of models as `offer_models` takes it; writes it at the first call.

    Args:
        job: its real weights are the answer where it has some.
        kind: whole, all layers in single files; short, two main layers of the true widths in a
            sharded folder; small, narrow as for the tests, random always. In a rehearsal all are.

    Raises:
        OSError: the disk has too little room.
    """
    if job.models_dir is not None and kind != "small":
        return job.models_dir
    if job.is_rehearsal:
        kind = "small"
    target, part = job.work / "models" / kind, job.work / "models" / f"{kind}.part"
    if target.is_dir():
        return target
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    _check_space(part, _NEEDED_BYTES[kind])
    print(f"  writing random weights ({kind}), once", flush=True)
    os.environ.setdefault("ZIMAGE_HOST_DIR", str(job.host_dir))  # its tokenizer is copied
    from pack.testing import tiny_models

    if kind == "small":
        tiny_models.write_single_files(tiny_models.write_small_folder(part / FOLDER), part)
    elif kind == "whole":
        for path in tiny_models.write_real_width_files(part, layers=30).values():
            fill(path)
    else:
        folder = tiny_models.write_real_width_folder(part / FOLDER, layers=2, te_layers=3)
        for path in folder.rglob("*.safetensors"):
            fill(path)
    os.replace(part, target)  # last, so that a folder in this place is whole
    return target


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"{needed / GIB:.0f} GiB of disk are needed for the random weights, "
            f"{free / GIB:.0f} GiB are free: name another folder with --out"
        )


def fill(path: Path, *, seed: int = 0) -> None:
    """Fills every matrix of a safetensors file in bfloat16 with random values; vectors stay."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(_BLOCK, generator=generator)
    scaled: dict[float, memoryview] = {}
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        tensors: dict[str, Any] = json.loads(file.read(length))
        for name, about in tensors.items():
            if name == "__metadata__" or len(about["shape"]) < 2:
                continue
            if about["dtype"] != "BF16":
                raise ValueError(f"{path.name}: {name} must be BF16, got {about['dtype']}")
            is_table = name.endswith("embed_tokens.weight")
            scale = 1.0 if is_table else math.prod(about["shape"][1:]) ** -0.5
            scale *= CONTRAST if name == LAST_LAYER else 1.0
            if scale not in scaled:
                values = (drawn * scale).bfloat16().view(torch.uint8)
                scaled[scale] = memoryview(values.numpy())
            start, end = about["data_offsets"]
            file.seek(8 + length + start)
            left = end - start
            while left > 0:
                left -= file.write(scaled[scale][:left])
