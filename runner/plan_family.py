"""The denoise row of another family: as words, as JSON and as bars. Standard library only."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from ..nodes.denoiser import families, unet_peak
from ..nodes.denoiser.plan import DenoiserChoice
from ..nodes.prefer import PREFERENCES, Prefer
from ..nodes.units import size
from .bars import Bar, Bars, Group
from .svg import Theme

# What the plan of a family, which is of its activations alone, does not have.
Z_IMAGE_ONLY = ("vram", "weights", "copy_gbs", "controlnet", "img2img")
FamilyRequest = unet_peak.UNetRequest | families.FamilyRequest


@dataclass(frozen=True)
class Way:
    """One way to compute the denoiser; prefer None: ComfyUI's own, which is not cut.

    peak_bytes: of activations in one call, weights excluded.
    """

    prefer: str | None
    peak_bytes: int
    groups: int | None = None
    chunk_tokens: int | None = None
    feed_tokens: int | None = None

    @property
    def name(self) -> str:
        return self.prefer or "ComfyUI alone"


@dataclass(frozen=True)
class FamilyPlan:
    """What the denoiser of a family holds, by prefer.

    shape: of the picture or video, in words.
    prefer: the one that was asked for.
    """

    request: FamilyRequest
    shape: str
    text_tokens: int
    prefer: str
    ways: tuple[Way, ...]

    def text(self) -> str:
        lines = [
            f"{self._title}, {self.text_tokens} text tokens, bfloat16",
            "Modelled peak of activations of one call, weights excluded; U, one residual stream, "
            f"is {size(self.request.stream_bytes)}.",
            "",
            "| denoise | peak | in U | head groups | chunk | feed-forward chunk |",
            "|---|---|---|---|---|---|",
            *map(self._row, self.ways),
        ]
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        return {
            "family": self.request.family.name,
            "shape": self.shape,
            "text_tokens": self.text_tokens,
            "prefer": self.prefer,
            "stream_bytes": self.request.stream_bytes,
            "ways": [
                {
                    "name": way.name,
                    "prefer": way.prefer,
                    "activation_peak_bytes": way.peak_bytes,
                    "head_groups": way.groups,
                    "chunk_tokens": way.chunk_tokens,
                    "feed_forward_chunk_tokens": way.feed_tokens,
                }
                for way in self.ways
            ],
            "notes": ["Activations of one call by formula, bfloat16, weights excluded."],
        }

    def chart(self, theme: Theme | None = None) -> str:
        bars = tuple(
            Bar(way.name, {"activations": way.peak_bytes}, size(way.peak_bytes))
            for way in self.ways
        )
        least = self.ways[0].peak_bytes / min(way.peak_bytes for way in self.ways)
        return Bars(
            title=self._title,
            subtitle=f"One call while sampling holds {least:.1f} times less with the smallest "
            "settings than with ComfyUI alone",
            groups=(Group("denoise", "by prefer of Apply Gradient Checkpoint", bars),),
            notes=(
                f"Predicted by formula, not measured on a card; {self.text_tokens} text tokens, "
                "bfloat16, weights excluded.",
            ),
        ).svg(theme)

    @property
    def _title(self) -> str:
        return f"{self.request.family.name}, {self.shape}"

    def _row(self, way: Way) -> str:
        name = f"**{way.name}**" if way.prefer == self.prefer else way.name
        in_streams = f"{way.peak_bytes / self.request.stream_bytes:.1f}"
        cuts = (way.groups, way.chunk_tokens, way.feed_tokens)
        told = (
            ["-"] * 3
            if way.prefer is None
            else [f"{cuts[0]}", *(f"{tokens} tokens" for tokens in cuts[1:])]
        )
        return f"| {name} | {size(way.peak_bytes)} | {in_streams} | {' | '.join(told)} |"


def family_plan(options: argparse.Namespace) -> FamilyPlan:
    """The plan that the options of `run.py plan --family` name.

    Raises:
        ValueError: an option that the family does not have.
    """
    if any(getattr(options, name) for name in Z_IMAGE_ONLY):
        *names, last = (f"--{name.replace('_', '-')}" for name in Z_IMAGE_ONLY)
        raise ValueError(
            f"{', '.join(names)} and {last} are planned for Z-Image alone: leave them out"
        )
    size_px, samples = (options.width, options.height), {"batch": options.batch}
    samples["text_tokens"] = options.text_tokens
    if options.family in unet_peak.UNETS:
        if options.frames > 1 or options.references:
            raise ValueError("--frames and --references must be left out for a U-Net")
        unet = unet_peak.UNetRequest(unet_peak.UNETS[options.family], *size_px, **samples)
        stock_bytes = unet_peak.unet_stock_bytes(unet)
        request: FamilyRequest = unet
    else:
        of_family = families.FamilyRequest(
            families.FAMILIES[options.family],
            *size_px,
            frames=options.frames,
            references=options.references,
            **samples,
        )
        stock_bytes, request = families.family_stock_bytes(of_family), of_family
    shape = f"{options.width}x{options.height}, batch {options.batch}"
    if options.frames > 1:
        shape += f", {options.frames} frames"
    if options.references:
        shape += f", {options.references} references"
    ways = Way(None, stock_bytes), *(_way(request, prefer) for prefer in PREFERENCES)
    return FamilyPlan(request, shape, options.text_tokens, options.prefer, ways)


def _way(request: FamilyRequest, prefer: Prefer) -> Way:
    plan = request.plan(DenoiserChoice(prefer))
    if isinstance(request, unet_peak.UNetRequest):
        peak_bytes = unet_peak.unet_peak_bytes(request, DenoiserChoice(prefer))
    else:
        peak_bytes = families.family_peak_bytes(request, plan)
    return Way(prefer, peak_bytes, plan.groups, plan.chunk_tokens, plan.feed_tokens)
