"""Which tables a report has: one or more for each part, by the fields of its rows.

Standard library only.
"""

from __future__ import annotations

from . import tables
from .report_values import (
    equality,
    is_counters,
    is_launches,
    is_narrow,
    launches_of,
    meaning,
    noise,
    over,
)
from .tables import HOST, Column, Table, ratio

SETUP = Column("setup", "setup")
LEG = Column("leg", "leg")
CASE = Column("picture", "case", tables.picture)
WAY = Column("variant", "variant", str)
NOTE = Column("note", "note", str, empty="", of_failed=True)
BUDGET_KEYS = (
    SETUP,
    Column("card", "card_gib", lambda gib: "as it is" if gib is None else f"{gib:g} GiB"),
    CASE,
    Column("run", "round", lambda index: "warm" if index else "first"),
    WAY,
)
LAUNCH_CASE = Column("picture", "case", launches_of)
LAUNCH_COLUMNS = (
    Column("kernels", "kernels", tables.number),
    ratio("kernels"),
    Column("copies", "copies", tables.number),
    Column("operations (without a card)", "operations", tables.number),
    NOTE,
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
                "error / ComfyUI's", over("relative_error", "host_relative_error"),
                tables.times, bold_from=1.01, empty=tables.NO_PAIR,
            ),
            Column("largest error", "largest_error", tables.number),
            Column("against", "reference", str),
            Column("time", "seconds", tables.seconds),
            NOTE,
        ),
        where=lambda row: not is_counters(row),
        note="Errors are relative to the reference. Bold: further off than ComfyUI.",
    ),
    Table(
        "sanity",
        "Do the counters tell the truth?",
        (SETUP, LEG, Column("allocator", "allocator", lambda name: name or tables.NOT_MEASURED)),
        (
            Column("counted", "counted_bytes", tables.mib, of_failed=True),
            Column("expected", "expected_bytes", tables.mib, of_failed=True),
            NOTE,
        ),
        where=is_counters,
        note="Counted: torch's peak after a tensor of the expected size was freed and one of half "
        "that size made.",
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
            NOTE,
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
            NOTE,
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
            NOTE,
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
            NOTE,
        ),
        where=lambda row: row.get("case") != "constants" and not is_narrow(row),
        is_latest=True,
    ),
    Table(
        "predicted",
        "A step of a model so narrow that the card waits for each launch",
        (SETUP, CASE, WAY),
        (Column("a step", "step_s", tables.seconds), *LAUNCH_COLUMNS),
        where=is_narrow,
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
            Column("meaning", meaning, str, of_failed=True),
        ),
        where=lambda row: row.get("case") == "constants",
        is_latest=True,
    ),
    Table(
        "probe",
        "VRAM Probe against counters outside of it",
        (SETUP, LEG, CASE, Column("detail", "variant")),
        (
            Column("activations, by the probe", "probe_activations_bytes", tables.mib),
            Column("activations outside", "outside_activations_bytes", tables.mib),
            Column("probe / outside", "ratio", tables.times),
            Column("peak, by the probe", "probe_peak_bytes", tables.mib),
            Column("sum of its parts", "parts_sum_bytes", tables.mib),
            Column("allocated outside", "outside_peak_bytes", tables.mib),
            Column("of it pages", "pages_bytes", tables.mib),
            Column("peak, by the driver", "driver_peak_bytes", tables.mib),
            Column("a step", "step_s", tables.seconds),
            Column("without it", "plain_step_s", tables.seconds),
            Column("cost", "cost", tables.percent),
            Column("equal to the bit", "is_bit_equal", tables.yes_no),
            NOTE,
        ),
        note="Outside: torch's counters in the same sampling without a probe, with the pages of "
        "dynamic VRAM in what was allocated. The driver counts all that is in use, other programs "
        "too.",
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
            NOTE,
        ),
    ),
    Table(
        "training",
        "Training a LoRA",
        (SETUP, CASE, WAY),
        (
            Column("peak", "peak_bytes", tables.gib),
            ratio("peak_bytes", to="depth 2's"),
            Column("allocated", "allocated_bytes", tables.gib),
            Column("reserved", "reserved_bytes", tables.gib),
            Column("a step", "step_s", tables.seconds),
            ratio("step_s", to="depth 2's"),
            Column("a step, first one included", "seconds", tables.seconds),
            Column("last loss", "loss", tables.number),
            Column("losses differ by", "loss_relative_difference", tables.number),
            NOTE,
        ),
        note="ComfyUI's own checkpointing: depth 1 is the model as a whole, depth 2 each block. "
        "Losses are compared with the first way that could train.",
        partner="ComfyUI, depth 2",
    ),
)  # fmt: skip
