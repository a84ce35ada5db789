"""What Fit to VRAM plans for cards of several sizes, by its formulas alone.

    python run.py bench fit_table

Nothing is run: neither a host nor a GPU is needed. Peaks on a card, what ComfyUI alone can do on
it, and times are not measured by this.
"""

from __future__ import annotations

from bisect import bisect
from dataclasses import replace
from typing import Any

from pack.nodes.denoiser.sizes import Request
from pack.nodes.fit.stages import Models, published_models
from pack.nodes.fit.what_fits import STEP_PX, fit
from pack.nodes.units import GIB

from .rows import RESULTS_DIR, write

RESULTS = RESULTS_DIR / "fit_table.jsonl"
BUDGETS_GIB = (4, 6, 8, 12, 16, 24)
PICTURES = ((1024, 1024, 1), (512, 512, 4), (2048, 2048, 1), (4096, 4096, 1))
TEXT_TOKENS = 256
# How far is searched.
LARGEST_PX, LARGEST_BATCH = 8192, 64


def largest_square(models: Models, budget_bytes: int, *, text_tokens: int = TEXT_TOKENS) -> int:
    """Side in pixels of the largest square picture that fits with the smallest settings, or 0."""

    def is_too_large(side: int) -> bool:
        request = Request(side, side, 1, text_tokens)
        return fit(models, request, budget_bytes, prefer="smallest").verdict != "fits"

    sides = range(STEP_PX, LARGEST_PX + 1, STEP_PX)
    return STEP_PX * bisect(sides, False, key=is_too_large)


def largest_batch(models: Models, request: Request, budget_bytes: int) -> int:
    """The largest batch of such pictures that fits with the smallest settings, or 0."""

    def is_too_large(count: int) -> bool:
        asked = replace(request, batch=count)
        return fit(models, asked, budget_bytes, prefer="smallest").verdict != "fits"

    return bisect(range(1, LARGEST_BATCH + 1), False, key=is_too_large)


def rows() -> list[dict[str, Any]]:
    """One row per budget and picture, and one per budget with the largest."""
    models, made = published_models(), []
    for gib in BUDGETS_GIB:
        budget = gib * GIB
        for width, height, batch in PICTURES:
            request = Request(width, height, batch, TEXT_TOKENS)
            plan = fit(models, request, budget)
            stage = plan.stage("denoise")
            made.append({
                "budget_gib": gib, "width_px": width, "height_px": height, "batch": batch,
                "text_tokens": TEXT_TOKENS, "prefer": plan.prefer, "verdict": plan.verdict,
                "settings": [s.setting for s in plan.stages],
                "peaks_bytes": [s.peak_bytes(budget) for s in plan.stages],
                "streamed_bytes": stage.streamed_bytes(budget),
            })  # fmt: skip
        made.append({
            "budget_gib": gib,
            "largest_square_px": largest_square(models, budget, text_tokens=TEXT_TOKENS),
            "largest_batch": largest_batch(
                models, Request(1024, 1024, 1, TEXT_TOKENS), budget
            ),
        })  # fmt: skip
    return made


def table(made: list[dict[str, Any]]) -> str:
    """Markdown: a line per budget."""
    heads = [f"{w}x{h}" + (f", batch {b}" if b > 1 else "") for w, h, b in PICTURES]
    columns = [*heads, "largest square", "largest batch of 1024x1024"]
    lines = [f"| budget | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for gib in BUDGETS_GIB:
        of_budget = [row for row in made if row["budget_gib"] == gib]
        cells = []
        for row in of_budget[:-1]:
            streamed = row["streamed_bytes"]
            cell = f"{streamed / GIB:.2f} GiB" if streamed else "0"
            cells.append(cell if row["verdict"] == "fits" else row["verdict"])
        side, batch = of_budget[-1]["largest_square_px"], of_budget[-1]["largest_batch"]
        cells.append(f"{side} px" if side < LARGEST_PX else f"{side} px or more")
        cells.append(f"{batch}" if batch < LARGEST_BATCH else f"{batch} or more")
        lines.append(f"| {gib} GiB | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    made = rows()
    write(RESULTS, made)
    print(
        f"Weights streamed from RAM in each step, as planned (prefer balance; bfloat16, "
        f"{TEXT_TOKENS} text tokens), and the largest that fits (prefer smallest).\n"
    )
    print(table(made))


if __name__ == "__main__":
    main()
