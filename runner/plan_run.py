"""The plan of a run beside the one of ComfyUI alone: as words, as JSON and as bars.

Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..nodes.denoiser.plan import denoiser_plan
from ..nodes.fit import report as fit_report
from ..nodes.fit.alone import alone
from ..nodes.fit.stage import ASSUMED_CARD, Stage
from ..nodes.fit.what_fits import Alternative, Fit
from ..nodes.units import GIB, size
from .bars import Bar, Bars, Group
from .svg import Theme

ALONE, OURS = "ComfyUI alone", "with this pack"
TILES = (
    f"{ALONE} decodes the whole picture here; on a card that is too small it falls back to tiles, "
    "which changes the picture."
)


@dataclass(frozen=True)
class RunPlan:
    """A plan, what would fit instead, and the same run on ComfyUI alone.

    budget_bytes: of the plan, which has one here.
    weights: how the transformer's are stored, in a word.
    copy_bytes_per_s: from RAM to the card, measured; None: an assumed one.
    """

    plan: Fit
    budget_bytes: int
    others: tuple[Alternative, ...]
    weights: str
    copy_bytes_per_s: float | None = None
    notes: tuple[str, ...] = ()
    stock: Fit = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "stock", alone(self.plan))

    @property
    def is_possible(self) -> bool:
        return self.plan.verdict != "too large"

    def text(self) -> str:
        return fit_report.text(
            self.plan,
            others=self.others,
            copy_bytes_per_s=self.copy_bytes_per_s,
            notes=self.notes,
        )

    def as_json(self) -> dict[str, Any]:
        plan, request, budget = self.plan, self.plan.request, self.budget_bytes
        used = denoiser_plan(request, plan.choice, fill=plan.models.fill_tokens)
        streamed = plan.stage("denoise").streamed_bytes(budget)
        speed = self.copy_bytes_per_s or ASSUMED_CARD.copy_bytes_per_s
        return {
            "width_px": request.width_px,
            "height_px": request.height_px,
            "batch": request.batch,
            "text_tokens": request.text_tokens,
            "reference_tokens": request.reference_tokens,
            "control_layers": [net.layers for net in request.controls],
            "weights": self.weights,
            "prefer": plan.prefer,
            "budget_bytes": budget,
            "verdict": plan.verdict,
            "missing_bytes": plan.missing_bytes,
            "denoiser": {
                "prefer": plan.choice.prefer,
                "head_groups": used.groups,
                "chunk_tokens": used.chunk_tokens,
                "feed_forward_chunk_tokens": used.feed_tokens,
            },
            "streamed_bytes_per_step": streamed,
            "streamed_seconds_per_step": streamed / speed,
            "copy_bytes_per_s": speed,
            "copy_speed_is_assumed": self.copy_bytes_per_s is None,
            "stages": [_stage_json(stage, budget) for stage in plan.stages],
            "comfyui_alone": {
                "verdict": self.stock.verdict,
                "missing_bytes": self.stock.missing_bytes,
                "stages": [_stage_json(s, budget) for s in self.stock.stages],
            },
            "alternatives": [
                {
                    "differs_in": other.differs_in,
                    "width_px": other.request.width_px,
                    "height_px": other.request.height_px,
                    "batch": other.request.batch,
                }
                for other in self.others
            ],
            "notes": list(self.notes),
        }

    def chart(self, theme: Theme | None = None) -> str:
        budget, request = self.budget_bytes, self.plan.request
        notes = [
            "Predicted by formula, bfloat16, not measured on a card. Weights: on the card and "
            "in buffers for streamed ones. Workspace: kept free for kernels and the allocator. "
            + TILES
        ]
        if self.others:
            notes.append(f"What would fit: {fit_report.either(self.others)}.")
        return Bars(
            title=self.title(),
            subtitle=f"Z-Image-Turbo, transformer in {self.weights}, {request.text_tokens} text "
            f"tokens, prefer {self.plan.prefer}",
            groups=tuple(
                Group(
                    ours.name,
                    f"{OURS}: {ours.setting}",
                    (_bar(ALONE, stock, budget), _bar(OURS, ours, budget)),
                )
                for stock, ours in zip(self.stock.stages, self.plan.stages, strict=True)
            ),
            notes=tuple(notes),
            budget_bytes=budget,
            budget_words=f"{_budget(budget)} free",
        ).svg(theme)

    def title(self) -> str:
        """The picture and the verdicts, in one line."""
        request, plan = self.plan.request, self.plan
        picture = f"{request.width_px}x{request.height_px}"
        if request.batch > 1:
            picture += f", batch {request.batch},"
        words = {"fits": "fits in", "tight": "is tight in", "too large": "does not fit in"}
        said = f"{picture} {words[plan.verdict]} {_budget(self.budget_bytes)}"
        if plan.verdict == "too large":
            return f"{said}: {size(plan.missing_bytes)} short"
        if plan.verdict == "tight":
            return f"{said}: {size(plan.missing_bytes)} short of the workspaces"
        if self.stock.verdict == "fits":
            return f"{said}, with {ALONE} too"
        return f"{said}; {ALONE} is {size(self.stock.missing_bytes)} short"


def _budget(count: int) -> str:
    """As it was typed, up to two decimals."""
    if count < GIB // 100:
        return size(count)
    return f"{count / GIB:.2f}".rstrip("0").rstrip(".") + " GiB"


def _bar(name: str, stage: Stage, budget: int) -> Bar:
    words = size(stage.peak_bytes(budget))
    short = stage.least_bytes - budget
    if short > 0:
        words += f": {size(short)} short"
    elif streamed := stage.streamed_bytes(budget):
        words += f", streams {size(streamed)}" + (" a step" if stage.is_repeated else "")
    parts = {
        "weights": stage.weights_on_card_bytes(budget),
        "activations": stage.activation_bytes,
        "workspace": stage.workspace_bytes,
    }
    return Bar(name, parts, words, is_over=short > 0)


def _stage_json(stage: Stage, budget: int) -> dict[str, Any]:
    return {
        "name": stage.name,
        "setting": stage.setting,
        "model_weight_bytes": stage.weight_bytes,
        "resident_weight_bytes": stage.resident_bytes(budget),
        "streamed_weight_bytes": stage.streamed_bytes(budget),
        "weights_on_card_bytes": stage.weights_on_card_bytes(budget),
        "activation_bytes": stage.activation_bytes,
        "workspace_bytes": stage.workspace_bytes,
        "peak_bytes": stage.peak_bytes(budget),
        "smallest_budget_bytes": stage.least_bytes,
        "pinned_ram_bytes": stage.ram_bytes,
    }
