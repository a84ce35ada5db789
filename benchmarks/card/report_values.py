"""What a report's tables show or choose by that is no field of a row. Standard library only."""

from __future__ import annotations

from collections.abc import Callable

from . import tables
from .rows import Row
from .tables import HOST

LAUNCHES, NARROW = " launches", " narrow model"
MEANINGS = {
    "DENOISER_RESERVED": "allocator and workspaces over predicted activations, denoiser",
    "VAE_RESERVED": "allocator and workspaces, less a fixed spare, over predicted activations, VAE",
    "REACHED": "share of the card's data sheet that ComfyUI's steps reach",
    "LAUNCH_S": "seconds to issue one kernel, by the steps of a narrow model",
    "copy_bytes_per_s": "speed of copies from RAM to the card, of the card that Fit assumes",
}


def over(one: str, other: str) -> Callable[[Row], float | None]:
    """One figure of a row over another one of the same row."""

    def quotient(row: Row) -> float | None:
        above, below = row.get(one), row.get(other)
        return above / below if above is not None and below else None

    return quotient


def is_launches(row: Row) -> bool:
    return str(row.get("case")).endswith(LAUNCHES)


def launches_of(case: str) -> str:
    return tables.picture(case.removesuffix(LAUNCHES))


def equality(row: Row) -> str | None:
    """Whether a run's picture is ComfyUI's; that of ComfyUI on the card as it is is the measure."""
    if row.get("is_equal") is None:
        is_reference = row.get("variant") == HOST and row.get("card_gib") is None
        return "the reference" if is_reference and row.get("survived") else None
    return tables.yes_no(row["is_equal"])


def noise(row: Row) -> float | None:
    """A picture's PSNR; infinite where it is equal, for which rows have none."""
    found = row.get("psnr_db")
    is_equal = row.get("is_equal") or row.get("largest_error") == 0
    return float("inf") if found is None and is_equal else found


def is_counters(row: Row) -> bool:
    return (row.get("case"), row.get("variant")) == ("start", "allocator")


def is_narrow(row: Row) -> bool:
    return str(row.get("case")).endswith(NARROW)


def meaning(row: Row) -> str:
    """A constant of the plan in words; its name where we have none."""
    return MEANINGS.get(row["variant"], row["variant"])
