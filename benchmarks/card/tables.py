"""Tables by declaration: what tells their lines apart and how each column comes from the rows.

A line is all rows that agree in the key columns. Rounds are paired: the host and ours ran one after
the other, so a ratio is taken within one round of one run, and the median afterwards. Standard
library only.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .rows import NOT_MEASURED, OUT_OF_MEMORY, Row, without_paths

HOST = "ComfyUI"  # equals variants.HOST, which needs torch
# How the variants begin that are not ours; the cells of ours are bold where they save nothing.
NOT_OURS = (HOST, "VAEDecodeTiled", "VAEEncodeTiled", "torch.utils.checkpoint")
RATIOS = {"peak_bytes": "peak", "seconds": "time", "step_s": "time", "kernels": "kernels"}
NO_PAIR = "-"
Show = Callable[[Any], str]
# What must agree for two rows to be compared; a setup is one value of each.
FACTS = {
    "device": "card", "card_bytes": "memory", "driver": "driver", "system": "system",
    "pack": "this pack", "torch": "torch", "comfyui": "ComfyUI", "comfy_aimdo": "comfy-aimdo",
    "comfy_kitchen": "comfy-kitchen", "weights": "weights", "rehearsal": "rehearsal",
}  # fmt: skip


def mib(value: float, digits: int = 1) -> str:
    return f"{value / 2**20:.{digits}f} MiB"


def gib(value: float) -> str:
    return f"{value / 2**30:.2f} GiB"


def seconds(value: float) -> str:
    return f"{value * 1e3:.3g} ms" if abs(value) < 0.1 else f"{value:.3g} s"


def times(value: float) -> str:
    return f"{value:.2f}x"


def percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def number(value: float) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if 1e3 <= abs(value) < 1e7 else f"{value:.3g}"


def decibel(value: float) -> str:
    return "equal" if value == math.inf else f"{value:.1f} dB"


def yes_no(value: bool) -> str:
    return "yes" if value else "no"


def picture(text: Any) -> str:
    """ "1024x1024x1 fp8" as "1024x1024 fp8", and a batch of four as "512x512, batch 4"."""
    words = []
    for word in str(text).split():
        sides = word.split("x")
        if len(sides) == 3 and all(side.isdecimal() for side in sides):
            word = "x".join(sides[:2]) + (f", batch {sides[2]}" if sides[2] != "1" else "")
        words.append(word)
    return " ".join(words)


def is_size(case: str) -> bool:
    """Whether a case is a picture alone, not also other weights, launches or probes."""
    return " " not in case


def size_order(case: str, card_gib: float | None = None) -> tuple[float, str, float]:
    """Sorts by pixels, then the card as it is before imitated ones, the largest first."""
    sides = [int(side) for side in case.split(" ")[0].split("x") if side.isdecimal()]
    return math.prod(sides), case, -math.inf if card_gib is None else -card_gib


@dataclass(frozen=True)
class Column:
    """A column of a table.

    title: its head.
    of: the field of a row, or what makes the value from a row; None means not measured.
    show: one value as text.
    is_ratio: the value over that of ComfyUI in the same round.
    bold_from: from here on ComfyUI is equal or better, and the cell is bold.
    empty: stands for None.
    of_failed: holds for rows with an error too.
    """

    title: str
    of: str | Callable[[Row], Any]
    show: Show = number
    is_ratio: bool = False
    bold_from: float = math.inf
    empty: str = NOT_MEASURED
    of_failed: bool = False

    def value(self, row: Row) -> Any:
        return row.get(self.of) if isinstance(self.of, str) else self.of(row)


def ratio(of: str, *, to: str = "ComfyUI's") -> Column:
    """The column of a figure's ratio to ComfyUI's, where less is better."""
    return Column(f"{RATIOS[of]} / {to}", of, times, is_ratio=True, bold_from=1.0, empty=NO_PAIR)


@dataclass(frozen=True)
class Table:
    """One table of one part.

    part: whose rows it shows.
    title: stands above it.
    keys: the columns that tell its lines apart.
    columns: the others.
    where: which rows of the part; all without it.
    note: one sentence under the title on how to read it.
    partner: the variant that ratios are to.
    is_latest: of the rows of a line only the last good one counts: it was worked out again.
    """

    part: str
    title: str
    keys: tuple[Column, ...]
    columns: tuple[Column, ...]
    where: Callable[[Row], bool] = lambda row: True
    note: str = ""
    partner: str = HOST
    is_latest: bool = False

    def rows(self, rows: Iterable[Row]) -> list[Row]:
        """Those of a campaign that the table shows; not the error of a leg as a whole."""
        return [
            row
            for row in rows
            if row.get("part") == self.part != row.get("case")
            and row.get("setup") is not None
            and self.where(row)
        ]


def is_good(row: Row) -> bool:
    """Whether the row is a whole measurement: no error, and what it measured came to its end."""
    return row.get("error") is None and row.get("survived") is not False


def setups(rows: Iterable[Row]) -> list[Row]:
    """The machines and versions among the rows, and marks each row with `setup`, counted from 1.

    A fact that a row does not know agrees with any; a row without a device has the setup None.
    """
    found: list[Row] = []
    for row in rows:
        row["setup"] = None
        if row.get("device") is None:
            continue
        known = {name: row.get(name) for name in FACTS}
        for index, setup in reversed(list(enumerate(found))):
            if all(None in (setup[name], known[name]) or setup[name] == known[name]
                   for name in FACTS):  # fmt: skip
                setup |= {name: value for name, value in known.items() if value is not None}
                row["setup"] = index + 1
                break
        else:
            found.append(known)
            row["setup"] = len(found)
    return found


def pair_key(row: Row) -> tuple[Any, ...]:
    """Rows of the host and of ours with the same key are compared with each other."""
    return tuple(row.get(n) for n in ("part", "leg", "setup", "run", "card_gib", "case", "round"))


def pairs(rows: Iterable[Row], partner: str = HOST) -> dict[tuple[Any, ...], Row]:
    """The good row of each round that the others are compared with."""
    return {pair_key(row): row for row in rows if row.get("variant") == partner and is_good(row)}


def values(column: Column, rows: Iterable[Row], hosts: dict[tuple[Any, ...], Row]) -> list[Any]:
    """What a column has to show of the rows of one line."""
    found = []
    for row in rows:
        value = column.value(row)
        if column.is_ratio:
            partner = hosts.get(pair_key(row)) if is_good(row) else None
            is_same = partner is not None and partner["variant"] == row.get("variant")
            base = column.value(row if is_same else partner) if partner is not None else None
            value = value / base if value is not None and base else None
        elif row.get("error") is not None and not column.of_failed:
            value = None
        if value is not None:
            found.append(value)
    return found


def shown(found: Sequence[Any], show: Show) -> str:
    """The median and the range of numbers; claims and words as they are, each once."""
    if isinstance(found[0], bool | str):
        count, words = len(found), list(dict.fromkeys(show(value) for value in found))
        if len(words) == 1:
            return words[0]
        if isinstance(found[0], str):
            return ", ".join(words)
        return f"{sum(found)} of {count}"
    middle, low, high = (show(choose(found)) for choose in (statistics.median, min, max))
    return middle if low == high else f"{middle} ({low} to {high})"


def cell(column: Column, rows: Sequence[Row], hosts: dict[tuple[Any, ...], Row]) -> str:
    """A cell of Markdown; bold where ComfyUI is equal or better."""
    found = values(column, rows, hosts)
    if not found:
        return column.empty
    text = without_pipes(shown(found, column.show))
    if column.bold_from == math.inf or str(rows[0].get("variant")).startswith(NOT_OURS):
        return text
    # As shown: 0.996 reads 1.00x, which is equal.
    return f"**{text}**" if round(statistics.median(found), 2) >= column.bold_from else text


def failures(rows: Sequence[Row]) -> str:
    """What went wrong in the rows of a line; empty where nothing did, or a later try worked."""
    good = {row.get("round") for row in rows if is_good(row)}
    bad = [row for row in rows if not is_good(row) and row.get("round") not in good]
    text = ", ".join(dict.fromkeys(_failure(row) for row in bad))
    return f"{text} ({len(bad)} of {len(rows)})" if bad and good else text


def _failure(row: Row) -> str:
    error = row.get("error")
    if error is None:
        return "did not survive"
    if error.startswith(NOT_MEASURED):
        return NOT_MEASURED
    return OUT_OF_MEMORY if OUT_OF_MEMORY in error.lower() else "failed, see Errors"


def without_pipes(text: str) -> str:
    """Fit for a cell of a table: one line, no path, no bar."""
    return without_paths(text).replace("|", "\\|")


def lines(table: Table, rows: Iterable[Row]) -> list[list[Row]]:
    """The rows of each line, by the order in which a key's values first came; ComfyUI leads."""
    orders: list[dict[Any, int]] = [{HOST: 0} for _ in table.keys]
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        key = tuple(column.value(row) for column in table.keys)
        for order, value in zip(orders, key, strict=True):
            order.setdefault(value, len(order))
        groups.setdefault(key, []).append(row)
    if table.is_latest:
        groups = {k: [r for r in group if is_good(r)][-1:] or group for k, group in groups.items()}
    ranks = {key: [o[v] for o, v in zip(orders, key, strict=True)] for key in groups}
    return [groups[key] for key in sorted(groups, key=ranks.__getitem__)]


