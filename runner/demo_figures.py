"""The demo's run without and with our nodes beside each other: as words and as a chart."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageChops

from ..nodes.denoiser.sizes import Request
from ..nodes.fit.alone import least_stage
from ..nodes.fit.stages import published_models
from ..nodes.prefer import Prefer
from ..nodes.units import GIB, size
from .bars import Bar, Bars, Group
from .plan_run import ALONE, TILES
from .server_watch import Watched
from .svg import Theme, stacked

WITH_FIT = "with Fit to VRAM"
# What a run needs at least depends on `prefer`.
PREDICTED: dict[str, Prefer | None] = {
    ALONE: None, "this pack, balance": "balance", "this pack, smallest": "smallest"
}  # fmt: skip
CARD_GIB = 8
SIDES_PX = (1024, 2048, 4096)
TEXT_TOKENS = 256
NOT_MEASURED = "not measured"
# The stages that are compared: a probe measures the memory of each, the node's is its time.
NODES = {"sampling": "KSampler", "decode": "VAEDecode"}
NAMES = {"sampling": "sampling", "decode": "VAE decode"}
ADDED = {
    "sampling": "tensors of one step, without weights",
    "decode": "RAM that the process gained",
}


@dataclass(frozen=True)
class Taken:
    """What one way took.

    records: of VRAM Probe, by stage.
    picture: a PNG.
    """

    watched: Watched
    records: dict[str, dict[str, Any]]
    picture: bytes

    def seconds(self, stage: str) -> float:
        return sum(row.seconds for row in self.watched.rows if row.node == NODES[stage])

    def parts(self, stage: str, *, on_card: bool) -> dict[str, int]:
        """What the peak of a stage is made of; without a card, what the stage added."""
        parts = self.records[stage]["parts_at_peak"] or {}
        return {name: n for name, n in parts.items() if on_card or name == "activations"}

    def memory(self, stage: str, *, on_card: bool) -> str:
        parts = self.parts(stage, on_card=on_card)
        if not parts:
            return NOT_MEASURED
        least = "at least " if self.records[stage]["is_at_least"] else ""
        return f"{least}{size(sum(parts.values()))}"


@dataclass(frozen=True)
class Compared:
    """One run in both ways.

    shape: size, steps and device in words.
    failed: why ComfyUI alone has no picture; "" where it has one.
    on_card: memory of the card was measured, else RAM.
    """

    shape: str
    alone: Taken | None
    ours: Taken
    on_card: bool
    failed: str = ""

    def text(self) -> str:
        """Both ways beside each other, then what a card would need."""
        what = "peak on the card" if self.on_card else "memory it adds"
        rows = [("", ALONE, WITH_FIT)]
        for stage, name in NAMES.items():
            taken = [self.alone, self.ours]
            memory = (t.memory(stage, on_card=self.on_card) if t else "failed" for t in taken)
            rows.append((f"{name}: {what}", *memory))
            times = (f"{t.seconds(stage):.1f} s" if t else "failed" for t in taken)
            rows.append((f"{name}: time", *times))
        lines = [f"The same run without and with this pack, measured here ({self.shape}):", ""]
        lines += [*columns(rows), "", f"Pictures: {self.pictures()}."]
        if self.failed:
            lines.append(f"{ALONE} has failed: {self.failed}")
        return "\n".join([*lines, *self.how(), "", predicted_text()])

    def pictures(self) -> str:
        """How far the two pictures are from each other."""
        if self.alone is None:
            return "only one was made"
        return difference(self.alone.picture, self.ours.picture)

    def how(self) -> tuple[str, ...]:
        """How the figures were measured, as sentences."""
        if self.on_card:
            return ("Peaks by VRAM Probe, weights included.", "Times are of single runs.")
        return (
            "Memory by VRAM Probe. Sampling: the tensors of one step, exact, without weights.",
            "VAE decode: what the process gained in RAM, which varies from run to run.",
            "Times are of single runs; a busy CPU changes them.",
        )

    def chart(self, theme: Theme | None = None) -> str:
        """What was measured, and below it what a card would need, as SVG."""
        groups = []
        for stage, name in NAMES.items():
            bars = []
            for way, taken in ((ALONE, self.alone), (WITH_FIT, self.ours)):
                parts = taken.parts(stage, on_card=self.on_card) if taken else {}
                words = "failed"
                if taken:
                    memory = taken.memory(stage, on_card=self.on_card)
                    words = f"{memory}, {taken.seconds(stage):.1f} s"
                bars.append(Bar(way, parts, words, is_over=taken is None))
            words = "peak on the card" if self.on_card else ADDED[stage]
            groups.append(Group(name, words, tuple(bars)))
        measured = Bars(
            title="The same run, without and with this pack",
            subtitle=f"measured here: {self.shape}",
            groups=tuple(groups),
            notes=(f"Pictures: {self.pictures()}.", " ".join(self.how())),
        )
        return stacked([measured.svg(theme), predicted_chart().svg(theme)])


def difference(first: bytes, second: bytes) -> str:
    """How far two PNGs are from each other, in words."""
    pictures = [Image.open(io.BytesIO(each)).convert("RGB") for each in (first, second)]
    if pictures[0].size != pictures[1].size:
        return "of different sizes"
    counts = ImageChops.difference(*pictures).histogram()  # 256 for each channel
    off = [sum(counts[step::256]) for step in range(256)]
    if off[0] == sum(off):
        return "equal, every pixel"
    most = max(step for step, count in enumerate(off) if count)
    share = f"{100 * off[0] / sum(off):.2f} % of"
    if share.startswith("100.00"):  # rounded up
        share = f"all but {sum(off) - off[0]} of {sum(off)}"
    return f"{share} 8-bit values equal, largest difference {most}"


def predicted() -> list[tuple[str, list[tuple[str, Any]]]]:
    """By picture: the stage that needs the most VRAM, in each way of `PREDICTED`."""
    models, made = published_models(), []
    for side in SIDES_PX:
        request = Request(side, side, 1, TEXT_TOKENS)
        ways = [(way, least_stage(models, request, prefer)) for way, prefer in PREDICTED.items()]
        made.append((f"{side}x{side}", ways))
    return made


def predicted_text() -> str:
    """What a card would need, as a table."""
    rows = [("least VRAM for a whole run", *PREDICTED)]
    for picture, ways in predicted():
        needs = (stage.least_bytes for _, stage in ways)
        told = (size(n) + (", too much" if n > CARD_GIB * GIB else "") for n in needs)
        rows.append((picture, *told))
    return "\n".join([
        f"Predicted for an {CARD_GIB} GiB card (Z-Image-Turbo in bf16, {TEXT_TOKENS} text tokens,",
        "weights that do not fit streamed from RAM; by formula, not measured on a card):",
        "", *columns(rows), "",
        f"Yours: python run.py plan --width 2048 --height 2048 --vram {CARD_GIB}",
    ])  # fmt: skip


def predicted_chart() -> Bars:
    """What a card would need, as bars."""
    groups = []
    for picture, ways in predicted():
        bars = []
        for way, stage in ways:
            short = stage.least_bytes - CARD_GIB * GIB
            words = size(stage.least_bytes) + (f": {size(short)} short" if short > 0 else "")
            parts = {
                "weights": min(stage.buffer_bytes, stage.weight_bytes),
                "activations": stage.activation_bytes,
                "workspace": stage.workspace_bytes,
            }
            bars.append(Bar(way, parts, words, is_over=short > 0))
        most = " and ".join(dict.fromkeys(stage.name for _, stage in ways))
        groups.append(Group(picture, f"most in: {most}", tuple(bars)))
    return Bars(
        title=f"Larger pictures on an {CARD_GIB} GiB card",
        subtitle="predicted by formula: the least VRAM for a whole run of Z-Image-Turbo",
        groups=tuple(groups),
        notes=(
            f"bfloat16, {TEXT_TOKENS} text tokens, weights that do not fit streamed from RAM, "
            "balance is the default, smallest is slower; Fit to VRAM takes it by itself where it "
            f"must; not measured on a card. {TILES}",
        ),
        budget_bytes=CARD_GIB * GIB,
        budget_words=f"{CARD_GIB} GiB card",
    )


def columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows as text, the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        row[0].ljust(widths[0])
        + "".join(f"   {cell:>{w}}" for cell, w in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]
