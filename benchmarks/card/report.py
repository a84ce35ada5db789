"""The report of a campaign: report.md from rows.jsonl, and a few lines for the terminal.

Standard library only: a report can be made of rows that came from elsewhere.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import catalogue, rows, tables
from .campaign import ENDED, LEG_CASE
from .report_tables import CASE, LEG, SETUP, TABLES
from .rows import Row
from .tables import HOST, NOT_MEASURED, Table, ratio

NAME, PLOT_NAME = "report.md", "peak.png"
DENOISER_OURS, BUDGET_OURS = "Apply Gradient Checkpoint", "Fit to VRAM"
HEADS = {"vae": "VAE"}
REHEARSAL = "REHEARSAL: nothing here is a measurement of a card."


def write(folder: Path) -> str:
    """Writes report.md of the rows in a campaign's folder.

    Returns:
        A summary of a few lines for the terminal: ComfyUI alone beside ours.
    """
    found = rows.read(folder / "rows.jsonl")
    setups = tables.setups(found)
    measured = [row for row in found if row.get("case") != LEG_CASE]
    told = summary(measured, setups)
    parts = [
        header(found, setups, told),
        f"![Peak by picture]({PLOT_NAME})\n" if (folder / PLOT_NAME).exists() else "",
        course(found),
        *sections(measured, len(setups)),
        errors(found),
        without_result(found),
    ]
    text = "\n".join(part for part in parts if part)
    (folder / NAME).write_text(text, encoding="utf-8", newline="\n")
    return told


def header(found: Sequence[Row], setups: Sequence[Row], told: str) -> str:
    """The summary, what was measured on what, and how to read it."""
    said = ["# Z-Image Low VRAM, measured on a card\n"]
    if is_rehearsal(found):
        said.append(f"**{REHEARSAL}**\n")
    names = ["setup", *(str(index) for index in range(1, len(setups) + 1))]
    if setups:
        said.append(f"```text\n{told.removeprefix(REHEARSAL).strip()}\n```\n")
        body = [
            [title, *(_fact(name, setup[name]) for setup in setups)]
            for name, title in tables.FACTS.items()
        ]
        said.append(tables.grid(names if len(setups) > 1 else ["", ""], body))
    else:
        said.append("Nothing was measured.\n")
    said.append(
        f"Medians over the rounds, with their range. Ratios are to {HOST} alone in the same round; "
        f'"{tables.NO_PAIR}" where it has no result there. **Bold: {HOST} is equal or better.**\n'
    )
    if any(setup["weights"] == "random" and not setup["rehearsal"] for setup in setups):
        said.append("The random weights have the true sizes; only the picture is noise.\n")
    return "\n".join(said)


def is_rehearsal(found: Sequence[Row]) -> bool:
    return any(row.get("rehearsal") for row in found)


def _fact(name: str, value: Any) -> str:
    if value is None:
        return NOT_MEASURED
    if name == "card_bytes":
        return tables.gib(value)
    return tables.yes_no(value) if isinstance(value, bool) else tables.without_pipes(str(value))


def course(found: Sequence[Row]) -> str:
    """How each leg ran: its settings by its rows, and how it ended."""
    legs: dict[tuple[Any, Any], list[Row]] = {}
    for row in found:
        legs.setdefault((row.get("part"), row.get("leg")), []).append(row)
    if not legs:
        return ""
    body = []
    for (part, leg), group in legs.items():
        settings = [
            ", ".join(dict.fromkeys(str(row[name]) for row in group if row.get(name) is not None))
            for name in ("mode", "allocator", "attention", "dtype")
        ]
        ends = [row for row in group if row.get("case") == LEG_CASE]
        count = sum(tables.is_good(row) and row.get("case") != LEG_CASE for row in group)
        took = sum(row.get("seconds") or 0 for row in ends)
        line = [part, leg, *settings, count, ends[-1]["variant"] if ends else "cut", f"{took:.0f}"]
        body.append([tables.without_pipes(str(word)) or NOT_MEASURED for word in line])
    head = [
        "part", "leg", "weights on the card", "allocator", "attention", "dtype", "rows", "end",
        "seconds",
    ]  # fmt: skip
    return f"## How it ran\n\n{tables.grid(head, body)}"


def sections(measured: Sequence[Row], setups: int) -> list[str]:
    """The tables, in the order of the campaign; the setup is a column where there are several."""
    made, headed = [], set()
    for table in TABLES:
        text = tables.markdown(table, measured, hidden=() if setups > 1 else (SETUP.title,))
        if not text:
            continue
        head = (
            ""
            if table.part in headed
            else f"## {HEADS.get(table.part, table.part.capitalize())}\n\n"
        )
        headed.add(table.part)
        made.append(f"{head}### {table.title}\n\n{text}")
    return made


def errors(found: Sequence[Row]) -> str:
    """Each error once, with all that met it, also those that a later try has measured."""
    key = ("part", "leg", "setup", "case", "variant", "round")
    good = {tuple(row.get(name) for name in key) for row in found if tables.is_good(row)}
    met: dict[str, list[str]] = {}
    for row in found:
        if row.get("error") is not None:
            where = [str(row.get(name)) for name in ("part", "leg")]
            if row.get("case") != LEG_CASE:
                where += [tables.picture(row.get("case")), str(row.get("variant"))]
            later = " (measured later)" if tuple(row.get(name) for name in key) in good else ""
            place = ", ".join(where) + later
            met.setdefault(tables.without_pipes(row["error"]), []).append(place)
    if not met:
        return ""
    body = [[text, "; ".join(dict.fromkeys(places))] for text, places in met.items()]
    return f"## Errors\n\n{tables.grid(['error', 'where'], body)}"


def without_result(found: Sequence[Row]) -> str:
    """The legs of the campaign without a result, and what a rehearsal cannot show."""
    ran = {
        (row.get("part"), row.get("leg"))
        for row in found
        if row.get("case") != LEG_CASE and tables.is_good(row)
    }
    notes = {
        (row["part"], row["leg"]): row.get("note") or row.get("error") or row["variant"]
        for row in found
        if row.get("case") == LEG_CASE and row.get("variant") != ENDED
    }
    known = {(leg.part, leg.name): leg.title for leg in catalogue.legs()}
    known |= {key: f"{key[0]} ({key[1]})" for key in notes if key not in known}
    lines = [
        f"- {title}: {tables.without_pipes(notes.get(key, 'not started'))}\n"
        for key, title in known.items()
        if key not in ran
    ]
    text = "## Without a result\n\n" + "".join(lines) if lines else ""
    if is_rehearsal(found):
        tried = "".join(f"- {what}\n" for what in catalogue.NOT_REHEARSED)
        text += f"\n## What a rehearsal cannot try\n\n{tried}"
    return text


def summary(measured: Sequence[Row], setups: Sequence[Row]) -> str:
    """ComfyUI beside ours, denoiser and whole runs, as lines of text."""
    said = [REHEARSAL] if is_rehearsal(measured) else []
    for index, setup in enumerate(setups, 1):
        here = [row for row in measured if row.get("setup") == index]
        name = f"{setup['device']}, ComfyUI {setup['comfyui']}, torch {setup['torch']}"
        body = [[name, HOST, "ours", "ours / ComfyUI"]]
        body += _compared(here, "denoiser", DENOISER_OURS, "step_s", tables.mib)
        body += _compared(here, "budget", BUDGET_OURS, "seconds", tables.gib)
        widths = [max(len(line[column]) for line in body) for column in range(4)]
        for line in body:
            cells = (text.ljust(width) for text, width in zip(line, widths, strict=True))
            said.append("  ".join(cells).rstrip())
    count = sum(row.get("error") is not None for row in measured)
    if count:
        said.append(f"{count} {'row' if count == 1 else 'rows'} with an error, see {NAME}, Errors")
    return "\n".join(said) if said else "Nothing was measured."


def _compared(
    here: Sequence[Row], part: str, ours: str, time: str, size: Callable[[float], str]
) -> list[list[str]]:
    """A line for each picture and leg: peak and time of both, and the paired ratios."""
    table = next(table for table in TABLES if table.part == part)
    chosen = [row for row in table.rows(here) if row.get("variant") in (HOST, ours)]
    chosen = [row for row in chosen if tables.is_size(row["case"])]
    if part == "budget":
        chosen = tables.warm(chosen)
    hosts, made = tables.pairs(chosen), []
    for group in tables.lines(Table(part, "", (LEG, CASE), ()), chosen):
        texts, ratios = [], []
        for name in (HOST, ours):
            mine = [row for row in group if row.get("variant") == name]
            texts.append(_result(mine, time, size))
        for field in ("peak_bytes", time):
            mine = [row for row in group if row.get("variant") == ours]
            found = tables.values(ratio(field), mine, hosts)
            ratios.append(tables.times(statistics.median(found)) if found else tables.NO_PAIR)
        where = f"{part}, {group[0].get('leg')}, {tables.picture(group[0].get('case'))}"
        made.append([where, *texts, f"peak {ratios[0]}, time {ratios[1]}"])
    return made


def _result(mine: Sequence[Row], time: str, size: Callable[[float], str]) -> str:
    """Peak and time of a variant by its medians, or why there is none."""
    good = [row for row in mine if tables.is_good(row)]
    if not good:
        return tables.failures(mine) or NOT_MEASURED
    texts = []
    for field, show in (("peak_bytes", size), (time, tables.seconds)):
        found = [row[field] for row in good if row.get(field) is not None]
        texts.append(show(statistics.median(found)) if found else NOT_MEASURED)
    return ", ".join(texts)
