"""The tables of `families`: with plain weights, and with weights in fewer bits."""

from __future__ import annotations

from collections.abc import Sequence

from ..card.tables import NOT_MEASURED, grid, mib
from ..rows import Row
from .lines import by_way

COLUMNS = {
    "ComfyUI alone": "ComfyUI alone", "speed": "`speed`",
    "balance (default)": "`balance` (default)", "smallest": "`smallest`",
}  # fmt: skip
# How the rows name weights, and how the tables do.
WEIGHTS = {
    "": "bf16",
    "scaled fp8": "scaled fp8",
    "scaled fp8 without fp8 products": "scaled fp8, a card without fp8 products",
    "int8 file": "int8",
    "nvfp4": "nvfp4",
    "weight_dtype fp8_e4m3fn": "`weight_dtype` fp8_e4m3fn",
    "GGUF-like": "called whole, as of GGUF",
}
# Columns of the tables by weights.
QUANTISED = {
    "quantised_flux": (
        ("FLUX.2 dev", "1024x1024"), ("FLUX.2 dev", "2048x2048"), ("FLUX.1 dev", "2048x2048"),
    ),
    "quantised_others": (
        ("Qwen-Image", "1024x1024"), ("Qwen-Image", "2048x2048"),
        ("Wan 2.1 14B", "1280x720, 81 frames"),
    ),
}  # fmt: skip


def newest(rows: Sequence[Row]) -> list[Row]:
    """The rows of the newest ComfyUI."""
    hosts = {row["host"] for row in rows}
    host = max(hosts, key=lambda name: [int(part) for part in name.split(".")], default="")
    return [row for row in rows if row["host"] == host]


def tables(rows: Sequence[Row]) -> dict[str, str]:
    """The tables of the newest ComfyUI's rows."""
    named = [(row, *_case_and_weights(row)) for row in newest(rows)]
    plain = [{**row, "case": case} for row, case, weights in named if not weights]
    cells = {(row["family"], case, weights, row["way"]): row for row, case, weights in named}
    return {
        "families": by_way(
            ("model", "picture or video", "residual stream"),
            COLUMNS,
            plain,
            line=lambda row: (row["family"], row["case"], mib(row["stream_bytes"])),
            way=lambda row: row["way"],
            cell=lambda row: mib(row["peak_bytes"], 0),
        ),
        **{name: _quantised(cells, columns) for name, columns in QUANTISED.items()},
    }


def _case_and_weights(row: Row) -> tuple[str, str]:
    case, _, last = row["case"].rpartition(", ")
    return (case, last) if last in WEIGHTS else (row["case"], "")


def _quantised(
    cells: dict[tuple[str, str, str, str], Row], columns: Sequence[tuple[str, str]]
) -> str:
    """A line per weights; a cell has ComfyUI's peak and ours by preference."""
    body = []
    for weights, shown in WEIGHTS.items():
        line = [shown]
        for family, case in columns:
            found = [cells.get((family, case, weights, way)) for way in COLUMNS]
            texts = [NOT_MEASURED if one is None else mib(one["peak_bytes"], 0) for one in found]
            has_all = all(one is not None for one in found)
            line.append(" / ".join(t.removesuffix(" MiB") for t in texts) + " MiB" * has_all)
        body.append(line)
    return grid(("weights", *(f"{family}, {case}" for family, case in columns)), body)
