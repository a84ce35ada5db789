"""The plan's figures against this card's, and the constants that would make the plan right here.

The text encode is measured here; denoiser and VAE are read from the rows of their parts, which come
before. A constant's rows: `value` is the median of what the samples ask for, `low` and `high` their
range, `today` what nodes/memory uses now. Nothing is changed by it.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from ..host import Host, start
from ..job import Job, Picture, picture
from ..rows import Recorder, Row, read
from ..sampling import TEXT_TOKENS, Meter
from ..variants import DENOISER, HOST

PROMPT = "a red fox asleep in the snow under a birch tree, early morning light"
REPEATS = (1, 16)  # of the prompt's text: a short one and a long one
LEAN_VAE = "Lean VAE "
CONSTANTS = "constants"


class Measured(NamedTuple):
    """The medians of a case's variant over its rounds; bytes are None without a card.

    cpu_step_s: seconds of the issuing thread per step; kernels: launched per step.
    """

    case: str
    variant: str
    peak_bytes: int | None
    workspace_bytes: int | None
    cpu_step_s: float | None
    kernels: float | None


def run(job: Job, rows: Recorder) -> None:
    host = start(job, rows)
    from pack.nodes.host import lean_patch
    from pack.nodes.host.budget import copy_bytes_per_s
    from pack.nodes.memory.need import DENOISER_RESERVED, SPARE_BYTES, VAE_RESERVED
    from pack.nodes.memory.shapes import Request, TransformerSizes
    from pack.nodes.memory.stages import published_models

    loaded = host.load("whole")
    encode_texts(host, rows, loaded.clip)
    sizes = TransformerSizes(**lean_patch.transformer_sizes(loaded.model))
    models = replace(published_models(), denoiser=sizes)
    dtype_bytes = lean_patch.activation_bytes(loaded.model)
    request = Request(1024, 1024, 1, TEXT_TOKENS, dtype_bytes, sizes)
    known = [row for row in read(job.rows_path) if row.get("rehearsal") == job.is_rehearsal]
    denoised, decoded = medians(known, "denoiser"), medians(known, "vae")
    reserved: list[float] = []
    for found in denoised:
        live = denoiser_bytes(found, models, request)
        if live is not None:
            compare(rows, f"{found.case} denoise", found, live)
            reserved += reserved_factor(found, live)
    vae_reserved: list[float] = []
    for found in decoded:
        live = vae_bytes(found, models, request)
        if live is not None:
            compare(rows, found.case, found, live)
            vae_reserved += reserved_factor(found, live, spare_bytes=SPARE_BYTES)

    speed = copy_bytes_per_s(host.device)
    write_constant(rows, "DENOISER_RESERVED", reserved, DENOISER_RESERVED)
    write_constant(rows, "VAE_RESERVED", vae_reserved, VAE_RESERVED)
    write_constant(rows, "seconds per launch", list(launch_seconds(denoised)), None)
    write_constant(rows, "copy bytes per second", [] if speed is None else [speed], None)


def encode_texts(host: Host, rows: Recorder, clip: Any) -> None:
    """Rows of one encoding of a short and of a long prompt by the host."""
    from pack.nodes.memory.text_encoder import text_encoder_peak_bytes

    for repeats in REPEATS:
        case = f"text encode, prompt {repeats}x"
        if rows.has(case, HOST):
            continue
        with rows.attempt(case, HOST) as figures, torch.inference_mode():
            tokens = clip.tokenize(" ".join([PROMPT] * repeats))
            clip.encode_from_tokens_scheduled(tokens)  # loads it
            meter = Meter(host.device)
            begin = meter.mark()
            cond = clip.encode_from_tokens_scheduled(tokens)
            seconds = meter.seconds(begin, meter.mark())
            count = cond[0][0].shape[1]
            predicted, measured = text_encoder_peak_bytes(count), meter.memory()["peak_bytes"]
            figures |= {
                "text_tokens": count, "seconds": seconds,
                **_against(predicted, measured),
            }  # fmt: skip


def medians(known: Sequence[Row], part: str) -> list[Measured]:
    """What a part has measured, by case and variant; loading by estimate before dynamic VRAM."""
    chosen: dict[tuple[str, str], list[Row]] = {}
    kernels: dict[tuple[str, str], float] = {}
    for row in sorted(known, key=lambda row: row.get("mode") == "dynamic VRAM"):
        if row["part"] != part or row.get("error") or row["case"] in ("leg", part):
            continue
        case = row["case"].removesuffix(" launches")
        key = (case, row["variant"])
        if case != row["case"]:
            if row.get("kernels") is not None:
                kernels.setdefault(key, row["kernels"])
        elif key not in chosen or chosen[key][0].get("mode") == row.get("mode"):
            chosen.setdefault(key, []).append(row)
    return [
        Measured(
            *key, _median(found, "peak_bytes"), _median(found, "workspace_bytes"),
            _median(found, "cpu_step_s"), kernels.get(key),
        )
        for key, found in chosen.items()
    ]  # fmt: skip


def _median(found: Sequence[Row], name: str) -> Any:
    values = [row[name] for row in found if row.get(name) is not None]
    return statistics.median_low(values) if values else None


def denoiser_bytes(found: Measured, models: Any, request: Any) -> int | None:
    """Predicted live bytes of a denoiser's case; None for weights that the plan has no word on."""
    from pack.nodes.memory.need import denoiser_live_bytes
    from pack.nodes.memory.plan import stock_peak_bytes
    from pack.nodes.memory.stages import head_groups

    size = _picture(found.case)
    if size is None:
        return None
    shape = replace(request, width_px=size.width_px, height_px=size.height_px, batch=size.batch)
    if found.variant == HOST:
        return stock_peak_bytes(shape)
    fast, middle, small = head_groups(models.denoiser)
    groups = dict(zip(list(DENOISER)[1:], (fast, middle, small, fast, middle, small), strict=True))
    return denoiser_live_bytes(shape, groups[found.variant])


