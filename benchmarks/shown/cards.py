"""The table of measured cards, from the rows.jsonl of each card."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..card import rows, tables
from ..card.report import BUDGET_OURS, DENOISER_OURS
from ..card.rows import OUT_OF_MEMORY, Row
from ..card.tables import HOST, NOT_MEASURED
from .words import Words

VERSIONS = {"pack": "pack", "comfyui": "ComfyUI", "torch": "torch", "driver": "driver"}


def load(folder: Path) -> list[Row]:
    """All rows of the cards, by file name.

    Raises:
        ValueError: a file holds rows of a rehearsal, or rows without a card.
    """
    found: list[Row] = []
    for path in sorted(folder.glob("*.jsonl")):
        mine = rows.read(path)
        if any(row.get("rehearsal") for row in mine):
            raise ValueError(f"{path.name} holds rows of a rehearsal, which measured no card")
        tables.setups(mine)
        found += [{**row, "file": path.name} for row in mine if row["setup"] is not None]
    return found


def section(found: Sequence[Row], words: Words) -> str:
    """A sentence without rows, a table with some."""
    body = [line for lines in _cards(found) for line in _card(lines, words)]
    if not body:
        return f"{words.nothing}\n"
    return f"{words.intro}\n\n{tables.grid(words.head, body)}"


def _cards(found: Sequence[Row]) -> list[list[Row]]:
    """The rows of each file and setup."""
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in found:
        groups.setdefault((row["file"], row["setup"]), []).append(row)
    return [groups[key] for key in sorted(groups)]


def _card(here: Sequence[Row], words: Words) -> list[list[str]]:
    """The lines of one card: whole runs, then steps of pictures without a whole run."""
    variants = (HOST, BUDGET_OURS, DENOISER_OURS)
    pair = [row for row in here if row.get("variant") in variants and tables.is_size(row["case"])]
    runs = tables.warm([row for row in pair if row["part"] == "budget"])
    cases = {row["case"] for row in runs}
    steps = [row for row in pair if row["part"] == "denoiser" and row["case"] not in cases]
    # One leg measures all sizes, another one some of them again: the first, never a mix of both.
    legs = {row["case"]: min(r["leg"] for r in steps if r["case"] == row["case"]) for row in steps}
    steps = [row for row in steps if row["leg"] == legs[row["case"]]]
    made = []
    for rows_of, ours, time in ((runs, BUDGET_OURS, "seconds"), (steps, DENOISER_OURS, "step_s")):
        keys = {(row["case"], row.get("card_gib")) for row in rows_of}
        for key in sorted(keys, key=lambda key: tables.size_order(*key)):
            line = [row for row in rows_of if (row["case"], row.get("card_gib")) == key]
            made.append(_line(line, ours, time, words))
    return made


def whole_runs(found: Sequence[Row], gib: float) -> list[str]:
    """What whole runs with our nodes took on cards of so many GiB in all, or limited to them."""
    mine = [
        row
        for row in tables.warm([row for row in found if row["part"] == "budget"])
        if row.get("variant") == BUDGET_OURS and tables.is_size(row["case"])
    ]
    texts = []
    for row in mine:
        limit = row.get("card_gib") or round(row["card_bytes"] / 2**30)
        if limit == gib and tables.is_good(row):
            peak, took = tables.gib(row["peak_bytes"]), tables.seconds(row["seconds"])
            name = _plain(row["device"])
            texts.append(f"{tables.picture(row['case'])}: {peak}, {took} ({name})")
    return texts


def _line(line: Sequence[Row], ours: str, time: str, words: Words) -> list[str]:
    """One line of the table: ComfyUI alone and ours at one picture."""
    first, is_step = line[0], time == "step_s"
    card = _plain(first["device"])
    if first.get("card_gib") is not None:
        card = words.imitated.format(card=card, gib=first["card_gib"])
    sides, _, batch = first["case"].rpartition("x")
    picture = sides if batch == "1" else f"{sides}, {words.batch.format(batch)}"
    results = []
    for name in (HOST, ours):
        mine = [row for row in line if row.get("variant") == name]
        results.append(_result(mine, time, words))
    versions = [
        f"{title} {_plain(first[name])}"
        for name, title in VERSIONS.items()
        if first.get(name) is not None
    ]
    return [
        card,
        f"{picture} ({words.step})" if is_step else picture,
        *results,
        _same([row for row in line if row.get("variant") == ours], words),
        ", ".join([*versions, words.weights.get(str(first.get("weights")), words.not_measured)]),
    ]


def _result(mine: Sequence[Row], time: str, words: Words) -> str:
    """Peak and time, or why there are none."""
    good = [row for row in mine if tables.is_good(row)]
    if mine and not good:
        errors = [str(row.get("error")).lower() for row in mine]
        if all(error.startswith(NOT_MEASURED) for error in errors):
            return words.not_measured
        return words.out_of_memory if any(OUT_OF_MEMORY in e for e in errors) else words.failed
    is_step = time == "step_s"
    peak, took = (_median(good, field) for field in ("peak_bytes", time))
    size = tables.mib if is_step else tables.gib
    texts = [words.not_measured if peak is None else size(peak)]
    texts.append(words.not_measured if took is None else tables.seconds(took))
    return " / ".join(texts if good else [words.not_measured])


def _same(mine: Sequence[Row], words: Words) -> str:
    """How far the picture is from that of ComfyUI."""
    claims = [row["is_equal"] for row in mine if row.get("is_equal") is not None]
    if claims and all(claims):
        return words.to_the_bit
    equal, most = (_median(mine, field) for field in ("equal_8bit", "most_off_8bit"))
    if equal is None or most is None:
        return words.not_measured
    return words.close.format(tables.percent(equal), tables.number(most))


def _median(mine: Sequence[Row], field: str) -> Any:
    found = [row[field] for row in mine if row.get("error") is None and row.get(field) is not None]
    return statistics.median(found) if found else None


def _plain(text: Any) -> str:
    return tables.without_pipes(str(text))
