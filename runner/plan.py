"""`run.py plan`: what a picture needs on a card of so many GiB, by the pack's own formulas.

Standard library only: neither a host nor a GPU nor weights are needed.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from ..nodes.denoiser import families, need, sizes, unet_peak
from ..nodes.fit import report as fit_report
from ..nodes.fit import stages, what_fits
from ..nodes.prefer import PREFERENCES
from ..nodes.units import GIB, size
from .arguments import above_zero, positive
from .plan_family import FamilyPlan, family_plan
from .plan_run import RunPlan

# Bits per weight of the transformer; nvfp4 keeps one byte of scale for 16 weights.
WEIGHT_BITS = {"bf16": 16.0, "fp8": 8.0, "int8": 8.0, "nvfp4": 4.5}
# Without the options, which are None then: a family's plan refuses them.
VRAM_GIB, WEIGHTS = 8, "bf16"


def add_options(parser: argparse.ArgumentParser) -> None:
    for name, value, unit in (("width", 1024, "PX"), ("height", 1024, "PX"), ("batch", 1, "N")):
        told = f"default: {value}"
        parser.add_argument(f"--{name}", type=positive, default=value, metavar=unit, help=told)
    parser.add_argument(
        "--vram", type=above_zero, metavar="GIB", help=f"VRAM that is free (default: {VRAM_GIB})"
    )
    parser.add_argument(
        "--prefer", choices=PREFERENCES, default="balance", help="as on the node (default: balance)"
    )
    parser.add_argument(
        "--weights", choices=list(WEIGHT_BITS), help=f"of the transformer (default: {WEIGHTS})"
    )
    parser.add_argument(
        "--text-tokens",
        type=positive,
        default=256,
        metavar="N",
        help="of the prompt (default: 256)",
    )
    parser.add_argument(
        "--references", type=positive, default=0, metavar="N",
        help="reference pictures of the same size, which are encoded first",
    )  # fmt: skip
    parser.add_argument("--img2img", action="store_true", help="a picture is encoded first")
    parser.add_argument(
        "--controlnet", type=int, choices=list(sizes.UNIONS), nargs="?", const=15, metavar="LAYERS",
        help="with a Z-Image Fun ControlNet: 3 (2.1 lite), 6 (Union) or 15 control layers (2.1)",
    )  # fmt: skip
    parser.add_argument(
        "--family", choices=[*families.FAMILIES, *unet_peak.UNETS],
        help="what another family needs while sampling, by prefer",
    )  # fmt: skip
    parser.add_argument("--frames", type=positive, default=1, metavar="N", help="frames of a video")
    parser.add_argument(
        "--copy-gbs",
        type=above_zero,
        metavar="GB_PER_S",
        help="copy rate from RAM to the card (default: 25)",
    )
    parser.add_argument("--chart", type=chart_file, metavar="FILE.svg", help="draw the plan there")
    parser.add_argument("--json", action="store_true", help="the plan as one JSON object")


def chart_file(text: str) -> Path:
    """The file of a chart, in a folder that exists."""
    path = Path(text).expanduser()
    if path.suffix.lower() != ".svg":
        raise argparse.ArgumentTypeError(f"must end in .svg, got {text}")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent}")
    return path


def report(options: argparse.Namespace) -> tuple[str, bool]:
    """What to print, and whether the run is possible at all; writes the chart.

    Raises:
        ValueError: the picture is smaller than a pixel of the latent.
        OSError: the chart cannot be written.
    """
    plan: FamilyPlan | RunPlan = family_plan(options) if options.family else run_plan(options)
    is_possible = isinstance(plan, FamilyPlan) or plan.is_possible
    if options.chart:
        options.chart.write_text(plan.chart(), encoding="utf-8", newline="\n")
    if options.json:
        return json.dumps(plan.as_json(), indent=2), is_possible
    text = plan.text()
    return f"{text}\nChart: {options.chart}" if options.chart else text, is_possible


def run_plan(options: argparse.Namespace) -> RunPlan:
    """The plan of a whole run of Z-Image-Turbo that the options name."""
    if options.frames > 1:
        raise ValueError(f"frames must be 1 for Z-Image, got {options.frames}: name a --family")
    request = sizes.Request(
        options.width, options.height, options.batch, text_tokens=options.text_tokens
    )
    references = need.References([request.latent_shape] * options.references)
    request = need.with_references(request, [references])
    stored_as = options.weights or WEIGHTS
    models = stages.published_models(weight_bits=WEIGHT_BITS[stored_as])
    controls = tuple(net for n, net in sizes.UNIONS.items() if n == options.controlnet)
    request = replace(request, controls=controls, has_patches=bool(controls))
    weights = 2 * sum(net.parameters(models.denoiser) for net in controls)
    models = replace(models, control_weight_bytes=weights)
    run = what_fits.Run(has_encode=options.img2img or options.references > 0)
    budget = int((options.vram or VRAM_GIB) * GIB)
    plan = what_fits.fit(models, request, budget, prefer=options.prefer, run=run)
    notes = [
        f"Transformer in {stored_as}, Qwen3-4B and VAE in bf16; one sample per picture and "
        "call (cfg 1).",
        *(
            f"ControlNet with {net.layers} control layers, bf16: {size(weights)} of the weights."
            for net in controls
        ),
        "CUDA context and other programs: not measured, on top of the budget. Name what is free.",
        "Pinned RAM: ComfyUI pins what it streams, where RAM allows.",
    ]
    if fit_report.scores_text(plan.stage("text encode")):
        notes.append(
            "Where torch has a fused attention for float32 with a mask, no scores are kept."
        )
    return RunPlan(
        plan,
        budget,
        others=tuple(what_fits.alternatives(plan)),
        weights=stored_as,
        copy_bytes_per_s=options.copy_gbs and options.copy_gbs * 1e9,
        notes=tuple(notes),
    )