def vae_bytes(found: Measured, models: Any, request: Any) -> int | None:
    """Predicted live bytes of a decode or encode; None for ways that the plan has no word on."""
    from pack.nodes.memory.stages import vae_stage

    size_text, _, way = found.case.partition(" ")
    size = _picture(size_text)
    if size is None or way not in ("decode", "encode"):
        return None
    if found.variant != HOST and not found.variant.startswith(LEAN_VAE):
        return None
    prefer = None if found.variant == HOST else found.variant.removeprefix(LEAN_VAE)
    shape = replace(request, width_px=size.width_px, height_px=size.height_px, batch=size.batch)
    stage = vae_stage(models, shape, prefer, is_decode=way == "decode")
    return stage.stock_bytes if prefer is None else stage.activation_bytes


def _picture(text: str) -> Picture | None:
    try:
        return picture(text)
    except (ValueError, TypeError):
        return None


def compare(rows: Recorder, case: str, found: Measured, predicted: int) -> None:
    """Writes the row of one prediction."""
    rows.write(case, found.variant, **_against(predicted, found.peak_bytes))


def _against(predicted: int, measured: int | None) -> Row:
    ratio = predicted / measured if measured else None
    return {"predicted_bytes": predicted, "measured_bytes": measured, "ratio": ratio}


def reserved_factor(found: Measured, predicted: int, *, spare_bytes: int = 0) -> Iterator[float]:
    """What the allocator took over the predicted live bytes, with the workspaces of kernels.

    The plan allows `factor * predicted + spare_bytes`, for our nodes alone.
    """
    if found.variant == HOST or found.peak_bytes is None or found.workspace_bytes is None:
        return
    yield (found.peak_bytes + found.workspace_bytes - spare_bytes) / predicted


def launch_seconds(denoised: Sequence[Measured]) -> Iterator[float]:
    """Seconds of the issuing thread for one launch, by what ours launches beyond the host."""
    alone = {found.case: found for found in denoised if found.variant == HOST}
    for found in denoised:
        host = alone.get(found.case)
        if host is None or found is host or None in (found.kernels, host.kernels):
            continue
        more = found.kernels - host.kernels
        if more > 0 and found.cpu_step_s is not None and host.cpu_step_s is not None:
            yield (found.cpu_step_s - host.cpu_step_s) / more


def write_constant(
    rows: Recorder, name: str, samples: Sequence[float], today: float | None
) -> None:
    """Writes the row of a constant; without samples its value is not measured."""
    rows.write(
        CONSTANTS, name, value=statistics.median(samples) if samples else None,
        low=min(samples, default=None), high=max(samples, default=None), today=today,
        samples=len(samples),
    )  # fmt: skip
