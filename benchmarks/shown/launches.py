"""The tables and plots of `launches`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pack.nodes.denoiser.cost import CARDS
from pack.nodes.units import MIB, size

from ..card.tables import grid
from ..rows import Row

HOST = "ComfyUI"
PREFERENCES = ("speed", "balance", "smallest")
SLICED = "Slice auto"
SETTINGS = (HOST, *PREFERENCES, SLICED)
PARTS = ("denoiser", "decode", "encode")
PLOTTED_PX = (1024, 2048)
PLOTS = {"denoiser": "Z-Image: one main block", "decode": "VAE decode"}


def tables(rows: Sequence[Row]) -> dict[str, str]:
    """By block; only of parts that have rows. A line for each size and setting."""
    made = {}
    for part in PARTS:
        mine = [row for row in rows if row["part"] == part]
        if mine:
            mine.sort(key=lambda row: (row["side_px"], SETTINGS.index(row["setting"])))
            made[f"launches_{part}"] = _table(part, mine)
    return made


def _table(part: str, rows: Sequence[Row]) -> str:
    """Modelled times are multiples of the host's."""
    is_block = part == "denoiser"
    heads = [
        f"{part}, setting", "launches",
        *([] if is_block else ["host waits", "shapes of convolutions"]), "moved",
        *([] if is_block else ["copied to or from RAM"]), "peak", "to issue",
        *(f"modelled, {card.name}" for card in CARDS),
    ]  # fmt: skip
    hosts = {row["side_px"]: row for row in rows if row["setting"] == HOST}
    body = []
    for row in rows:
        host = hosts.get(row["side_px"])
        body.append([
            f"{row['side_px']}x{row['side_px']}, {row['setting']}", f"{row['launches']:,}",
            *([] if is_block else [f"{row['host_waits']:,}", f"{row['convolutions']}"]),
            size(row["moved_bytes"]), *([] if is_block else [size(row["copied_bytes"])]),
            size(row["peak_bytes"]), _issued(row),
            *(_modelled(row, host, card.name) for card in CARDS),
        ])  # fmt: skip
    return grid(heads, body)


def _issued(row: Row) -> str:
    if "issue_s" not in row:
        return "not measured"
    return f"{row['issue_s'] * 1e3:.2f} ms, {row['issue_ratio']:.2f}x"


def _modelled(row: Row, host: Row | None, card: str) -> str:
    seconds = row["modelled_s"][card]
    if host is None or row is host:
        return f"{seconds * 1e3:.1f} ms"
    return f"{seconds / host['modelled_s'][card]:.2f}x"


def draw(rows: Sequence[Row], folder: Path) -> None:
    """Peak against launches, a picture for the denoiser and one for the decode."""
    for part, title in PLOTS.items():
        points = [row for row in rows if row["part"] == f"{part}-plot"]
        ringed = [row for row in rows if row["part"] == part]
        if points:
            _plot(points, ringed, folder / f"launches_{part}.png", title)


def _plot(points: Sequence[Row], ringed: Sequence[Row], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, both = pyplot.subplots(1, len(PLOTTED_PX), figsize=(11, 4.5))
    for axes, side in zip(both, PLOTTED_PX, strict=True):
        mine = [row for row in points if row["side_px"] == side]
        for line in dict.fromkeys(row["line"] for row in mine):
            axes.plot(*_at([row for row in mine if row["line"] == line]), "o-", ms=3, lw=0.8,
                      label=line)  # fmt: skip
        for row in ringed:
            if row["side_px"] == side and row["setting"] in (HOST, *PREFERENCES):
                (launches,), (peak,) = _at([row])
                axes.plot(launches, peak, "o", ms=10, mfc="none", mec="k")
                axes.annotate(
                    row["setting"], (launches, peak), xytext=(7, 6), textcoords="offset points",
                    fontsize=8,
                )  # fmt: skip
        axes.set(xscale="log", yscale="log", xlabel="launches", title=f"{side}x{side}")
        for formats in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            formats(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "1235" else "")
        axes.margins(0.12)
        axes.grid(alpha=0.3, which="both")
    both[0].set_ylabel("peak, MiB")
    both[-1].legend(fontsize=8)
    figure.suptitle(f"{title}, bfloat16: peak against launches (ringed: ComfyUI and `prefer`)")
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _at(rows: Sequence[Row]) -> tuple[list[Any], list[float]]:
    return [row["launches"] for row in rows], [row["peak_bytes"] / MIB for row in rows]
