"""The plan's figures against this card's, and the constants that would make the plan right here.

The text encode is measured here; denoiser and VAE are read from the rows of their parts, which come
before. A constant's rows: `value` is the median of what the samples ask for, `low` and `high` their
range, `today` what nodes/ uses now. Nothing is changed by it.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from ..host import Host, start
from ..job import Job, Picture, picture
from ..rows import Recorder, Row, read
from ..sampling import TEXT_TOKENS, Meter, sample
from ..variants import DEFAULT, HOST, make
from .denoiser import launches

PROMPT = "a red fox asleep in the snow under a birch tree, early morning light"
REPEATS = (1, 16)  # of the prompt's text: a short one and a long one
LEAN_VAE = "Lean VAE "
# By the number of head groups, the fewest first.
SETTINGS = (DEFAULT, "+ Attention Slice auto", "+ Attention Slice max")
ISSUED = Picture(256, 256)
CONSTANTS = "constants"


class Measured(NamedTuple):
    """The medians of a case's variant over its rounds; bytes are None without a card.

    taken_bytes: what torch's allocator held at most, without weights.
    """

    case: str
    variant: str
    peak_bytes: int | None
    taken_bytes: int | None


def run(job: Job, rows: Recorder) -> None:
    host = start(job, rows)
    from pack.nodes.denoiser.need import DENOISER_RESERVED
    from pack.nodes.denoiser.sizes import Request
    from pack.nodes.fit.stages import published_models
    from pack.nodes.host.denoiser import patch as lean_patch
    from pack.nodes.host.fit.budget import copy_bytes_per_s
    from pack.nodes.vae.need import SPARE_BYTES, VAE_RESERVED

    loaded = host.load("whole")
    encode_texts(host, rows, loaded.clip)
    sizes = lean_patch.transformer_sizes(loaded.model)
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
    write_constant(rows, "seconds per launch", list(launch_seconds(host, rows)), None)
    write_constant(rows, "copy bytes per second", [] if speed is None else [speed], None)


def encode_texts(host: Host, rows: Recorder, clip: Any) -> None:
    """Rows of one encoding of a short and of a long prompt by the host."""
    from pack.nodes.fit.text_encoder import text_encoder_peak_bytes

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
    for row in sorted(known, key=lambda row: row.get("mode") == "dynamic VRAM"):
        if row["part"] != part or row.get("error") or "peak_bytes" not in row:
            continue
        key = (row["case"], row["variant"])
        if key not in chosen or chosen[key][0].get("mode") == row.get("mode"):
            chosen.setdefault(key, []).append(row)
    return [
        Measured(*key, _median(found, "peak_bytes"), _median(map(_without_weights, found), "bytes"))
        for key, found in chosen.items()
    ]


def _without_weights(row: Row) -> Row:
    names = ("reserved_bytes", "weights_bytes")
    reserved, weights = (row.get(name) for name in names)
    return {"bytes": None if reserved is None or weights is None else reserved - weights}


def _median(found: Iterable[Row], name: str) -> Any:
    values = [row[name] for row in found if row.get(name) is not None]
    return statistics.median_low(values) if values else None


def denoiser_bytes(found: Measured, models: Any, request: Any) -> int | None:
    """Predicted live bytes of a denoiser's case; None for weights that the plan has no word on.

    Fit to VRAM chooses its settings by what is free at each sampling: its rows are left out.
    """
    from pack.nodes.denoiser.need import denoiser_live_bytes
    from pack.nodes.denoiser.peak import stock_peak_bytes
    from pack.nodes.fit.stages import head_groups

    size = _picture(found.case)
    if size is None:
        return None
    shape = replace(request, width_px=size.width_px, height_px=size.height_px, batch=size.batch)
    if found.variant == HOST:
        return stock_peak_bytes(shape)
    groups = dict(zip(SETTINGS, head_groups(models.denoiser), strict=True)).get(found.variant)
    return None if groups is None else denoiser_live_bytes(shape, groups, is_plain=True)


def vae_bytes(found: Measured, models: Any, request: Any) -> int | None:
    """Predicted live bytes of a decode or encode; None for ways that the plan has no word on."""
    from pack.nodes.fit.stages import vae_stage

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
    if found.variant != HOST and found.taken_bytes is not None:
        yield (found.taken_bytes - spare_bytes) / predicted


def launch_seconds(host: Host, rows: Recorder) -> Iterator[float]:
    """Seconds to issue one kernel: a step of a model so narrow that the card waits for each.

    Writes a row of each way; without a card no kernel is counted and nothing is yielded.
    """
    model = host.load("small").model
    for name in (HOST, DEFAULT):
        with rows.attempt(f"{ISSUED} narrow model", name) as figures:
            patched = make(name, model)
            figures["step_s"] = statistics.median(
                sample(host, patched, ISSUED, steps=4 if host.job.is_rehearsal else 16).step_s
            )
            figures |= launches(host, patched, ISSUED)
            if figures["kernels"]:
                yield figures["step_s"] / figures["kernels"]


def write_constant(
    rows: Recorder, name: str, samples: Sequence[float], today: float | None
) -> None:
    """Writes the row of a constant; without samples its value is not measured."""
    rows.write(
        CONSTANTS, name, value=statistics.median(samples) if samples else None,
        low=min(samples, default=None), high=max(samples, default=None), today=today,
        samples=len(samples),
    )  # fmt: skip