def warm(rows: Sequence[Row]) -> list[Row]:
    """Drops each first round where later ones exist."""
    key = [tuple(row.get(n) for n in ("setup", "leg", "case", "variant")) for row in rows]
    went_on = {k for k, row in zip(key, rows, strict=True) if row.get("round")}
    return [row for k, row in zip(key, rows, strict=True) if row.get("round") or k not in went_on]


def markdown(table: Table, rows: Iterable[Row], *, hidden: Sequence[str] = ()) -> str:
    """The table without hidden keys and without columns that stay blank; "" without rows."""
    chosen = table.rows(rows)
    if not chosen:
        return ""
    hosts, groups = pairs(chosen, table.partner), lines(table, chosen)
    bad = [failures(group) for group in groups]
    keys = [column for column in table.keys if column.title not in hidden]
    columns = [c for c in table.columns if c.empty or any(cell(c, g, hosts) for g in groups)]
    head = [column.title for column in (*keys, *columns)] + ["failed"] * any(bad)
    body = [
        [without_pipes(column.show(column.value(group[0]))) for column in keys]
        + [cell(column, group, hosts) for column in columns]
        + [text or "no"] * any(bad)
        for group, text in zip(groups, bad, strict=True)
    ]
    said = f"{table.note}\n\n" if table.note else ""
    return f"{said}{grid(head, body)}"


def grid(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A table of Markdown."""
    every = [head, ["---"] * len(head), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in every)
