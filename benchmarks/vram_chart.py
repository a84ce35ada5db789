"""VRAM that a whole run needs by picture size, ComfyUI alone and with the pack: the README's chart.

    python run.py bench vram_chart

By the formulas of the plan alone: neither a host nor a GPU is needed. Whole runs that were measured
on a card limited to so many GiB (benchmarks/results/cards) are drawn as points.
"""

from __future__ import annotations

from pathlib import Path

from pack.nodes.denoiser.sizes import Request
from pack.nodes.fit.alone import alone, least_stage
from pack.nodes.fit.stages import Models, published_models
from pack.nodes.fit.what_fits import STEP_PX, fit, largest
from pack.nodes.prefer import Prefer
from pack.nodes.units import GIB
from pack.runner.setup import DEFAULT_HOST

from .card import tables
from .card.job import picture
from .card.report import BUDGET_OURS
from .rows import PICTURES_DIR, REPO, RESULTS_DIR, Row, write
from .shown import cards
from .shown import vram_chart as shown
from .shown.fit_table import LARGEST_PX

RESULTS = RESULTS_DIR / "vram_chart.jsonl"
CARDS = REPO / "benchmarks" / "results" / "cards"
CARDS_GIB = (4, 6, 8, 12, 16, 24)
FIRST_PX, LAST_PX, STEP = 512, 4608, 64
TEXT_TOKENS = 256
KNOWN = {"dtype": "bfloat16", "device": "by formula", "host": DEFAULT_HOST}
PREFER: dict[str, Prefer | None] = {"alone": None, "balance": "balance", "smallest": "smallest"}
WAYS = tuple(PREFER)


def least_bytes(models: Models, side_px: int, way: str) -> int:
    """The smallest card on which a run fits when weights are streamed from RAM.

    Args:
        way: ComfyUI alone, or all our nodes with that preference.
    """
    request = Request(side_px, side_px, 1, TEXT_TOKENS)
    return least_stage(models, request, PREFER[way]).least_bytes


def resident_bytes(models: Models, side_px: int, way: str) -> int:
    """The smallest card in which each stage has all its weights on the card."""
    plan = fit(models, Request(side_px, side_px, 1, TEXT_TOKENS), None)
    stages = (alone(plan) if way == "alone" else plan).stages
    return max(stage.peak_bytes(None) for stage in stages)


def largest_px(models: Models, budget_bytes: int, way: str) -> int:
    """Side in pixels of the largest square picture whose run fits, or 0."""

    def fits(steps: int) -> bool:
        return least_bytes(models, steps * STEP_PX, way) <= budget_bytes

    return STEP_PX * largest(LARGEST_PX // STEP_PX, fits)


def rows(folder: Path = CARDS) -> list[Row]:
    """A row for each size, one for each card, and one for each run that a card has measured."""
    models = published_models()
    made: list[Row] = [
        {
            "side_px": side, "text_tokens": TEXT_TOKENS, **KNOWN,
            **{f"{way}_least_bytes": least_bytes(models, side, way) for way in WAYS},
            **{f"{way}_resident_bytes": resident_bytes(models, side, way) for way in WAYS[:2]},
        }
        for side in range(FIRST_PX, LAST_PX + 1, STEP)
    ]  # fmt: skip
    for gib in CARDS_GIB:
        sides = {f"{way}_largest_px": largest_px(models, gib * GIB, way) for way in WAYS}
        made.append({"card_gib": gib, "text_tokens": TEXT_TOKENS, **KNOWN, **sides})
    return made + measured(folder)


def measured(folder: Path) -> list[Row]:
    """Whether runs on cards of so many GiB made whole square pictures of one; warm rounds."""
    found = []
    for row in tables.warm(cards.load(folder)):
        is_ours = row.get("variant") == BUDGET_OURS
        is_run = row["part"] == "budget" and tables.is_size(row["case"])
        if not is_run or row["card_gib"] is None or not (is_ours or row["variant"] == tables.HOST):
            continue
        size = picture(row["case"])
        if size.batch == 1 and size.width_px == size.height_px:
            found.append({
                "measured_on": row["device"], "on_gib": row["card_gib"],
                "way": "balance" if is_ours else "alone", "measured_px": size.width_px,
                "is_whole": tables.is_good(row) and "tiles" not in (row.get("note") or ""),
            })  # fmt: skip
    return found


def main() -> None:
    made = rows()
    write(RESULTS, made)
    PICTURES_DIR.mkdir(parents=True, exist_ok=True)
    for name, text in shown.charts(made).items():
        (PICTURES_DIR / name).write_text(text, encoding="utf-8", newline="\n")
    print(
        "Largest square picture on a card, and the smallest card for a picture: a whole run, its "
        f"weights streamed from RAM. Predicted by formula, bfloat16, {TEXT_TOKENS} text tokens.\n"
    )
    print(*shown.tables(made).values(), sep="\n", end="")


if __name__ == "__main__":
    main()
