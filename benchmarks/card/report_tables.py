"""Which tables a report has: one or more for each part, by the fields of its rows.

Standard library only.
"""

from __future__ import annotations

from collections.abc import Callable

from . import tables
from .rows import Row
from .tables import HOST, Column, Table, ratio

LAUNCHES = " launches"
SETUP = Column("setup", "setup")
LEG = Column("leg", "leg")
CASE = Column("picture", "case", tables.picture)
WAY = Column("variant", "variant", str)
BUDGET_KEYS = (
    SETUP,
    Column("card", "card_gib", lambda gib: "as it is" if gib is None else f"{gib:g} GiB"),
    CASE,
    Column("run", "round", lambda index: "warm" if index else "first"),
    WAY,
)


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


LAUNCH_CASE = Column("picture", "case", launches_of)
LAUNCH_COLUMNS = (
    Column("kernels", "kernels", tables.number),
    ratio("kernels"),
    Column("copies", "copies", tables.number),
    Column("operations (without a card)", "operations", tables.number),
)
TABLES = (
    Table(
        "sanity",
        "Does it run, and how far is it from the exact result?",
        (SETUP, LEG, Column("case", "case", tables.picture), WAY),
        (
            Column("equal to the bit", "is_bit_equal", tables.yes_no),
            Column("error", "relative_error", tables.number),
            Column("ComfyUI's error", "host_relative_error", tables.number),
            Column(
                "of ComfyUI's", over("relative_error", "host_relative_error"),
                tables.times, bold_from=1.01, empty=tables.NO_PAIR,
            ),
            Column("largest error", "largest_error", tables.number),
            Column("against", "reference", str),
            Column("time", "seconds", tables.seconds),
        ),
        note="Errors are relative to the reference. Bold: further off than ComfyUI.",
    ),
    Table(
        "denoiser",
        "A sampling step",
        (SETUP, LEG, CASE, WAY),
        (
            Column("peak", "peak_bytes", tables.mib),
            ratio("peak_bytes"),
            Column("a step", "step_s", tables.seconds),
            ratio("step_s"),
            Column("processor, a step", "cpu_step_s", tables.seconds),
            Column("reserved", "reserved_bytes", tables.mib),
            Column("workspace", "workspace_bytes", tables.mib),
            Column("allocated", "allocated_bytes", tables.mib),
        ),
        where=lambda row: not is_launches(row) and row.get("variant") != "loading",
        note="Peak: what torch allocated above the start of the steps. Reserved: what its "
        "allocator held; workspace: reserved beyond allocated. Under dynamic VRAM torch's bytes do "
        "not hold the weights.",
    ),
    Table(
        "denoiser",
        "Kernels launched in a step",
        (SETUP, LEG, LAUNCH_CASE, WAY),
        LAUNCH_COLUMNS,
        where=is_launches,
    ),
    Table(
        "vae",
        "Decode and encode: memory and time",
        (SETUP, CASE, WAY),
        (
            Column("peak", "peak_bytes", tables.mib),
            ratio("peak_bytes"),
            Column("time, warm", "seconds", tables.seconds),
            ratio("seconds"),
            Column("time, first", "first_s", tables.seconds),
            Column("reserved", "reserved_bytes", tables.mib),
            Column("workspace", "workspace_bytes", tables.mib),
            Column("note", "note", str, empty=""),
        ),
        where=lambda row: not is_launches(row),
        note="Peak: what torch allocated above the start.",
    ),
    Table(
        "vae",
        "Decode and encode: how far from ComfyUI's result",
        (SETUP, CASE, WAY),
        (
            Column("equal to the bit", "is_bit_equal", tables.yes_no),
            Column("error", "relative_error", tables.number),
            Column("largest error", "largest_error", tables.number),
            Column("equal 8-bit values", "equal_8bit", tables.percent),
            Column("most off", "most_off_8bit", tables.number),
            Column("PSNR", noise, tables.decibel),
            Column("seams", "seam_energy", tables.number),
        ),
        where=lambda row: not is_launches(row) and row.get("variant") != HOST,
        note="Seams: error energy along the edges of tiles or strips over that elsewhere; 1 is no "
        "seam. An encode has no pixels.",
    ),
    Table(
        "vae",
        "Kernels launched in a call",
        (SETUP, LAUNCH_CASE, WAY),
        LAUNCH_COLUMNS,
        where=is_launches,
    ),
    Table(
        "budget",
        "Whole runs, from text to picture, in ComfyUI's server",
        BUDGET_KEYS,
        (
            Column("survived", "survived", tables.yes_no, of_failed=True),
            Column("peak, by the driver", "peak_bytes", tables.gib),
            ratio("peak_bytes"),
            Column("time", "seconds", tables.seconds),
            ratio("seconds"),
            Column("peak of RAM", "ram_peak_bytes", tables.gib),
            Column("free before", "free_bytes", tables.gib),
            Column("held by ballast", "ballast_bytes", tables.gib),
        ),
        note="Peak: what all of the run took of the card, weights and the driver's context "
        "included, sampled outside of the process.",
    ),
    Table(
        "budget",
        "The stages of these runs, and their pictures",
        BUDGET_KEYS,
        (
            Column("loading", "load_s", tables.seconds),
            Column("text", "text_s", tables.seconds),
            Column("sampling", "sampling_s", tables.seconds),
            Column("decode", "decode_s", tables.seconds),
            Column("equal to ComfyUI's", equality, str),
            Column("equal 8-bit values", "equal_8bit", tables.percent),
            Column("most off", "most_off_8bit", tables.number),
            Column("PSNR", noise, tables.decibel),
            Column("peak, as planned", "planned_bytes", tables.gib),
            Column("peak, by VRAM Probe", "probe_peak_bytes", tables.gib),
            Column("loader", "loader", str),
            Column("note", "note", str, empty=""),
        ),
        note="Pictures are compared with ComfyUI's on the card as it is.",
    ),
    Table(
        "predicted",
        "Predicted peaks against measured ones",
        (SETUP, Column("stage and picture", "case", tables.picture), Column("setting", "variant")),
        (
            Column("predicted", "predicted_bytes", tables.mib),
            Column("measured", "measured_bytes", tables.mib),
            Column("predicted / measured", "ratio", tables.times),
        ),
        where=lambda row: row.get("case") != "constants",
        is_latest=True,
    ),
    Table(
        "predicted",
        "Constants that would make the plan right on this card",
        (SETUP, Column("constant", "variant")),
        (
            Column("today", "today", tables.number, empty=tables.NO_PAIR),
            Column("here", "value", tables.number),
            Column("lowest", "low", tables.number),
            Column("highest", "high", tables.number),
            Column("samples", "samples", tables.number),
        ),
        where=lambda row: row.get("case") == "constants",
        is_latest=True,
    ),
    Table(
        "probe",
        "VRAM Probe against counters outside of it",
        (SETUP, LEG, CASE, Column("detail", "variant")),
        (
            Column("peak, by the probe", "probe_peak_bytes", tables.mib),
            Column("sum of its parts", "parts_sum_bytes", tables.mib),
            Column("outside", "outside_peak_bytes", tables.mib),
            Column("probe / outside", "ratio", tables.times),
            Column("activations, by the probe", "probe_activations_bytes", tables.mib),
            Column("outside", "outside_activations_bytes", tables.mib),
            Column("peak, by the driver", "driver_peak_bytes", tables.mib),
            Column("a step", "step_s", tables.seconds),
            Column("without it", "plain_step_s", tables.seconds),
            Column("cost", "cost", tables.percent),
            Column("equal to the bit", "is_bit_equal", tables.yes_no),
        ),
        note="Outside: torch's counter in the same sampling without a probe, and the pages of "
        "dynamic VRAM. The driver counts all that is in use, other programs too.",
    ),
    Table(
        "tutorial",
        "The tutorial's method beside ours",
        (SETUP, CASE, WAY),
        (
            Column("peak, weights included", "peak_bytes", tables.gib),
            ratio("peak_bytes"),
            Column("of it activations", "activation_peak_bytes", tables.gib),
            Column("time", "seconds", tables.seconds),
            ratio("seconds"),
        ),
    ),
    Table(
        "training",
        "Training a LoRA",
        (SETUP, CASE, WAY),
        (
            Column("peak", "peak_bytes", tables.gib),
            ratio("peak_bytes", to="of depth 2's"),
            Column("allocated", "allocated_bytes", tables.gib),
            Column("reserved", "reserved_bytes", tables.gib),
            Column("a step", "seconds", tables.seconds),
            ratio("seconds", to="of depth 2's"),
            Column("last loss", "loss", tables.number),
            Column("losses differ by", "loss_relative_difference", tables.number),
        ),
        note="ComfyUI's own checkpointing: depth 1 is the model as a whole, depth 2 each block. "
        "Losses are compared with the first way that could train.",
        partner="ComfyUI, depth 2",
    ),
)  # fmt: skip
