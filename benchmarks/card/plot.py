"""One plot of a campaign: peak by picture, ComfyUI beside ours, weights included.

Whole runs as the driver sees them, on the card as it is and on imitated ones; beside them sampling
steps where ComfyUI loads by estimate, since torch's allocated bytes hold the weights only there.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pack.nodes.units import GIB

from . import rows, tables
from .report import BUDGET_OURS, DENOISER_OURS, PLOT_NAME, REHEARSAL
from .rows import Row
from .tables import HOST

# Okabe and Ito's colours, told apart by the colour-blind; hatches for prints without colour.
STYLES = {
    HOST: ("#595959", ""),
    BUDGET_OURS: ("#0072B2", "//"),
    f"{BUDGET_OURS} smallest": ("#56B4E9", ".."),
    DENOISER_OURS: ("#E69F00", "\\\\"),
}
BAR = 0.8  # of the room of a picture
LEAST_BARS = 7  # what a chart's title needs


class Bar(NamedTuple):
    """The peaks of one variant: the medians by picture; a word where it has failed."""

    variant: str
    bytes: list[float | None]
    words: list[str]


class Panel(NamedTuple):
    """One of the plot's charts."""

    title: str
    pictures: list[str]
    bars: list[Bar]


def draw(folder: Path) -> Path | None:
    """Writes the plot of a campaign's rows into its folder.

    Returns:
        Its path; None, with one line in the log, without matplotlib or without peaks of a card.
    """
    found = rows.read(folder / "rows.jsonl")
    setups = tables.setups(found)
    drawn = panels([row for row in found if row["setup"] == len(setups)]) if setups else []
    if not drawn:
        logging.getLogger(__name__).info("No plot: no row has a card's peak.")
        return None
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as pyplot
    except ImportError:
        logging.getLogger(__name__).warning("No plot: matplotlib is not installed.")
        return None
    counts = [max(len(panel.pictures) * len(panel.bars), LEAST_BARS) for panel in drawn]
    size = (min(16.0, 2.6 * len(drawn) + 0.62 * sum(counts)), 5.4)
    figure, axes = pyplot.subplots(
        1, len(drawn), figsize=size, squeeze=False, layout="constrained", sharey=True,
        gridspec_kw={"width_ratios": counts},
    )  # fmt: skip
    for axis, panel in zip(axes[0], drawn, strict=True):
        _draw_panel(axis, panel)
    axes[0][0].set_ylabel("peak, weights included (GiB)")
    handles = {
        label: handle
        for axis in axes[0]
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles.keys(), loc="outside upper left", ncols=4, frameon=False,
        title=f"Peak of memory on the card, {HOST} alone and with this pack",
        title_fontproperties={"size": 13}, alignment="left",
    )  # fmt: skip
    figure.supxlabel(caption(setups[-1]), fontsize=9, color="#404040")
    path = folder / PLOT_NAME
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path


def panels(found: Sequence[Row]) -> list[Panel]:
    """What there is to draw of one setup's rows."""
    runs = tables.warm([row for row in found if row.get("part") == "budget"])
    steps = [
        row
        for row in found
        if row.get("part") == "denoiser" and row.get("mode") == "loading by estimate"
    ]
    made = [
        _panel("Whole runs, text to picture, as the driver sees them\n"
               "(on N GiB: another process held the rest of the card)", runs, "peak_bytes"),
        _panel("Sampling steps,\ntorch's allocated bytes\n(loading by estimate)",
               steps, "allocated_bytes"),
    ]  # fmt: skip
    return [panel for panel in made if panel is not None]


def _panel(title: str, found: Sequence[Row], field: str) -> Panel | None:
    chosen = [row for row in found if row.get("variant") in STYLES and tables.is_size(row["case"])]
    if not any(tables.is_good(row) and row.get(field) for row in chosen):
        return None
    ordered = sorted({_key(row) for row in chosen}, key=lambda key: tables.size_order(*key))
    bars = []
    for variant in STYLES:
        heights: list[float | None] = []
        words: list[str] = []
        for key in ordered:
            mine = [row for row in chosen if row["variant"] == variant and _key(row) == key]
            good = [row[field] for row in mine if tables.is_good(row) and row.get(field)]
            heights.append(statistics.median(good) if good else None)
            words.append(tables.failures(mine).split(",")[0])
        if any(row["variant"] == variant for row in chosen):
            bars.append(Bar(variant, heights, words))
    return Panel(title, [_label(key) for key in ordered], bars)


def _key(row: Row) -> tuple[Any, ...]:
    return row["case"], row.get("card_gib")


def _label(key: tuple[Any, ...]) -> str:
    case, card_gib = key
    return tables.picture(case) + ("" if card_gib is None else f"\non {card_gib:g} GiB")


def _draw_panel(axis: Any, panel: Panel) -> None:
    width = BAR / len(panel.bars)
    for index, bar in enumerate(panel.bars):
        colour, hatch = STYLES[bar.variant]
        shift = (index + 0.5) * width - BAR / 2
        places = [position + shift for position in range(len(panel.pictures))]
        heights = [(value or 0) / GIB for value in bar.bytes]
        axis.bar(
            places, heights, width * 0.92, label=bar.variant, color=colour, hatch=hatch,
            edgecolor="white", linewidth=0.6,
        )  # fmt: skip
        for place, value, word in zip(places, bar.bytes, bar.words, strict=True):
            is_there = value is not None
            text = f"{value / GIB:.1f}" if value is not None else word
            axis.annotate(
                text, (place, (value or 0) / GIB), (0, 3), textcoords="offset points",
                ha="center", va="bottom", fontsize=8, rotation=0 if is_there else 90,
                color="black" if is_there else colour,
            )  # fmt: skip
    axis.set_xticks(range(len(panel.pictures)), panel.pictures, fontsize=9)
    axis.margins(y=0.1)
    axis.set_title(panel.title, fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#d9d9d9", linewidth=0.6)
    axis.set_axisbelow(True)


def caption(setup: Row) -> str:
    """The card in one line, the versions in the next."""
    known = {
        name: f"{title} {setup[name]}"
        for name, title in tables.FACTS.items()
        if setup[name] is not None
    }
    known["device"], known["weights"] = str(setup["device"]), f"{setup['weights']} weights"
    if setup["card_bytes"]:
        known["card_bytes"] = tables.gib(setup["card_bytes"])
    lines = (
        ("device", "card_bytes", "driver"),
        ("comfyui", "torch", "comfy_aimdo", "pack", "weights"),
    )
    said = "\n".join(", ".join(known[name] for name in line if name in known) for line in lines)
    return f"{REHEARSAL}\n{said}" if setup["rehearsal"] else said
