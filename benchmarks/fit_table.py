"""What Fit to VRAM plans for cards of several sizes, by its formulas alone: tables and a plot.

    python run.py bench fit_table

Nothing is run: neither a host nor a GPU is needed. Peaks on a card, what ComfyUI alone can do on
it, and times are not measured by this; a second table has modelled times of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pack.nodes.denoiser.cost import CARDS, seconds
from pack.nodes.denoiser.sizes import Request
from pack.nodes.fit.stage import ASSUMED_CARD
from pack.nodes.fit.stages import Models, published_models
from pack.nodes.fit.what_fits import STEP_PX, fit, largest
from pack.nodes.units import GIB

from .rows import PICTURES_DIR, RESULTS_DIR, Row, write
from .shown import fit_table as shown
from .shown.fit_table import LARGEST_BATCH, LARGEST_PX

RESULTS, PLOT = RESULTS_DIR / "fit_table.jsonl", PICTURES_DIR / "fit_table.png"
BUDGETS_GIB = (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24)
PICTURES = ((1024, 1024, 1), (512, 512, 4), (2048, 2048, 1), (4096, 4096, 1))
TEXT_TOKENS = 256


def largest_square(models: Models, budget_bytes: int, *, text_tokens: int = TEXT_TOKENS) -> int:
    """Side in pixels of the largest square picture that fits with the smallest settings, or 0."""

    def fits(steps: int) -> bool:
        request = Request(steps * STEP_PX, steps * STEP_PX, 1, text_tokens)
        return fit(models, request, budget_bytes, prefer="smallest").verdict == "fits"

    return STEP_PX * largest(LARGEST_PX // STEP_PX, fits)


def largest_batch(models: Models, request: Request, budget_bytes: int) -> int:
    """The largest batch of such pictures that fits with the smallest settings, or 0."""

    def fits(count: int) -> bool:
        asked = replace(request, batch=count)
        return fit(models, asked, budget_bytes, prefer="smallest").verdict == "fits"

    return largest(LARGEST_BATCH, fits)


def least_budget(models: Models, request: Request) -> int:
    """Bytes of the smallest budget in which the request fits."""
    return 1 + fit(models, request, 1, prefer="smallest").missing_bytes


def step_seconds(models: Models, budget_bytes: int) -> dict[str, list[float]]:
    """By card: modelled time of a step at 1024x1024, with prefetch and without."""
    made: dict[str, list[float]] = {card.name: [] for card in CARDS}
    for has_prefetch in (True, False):
        able = replace(models, has_prefetch=has_prefetch)
        plan = fit(able, Request(1024, 1024, 1, TEXT_TOKENS), budget_bytes)
        stage = plan.stage("denoise")
        streamed = stage.streamed_bytes(budget_bytes)
        for card in CARDS:
            made[card.name].append(
                seconds(stage.work, card, streamed_bytes=streamed, prefetches=stage.prefetches)
            )
    return made


def rows() -> list[Row]:
    """One row per budget and picture, one per budget with the largest, one per picture."""
    models, made = published_models(), []
    for gib in BUDGETS_GIB:
        budget = int(gib * GIB)
        for width, height, batch in PICTURES:
            plan = fit(models, Request(width, height, batch, TEXT_TOKENS), budget)
            stage = plan.stage("denoise")
            made.append({
                "budget_gib": gib, "width_px": width, "height_px": height, "batch": batch,
                "text_tokens": TEXT_TOKENS, "prefer": plan.prefer, "verdict": plan.verdict,
                "settings": [s.setting for s in plan.stages],
                "peaks_bytes": [s.peak_bytes(budget) for s in plan.stages],
                "streamed_bytes": stage.streamed_bytes(budget),
                "streamed_seconds": stage.streamed_bytes(budget) / ASSUMED_CARD.copy_bytes_per_s,
                "copy_bytes_per_s": ASSUMED_CARD.copy_bytes_per_s,
            })  # fmt: skip
        made.append({
            "budget_gib": gib,
            "step_seconds": step_seconds(models, budget),
            "largest_square_px": largest_square(models, budget),
            "largest_batch": largest_batch(
                models, Request(1024, 1024, 1, TEXT_TOKENS), budget
            ),
        })  # fmt: skip
    for width, height, batch in PICTURES:
        request = Request(width, height, batch, TEXT_TOKENS)
        made.append({
            "width_px": width, "height_px": height, "batch": batch, "text_tokens": TEXT_TOKENS,
            "least_bytes": least_budget(models, request),
        })  # fmt: skip
    return made


def draw(made: Sequence[Row], path: Path) -> None:
    """The largest square and the largest batch, a bar per budget."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    most = [row for row in made if "largest_batch" in row]
    names = [f"{row['budget_gib']:g}" for row in most]
    figure, both = pyplot.subplots(1, 2, figsize=(11, 4.2))
    panels = (
        ("largest_square_px", LARGEST_PX, "Largest square picture, side in px"),
        ("largest_batch", LARGEST_BATCH, "Largest batch of 1024x1024"),
    )
    for axes, (key, last, title) in zip(both, panels, strict=True):
        values = [row[key] for row in most]
        bars = axes.bar(names, values, color="#4c78a8")
        words = [f"{value}" if value < last else f"{value}+" for value in values]
        axes.bar_label(bars, words, fontsize=8)
        axes.set(title=title, xlabel="budget in GiB: weights, activations and workspaces")
        axes.margins(y=0.1)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.suptitle("Fit to VRAM, prefer smallest, bfloat16: planned by formula, not measured")
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main() -> None:
    made = rows()
    write(RESULTS, made)
    draw(made, PLOT)
    print(
        f"Weights streamed from RAM in each step, as planned (prefer balance; bfloat16, "
        f"{TEXT_TOKENS} text tokens), and the largest that fits (prefer smallest).\n"
    )
    tables = shown.tables(made)
    print(tables["fit_table"])
    print(
        f"Modelled time of a step at 1024x1024 (prefer balance; bfloat16, {TEXT_TOKENS} text "
        "tokens), with prefetch and without.\n"
    )
    print(tables["fit_times"], end="")


if __name__ == "__main__":
    main()
