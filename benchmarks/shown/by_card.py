"""The READMEs' table by the memory of a card: what Fit to VRAM plans, and what was measured."""

from __future__ import annotations

from collections.abc import Sequence

from ..card.tables import gib, grid
from ..rows import Row
from .cards import whole_runs
from .fit_table import budgets
from .vram_chart import WAYS
from .words import Words

CARDS_GIB = (4, 6, 8, 12, 16)
PICTURES = ((1024, 1024, 1), (2048, 2048, 1))


def section(
    fit_rows: Sequence[Row], square_rows: Sequence[Row], card_rows: Sequence[Row], words: Words
) -> str:
    """A line per card.

    Args:
        fit_rows: of `fit_table`.
        square_rows: of `vram_chart`.
        card_rows: of all cards.

    Raises:
        ValueError: there are no rows of a script for a card.
    """
    planned, body = budgets(fit_rows), []
    squares = {row["card_gib"]: row for row in square_rows if "card_gib" in row}
    for card_gib in CARDS_GIB:
        for name, found in (("fit_table", planned), ("vram_chart", squares)):
            if card_gib not in found:
                raise ValueError(f"no rows of {name} for {card_gib} GiB")
        pictures, _ = planned[card_gib]
        by_size = {(row["width_px"], row["height_px"], row["batch"]): row for row in pictures}
        measured = whole_runs(card_rows, card_gib) or [words.not_measured]
        body.append([
            f"{card_gib} GiB", *(f"{squares[card_gib][f'{way}_largest_px']} px" for way in WAYS),
            *(_streamed(by_size[size], words) for size in PICTURES), "; ".join(measured),
        ])  # fmt: skip
    rate = next(row["copy_bytes_per_s"] for row in fit_rows if "copy_bytes_per_s" in row) / 1e9
    return f"{words.by_card_intro.format(rate=rate)}\n\n{grid(words.by_card, body)}"


def _streamed(row: Row, words: Words) -> str:
    if row["verdict"] != "fits":
        return words.verdicts[row["verdict"]]
    if not row["streamed_bytes"]:
        return words.nothing_streamed
    return f"{gib(row['streamed_bytes'])}, {row['streamed_seconds']:.2f} s"
