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
SLICE = "+ Attention Slice "
ISSUED = Picture(256, 256)
CONSTANTS = "constants"


class Measured(NamedTuple):
    """The medians of a case's variant over its rounds; bytes are None without a card.

    taken_bytes: what torch's allocator held at most, without weights.
    step_s: of a sampling step; None for what has none.
    """

    case: str
    variant: str
    peak_bytes: int | None
    taken_bytes: int | None
    step_s: float | None = None


def run(job: Job, rows: Recorder) -> None:
    host = start(job, rows)
    from pack.nodes.denoiser.cost import LAUNCH_S, REACHED
    from pack.nodes.denoiser.need import DENOISER_RESERVED
    from pack.nodes.denoiser.sizes import Request
    from pack.nodes.fit.stage import ASSUMED_CARD
    from pack.nodes.fit.stages import published_models
    from pack.nodes.host.denoiser import known
    from pack.nodes.host.denoiser.block import fill_on
    from pack.nodes.host.fit.budget import copy_bytes_per_s
    from pack.nodes.vae.need import SPARE_BYTES, VAE_RESERVED

    loaded = host.load("whole")
    encode_texts(host, rows, loaded.clip)
    sizes = known.transformer_sizes(loaded.model)
    fill = fill_on(host.device, sizes)
    models = replace(published_models(), denoiser=sizes, fill_tokens=fill)
    dtype_bytes = known.activation_bytes(loaded.model)
    request = Request(1024, 1024, 1, TEXT_TOKENS, dtype_bytes, sizes)
    known = [row for row in read(job.rows_path) if row.get("rehearsal") == job.is_rehearsal]
    denoised, decoded = medians(known, "denoiser"), medians(known, "vae")
    reserved: list[float] = []
    reached: list[float] = []
    for found in denoised:
        reached += reached_share(found, request, _device_name(host.device))
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
    write_constant(rows, "REACHED", reached, REACHED)
    write_constant(rows, "LAUNCH_S", list(launch_seconds(host, rows)), LAUNCH_S)
    copies, assumed = [] if speed is None else [speed], ASSUMED_CARD.copy_bytes_per_s
    write_constant(rows, "copy_bytes_per_s", copies, assumed)


def encode_texts(host: Host, rows: Recorder, clip: Any) -> None:
    """Rows of one encoding of a short and of a long prompt by the host."""
    from pack.nodes.fit.text_encoder import QWEN3_4B, text_encoder_peak_bytes
    from pack.nodes.host.fit.text_encoder import bytes_per_score

    held = bytes_per_score(host.device, QWEN3_4B)
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
            predicted = text_encoder_peak_bytes(count, bytes_per_score=held)
            figures |= {
                "text_tokens": count, "seconds": seconds,
                **_against(predicted, meter.memory()["peak_bytes"]),
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
        Measured(
            *key,
            _median(found, "peak_bytes"),
            _median(map(_without_weights, found), "bytes"),
            _median(found, "step_s"),
        )
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
    from pack.nodes.denoiser.plan import denoiser_plan

    shape = _shape(found, request)
    if shape is None:
        return None
    if found.variant == HOST:
        return stock_peak_bytes(shape)
    choice = _choice(found.variant, request.sizes.kv_heads)
    if choice is None:
        return None
    plan = denoiser_plan(shape, choice, fill=models.fill_tokens)
    return denoiser_live_bytes(shape, plan, is_plain=True).plain


def _choice(variant: str, kv_heads: int) -> Any:
    """What a variant sets by itself; None where it depends on what is free, and for the host."""
    from pack.nodes.attention.budget import AUTO_HEADS
    from pack.nodes.denoiser.plan import DenoiserChoice

    groups = {
        DEFAULT: 1,
        SLICE + "auto": -(-kv_heads // min(kv_heads, AUTO_HEADS)),
        SLICE + "max": kv_heads,
    }.get(variant)
    return None if groups is None else DenoiserChoice().at_least(groups)


def reached_share(found: Measured, request: Any, device_name: str) -> Iterator[float]:
    """Share of its data sheet that a known card reaches in the host's steps."""
    from pack.nodes.denoiser.cost import CARDS, REACHED, seconds, step_work

    shape = _shape(found, request)
    if found.variant != HOST or shape is None or not found.step_s:
        return
    for card in CARDS:
        if " ".join(card.name.split()[:2]).removesuffix(" SXM") in device_name:
            yield REACHED * seconds(step_work(shape, None), card) / found.step_s


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def _shape(found: Measured, request: Any) -> Any:
    """The request of a denoiser's case; None for weights that the plan has no word on."""
    size = _picture(found.case)
    if size is None:
        return None
    return replace(request, width_px=size.width_px, height_px=size.height_px, batch=size.batch)


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
