"""What a card has free, and the limit on a model's weights there, by the host's own means."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import comfy.model_management as management
import torch
from comfy.cli_args import args

from ...fit.what_fits import Fit
from ...units import PAGE_BYTES, size
from ..attention.patch import holds_scores
from ..base.device import driver_bytes, is_card, is_dynamic, weights_bytes

logger = logging.getLogger(__name__)

_COPY_BYTES, _COPIES = 64 * 2**20, 3


def room_bytes(device: torch.device) -> int | None:
    """Bytes free on the card if the host unloaded all its models; None where there is no card."""
    if not is_card(device):
        return None
    return int(management.get_free_memory(device) + weights_bytes(device))


def card_bytes(device: torch.device) -> int | None:
    """The size of the card; None where there is no card."""
    return int(management.get_total_memory(device)) if is_card(device) else None


def margin_bytes() -> int:
    """Bytes that the host leaves free for other programs."""
    return int(management.extra_reserved_memory())


def floor_bytes(patcher: Any) -> int:
    """Bytes that a host that loads by estimate keeps free of weights, besides its margin."""
    if not is_card(patcher.load_device) or is_dynamic(patcher):
        return 0
    return max(0, int(management.minimum_inference_memory()) - margin_bytes())


def shares(patchers: Sequence[Any], limit_bytes: int | None) -> list[tuple[Any, int | None]]:
    """Models that are loaded together, and of the limit on their weights the share of each.

    Each call uses all of them once, so none is better kept on the card than another.
    """
    if limit_bytes is None:
        return [(patcher, None) for patcher in patchers]
    total, parts = sum(patcher.model_size() for patcher in patchers), []
    for patcher in patchers:
        step = PAGE_BYTES if is_dynamic(patcher) else 1
        parts.append((patcher, limit_bytes * patcher.model_size() // total // step * step))
    return parts


@contextmanager
def loading_within(patcher: Any, limit_bytes: int | None) -> Iterator[None]:
    """While it is open, a host that loads by estimate loads at most `limit_bytes` of the weights.

    A reserve would not do: it also sends other models away, and on cards other than NVIDIA's the
    host loads a share of what is free whatever is reserved.

    Source: load_models_gpu and ModelPatcher.partially_load in the host.
    """
    if limit_bytes is None or not is_card(patcher.load_device) or is_dynamic(patcher):
        yield
        return
    load = patcher.partially_load

    def up_to_limit(device_to: Any, extra_memory: float = 0, *args: Any, **kwargs: Any) -> Any:
        extra_memory = min(extra_memory, limit_bytes - patcher.loaded_size())
        return load(device_to, extra_memory, *args, **kwargs)

    # On this object alone, which is the sampling's own clone.
    patcher.partially_load = up_to_limit
    try:
        yield
    finally:
        del patcher.partially_load


def limit_weights(patcher: Any, limit_bytes: int | None) -> Callable[[], None] | None:
    """Limits how many bytes of a loaded model's weights are in pages of dynamic VRAM.

    Returns:
        A function that lifts the limit; None where there is nothing to lift.

    Source: ModelVBAR in comfy_aimdo. No page from its watermark on is resident; its watermark
    *limit* is another thing, what others may not take. The host lifts the watermark at each load.
    """
    if limit_bytes is None or not is_card(patcher.load_device) or not is_dynamic(patcher):
        return None
    pages = patcher.model.dynamic_vbars.get(patcher.load_device)
    if not hasattr(pages, "set_watermark"):
        logger.warning(
            "Fit to VRAM: this ComfyUI cannot limit a model's pages, so nothing is enforced"
        )
        return None
    try:
        pages.set_watermark(limit_bytes)  # planned in whole pages, to which the library rounds up
    except Exception as error:  # RuntimeError from comfy_aimdo 0.6.0 on
        logger.warning("Fit to VRAM: nothing is enforced, comfy-aimdo refused the limit: %s", error)
        _lift(pages)
        return None
    return functools.partial(_lift, pages)


def _lift(pages: Any) -> None:
    """Lifts the limit. A failure is logged, so that it hides no error of the sampling."""
    try:
        pages.set_watermark(pages.max_size)
    except Exception as error:
        logger.warning(
            "Fit to VRAM: comfy-aimdo refused to lift the limit on a model's pages, which stays "
            "until ComfyUI loads the model again: %s",
            error,
        )


def check_ram(plan: Fit, model: Any, text_encoder: Any | None) -> None:
    """Raises a `ValueError` where RAM is too small for what must wait there.

    That is the maps of Lean VAE, and where the host loads by estimate the weights that leave the
    card. Pages of dynamic VRAM are copies of what is in RAM or in a file, as is what it pins, which
    makes room for maps.
    """
    patchers = {"denoise": model, "text encode": text_encoder}
    leaves = sum(
        max(0, patcher.loaded_size() - stage.resident_bytes(plan.budget_bytes))
        for stage in plan.stages
        if (patcher := patchers.get(stage.name)) is not None
        and is_card(patcher.load_device)
        and not is_dynamic(patcher)
    )
    maps = max(stage.ram_bytes for stage in plan.stages)
    free = int(management.get_free_memory(torch.device("cpu")))
    if is_dynamic(model):
        free += int(management.TOTAL_PINNED_MEMORY)
    if leaves + maps > free:
        raise ValueError(
            f"Fit to VRAM: RAM must have {size(leaves + maps)} free for weights and feature "
            f"maps, got {size(free)}: close other programs, or raise budget_gib"
        )


def notes(patcher: Any) -> list[str]:
    """Lines for the report: how a budget is enforced here, and what is not in it."""
    if not is_card(patcher.load_device):
        how = "nothing is enforced: no NVIDIA, AMD or Intel card computes this model"
    elif is_dynamic(patcher):
        how = "a named budget limits the pages of the model's weights (dynamic VRAM)"
    else:
        how = "a named budget limits how many weights ComfyUI loads (loading by estimate)"
    scores = "ComfyUI's attention stores scores here, beyond these figures: add Attention Slice."
    return [f"Here {how}.", *_beside(patcher), *([scores] if holds_scores() else [])]


def _beside(patcher: Any) -> list[str]:
    """What the run takes of the machine besides the budget."""
    lines, device = [], patcher.load_device
    if is_card(device):
        with suppress(RuntimeError, AssertionError, AttributeError):
            _, outside = driver_bytes(device)
            lines.append(f"CUDA context and other programs: {size(outside)}, on top of the budget.")
    pinned = getattr(management, "MAX_PINNED_MEMORY", -1)
    if pinned > 0:
        lines.append(
            f"Pinned RAM: ComfyUI pins what it streams, at most {size(int(pinned))} for all models."
        )
    return lines


def copy_bytes_per_s(device: torch.device) -> float | None:
    """Measured speed of a copy from pinned RAM to the card; None where it cannot be measured."""
    if device.type != "cuda" or args.disable_pinned_memory:
        return None
    try:
        return _copy_bytes_per_s(device.index or 0)
    except RuntimeError:  # no room on the card or in pinned RAM
        return None


@functools.lru_cache
def _copy_bytes_per_s(index: int) -> float:
    source = torch.empty(_COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(_COPY_BYTES, dtype=torch.uint8, device=f"cuda:{index}")
    best = float("inf")
    for _ in range(_COPIES):
        torch.cuda.synchronize(index)
        start = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize(index)
        best = min(best, time.perf_counter() - start)
    return _COPY_BYTES / best


def weight_bytes(patcher: Any) -> int:
    """Bytes of a model's weights and of its LoRAs, which the host loads with them."""
    seen: dict[int, int] = {}

    def walk(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            seen[value.data_ptr()] = value.nbytes
        elif isinstance(value, list | tuple):
            for item in value:
                walk(item)
        else:
            walk(getattr(value, "weights", ()) or ())

    for entries in patcher.patches.values():
        for entry in entries:
            # strength of the patch, the patch, and strength of the model: see add_patches
            if len(entry) > 1 and not isinstance(entry[1], str | int | float):
                walk(entry[1])
    return patcher.model_size() + sum(seen.values())
