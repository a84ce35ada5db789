"""`run.py plan`: what a picture needs on a card of so many GiB, by the pack's own formulas.

Standard library only: neither a host nor a GPU nor weights are needed.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from ..nodes.denoiser import families, need, sizes, unet_peak
from ..nodes.denoiser.plan import DenoiserChoice
from ..nodes.fit import report as fit_report
from ..nodes.fit import stages, what_fits
from ..nodes.prefer import PREFERENCES
from ..nodes.units import GIB, size
from .arguments import above_zero, positive

# Bits per weight of the transformer; nvfp4 keeps one byte of scale for 16 weights.
WEIGHT_BITS = {"bf16": 16.0, "fp8": 8.0, "int8": 8.0, "nvfp4": 4.5}


def add_options(parser: argparse.ArgumentParser) -> None:
    for name, value in (("width", 1024), ("height", 1024), ("batch", 1)):
        parser.add_argument(f"--{name}", type=positive, default=value, metavar="N")
    parser.add_argument("--vram", type=above_zero, default=8.0, metavar="GIB", help="free for it")
    parser.add_argument("--prefer", choices=PREFERENCES, default="balance")
    parser.add_argument("--weights", choices=list(WEIGHT_BITS), default="bf16")
    parser.add_argument("--text-tokens", type=positive, default=256, metavar="N")
    parser.add_argument(
        "--references", type=positive, default=0, metavar="N",
        help="pictures of the same size to refer to, which are encoded first",
    )  # fmt: skip
    parser.add_argument("--img2img", action="store_true", help="a picture is encoded first")
    parser.add_argument(
        "--controlnet", type=int, choices=list(sizes.UNIONS), nargs="?", const=15, metavar="LAYERS",
        help="with a Z-Image Fun ControlNet: 3 (2.1 lite), 6 (Union) or 15 control layers (2.1)",
    )  # fmt: skip
    parser.add_argument(
        "--family", choices=[*families.FAMILIES, *unet_peak.UNETS],
        help="what the denoiser of another family holds, by prefer",
    )  # fmt: skip
    parser.add_argument("--frames", type=positive, default=1, metavar="N", help="of a video")
    parser.add_argument("--copy-gbs", type=above_zero, metavar="GB_PER_S", help="RAM to card")


def report(options: argparse.Namespace) -> tuple[str, bool]:
    """The plan in words, and whether it can run at all.

    Raises:
        ValueError: the picture is smaller than a pixel of the latent.
    """
    if options.family:
        return _of_family(options), True
    if options.frames > 1:
        raise ValueError(f"frames must be 1 for Z-Image, got {options.frames}: name a --family")
    request = sizes.Request(
        options.width, options.height, options.batch, text_tokens=options.text_tokens
    )
    references = need.References([request.latent_shape] * options.references)
    request = need.with_references(request, [references])
    models = stages.published_models(weight_bits=WEIGHT_BITS[options.weights])
    controls = tuple(net for n, net in sizes.UNIONS.items() if n == options.controlnet)
    request = replace(request, controls=controls, has_patches=bool(controls))
    weights = 2 * sum(net.parameters(models.denoiser) for net in controls)
    models = replace(models, control_weight_bytes=weights)
    run = what_fits.Run(has_encode=options.img2img or options.references > 0)
    plan = what_fits.fit(models, request, int(options.vram * GIB), prefer=options.prefer, run=run)
    others = list(what_fits.alternatives(plan))
    notes = [
        f"Transformer in {options.weights}, Qwen3-4B and VAE in bf16; one sample per picture and "
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
    speed = options.copy_gbs and options.copy_gbs * 1e9
    text = fit_report.text(plan, others=others, copy_bytes_per_s=speed, notes=notes)
    return text, plan.verdict != "too large"


def _of_family(options: argparse.Namespace) -> str:
    """The denoise row of another family."""
    if options.controlnet or options.img2img:
        raise ValueError("--controlnet and --img2img are planned for Z-Image alone: leave them out")
    size_px, samples = (options.width, options.height), {"batch": options.batch}
    samples["text_tokens"] = options.text_tokens
    if options.family in unet_peak.UNETS:
        if options.frames > 1 or options.references:
            raise ValueError("--frames and --references must be left out for a U-Net")
        unet = unet_peak.UNetRequest(unet_peak.UNETS[options.family], *size_px, **samples)
        stock_bytes = unet_peak.unet_stock_bytes(unet)
        request: unet_peak.UNetRequest | families.FamilyRequest = unet
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
    lines = [
        f"{request.family.name}, {shape}, {options.text_tokens} text tokens, bfloat16",
        f"Modelled peak of activations of one call, weights excluded; U, one residual stream, is "
        f"{size(request.stream_bytes)}.",
        "",
        "| denoise | peak | in U | head groups | chunk | feed-forward chunk |",
        "|---|---|---|---|---|---|",
        _row(request, "ComfyUI alone", stock_bytes, ("-", "-", "-")),
    ]
    for prefer in PREFERENCES:
        plan = request.plan(DenoiserChoice(prefer))
        if isinstance(request, unet_peak.UNetRequest):
            peak_bytes = unet_peak.unet_peak_bytes(request, DenoiserChoice(prefer))
        else:
            peak_bytes = families.family_peak_bytes(request, plan)
        cuts = (str(plan.groups), f"{plan.chunk_tokens} tokens", f"{plan.feed_tokens} tokens")
        name = f"**{prefer}**" if prefer == options.prefer else prefer
        lines.append(_row(request, name, peak_bytes, cuts))
    return "\n".join(lines)


def _row(
    request: unet_peak.UNetRequest | families.FamilyRequest,
    name: str,
    peak_bytes: int,
    cuts: tuple[str, str, str],
) -> str:
    in_streams = f"{peak_bytes / request.stream_bytes:.1f}"
    return f"| {name} | {size(peak_bytes)} | {in_streams} | {' | '.join(cuts)} |"
