"""Memory against cost of the lean denoiser: chunk size by head groups, as a table and a plot.

    python run.py bench denoiser_frontier [--side 1024] [--groups 2 3]

Memory: the predicted peak of the whole forward (nodes/denoiser/peak.py; a test holds it within 3 %
of what fake tensors measure). Cost: a roofline of one main block, counted operation by operation on
fake CUDA tensors: the larger of arithmetic and memory traffic at the stated card's peaks, as a
multiple of the host's own block. Nothing is timed; launches and caches are not in it. Rows of other
sizes and groups are kept.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from pack.nodes.units import MIB
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from .rows import RESULTS_DIR, merged, write

RESULTS = RESULTS_DIR / "denoiser_frontier.jsonl"
GROUPS = (1, 2, 3, 5, 10, 30)
CHUNKS = (256, 512, 1024, 2048, 4096)
TEXT_TOKENS = 256
KEY = ("side_px", "groups", "chunk_tokens")
# A GeForce RTX 4090 by its data sheet: bfloat16 with float32 accumulation, and its memory.
CARD = "165 TFLOP/s and 1008 GB/s"
FLOPS_PER_S, BYTES_PER_S = 165e12, 1008e9
FLASH = torch.ops.aten._scaled_dot_product_flash_attention.default
# Operations that move no bytes beside their result, or none at all.
GATHERS = (torch.ops.aten.index_select.default, torch.ops.aten.embedding.default)
MAKES_ROOM = (torch.ops.aten.empty.memory_format, torch.ops.aten.new_empty.default)


class Roofline(TorchDispatchMode):
    """Adds up, for each operation, the larger of its arithmetic and its traffic, in seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0
        self.flops = 0
        self.moved_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.is_view or func in MAKES_ROOM or func.namespace == "prim":
            return out
        formula = flop_registry.get(func.overloadpacket)
        flops = formula(*args, **kwargs, out_val=out) if formula else 0
        sources = [] if func in GATHERS else tree_leaves((args, kwargs))
        moved = _nbytes(sources) + _nbytes(tree_leaves(out)) * (2 if func in GATHERS else 1)
        self.flops += flops
        self.moved_bytes += moved
        self.seconds += max(flops / FLOPS_PER_S, moved / BYTES_PER_S)
        return out


def _nbytes(leaves: Sequence[Any]) -> int:
    return sum(t.numel() * t.element_size() for t in leaves if isinstance(t, torch.Tensor))


def flash(function: Any, q: Any, k: Any, v: Any, heads: int, *args: Any, **kwargs: Any) -> Any:
    """Attention as the flash kernel; torch would ask a card which kernels it has."""
    out = FLASH(q, k, v)[0]  # [B, H, T, C]
    return out.transpose(1, 2).flatten(2)


def cost(run: Callable[..., Any], tokens: int) -> Roofline:
    """Counts one call of a block on [1, tokens, 3840] in bfloat16."""
    x = torch.empty(1, tokens, 3840, dtype=torch.bfloat16)
    rope = torch.empty(1, tokens, 1, 64, 2, 2)
    adaln = torch.empty(1, 256, dtype=torch.bfloat16)
    options = {"optimized_attention_override": flash}
    # Not inference_mode: there operations arrive whole that a card runs as several.
    with torch.no_grad(), Roofline() as roofline:
        run(x, rope, adaln, options)
    return roofline


def frontier(side_px: int, groups_of_heads: Sequence[int]) -> list[dict[str, Any]]:
    """One row for each number of groups and chunk size; the host's block is the first row."""
    from pack.nodes.denoiser.cuts import DenoiserPlan
    from pack.nodes.denoiser.peak import lean_peak_bytes, stock_peak_bytes
    from pack.nodes.denoiser.plan import denoiser_plan
    from pack.nodes.denoiser.sizes import Z_IMAGE, Request
    from pack.nodes.host.denoiser.block import run_block
    from pack.testing.stock_forward import FakeDenoiser

    request = Request(side_px, side_px, text_tokens=TEXT_TOKENS)
    denoiser = FakeDenoiser(Z_IMAGE.__class__(layers=1, refiner_layers=1))
    block = denoiser.model.diffusion_model.layers[0].requires_grad_(False)

    def lean(plan: DenoiserPlan) -> Callable[..., Any]:
        def run(x: Any, rope: Any, adaln: Any, options: dict[str, Any]) -> None:
            run_block(
                block, x, x, rope=lambda start, stop: rope[:, start:stop], adaln_input=adaln,
                transformer_options=options, plan=plan,
            )  # fmt: skip

        return run

    def stock(x: Any, rope: Any, adaln: Any, options: dict[str, Any]) -> None:
        block(x, None, rope, adaln, transformer_options=options)

    shown = {"side_px": side_px, "text_tokens": TEXT_TOKENS, "dtype": "bfloat16"}
    with denoiser.mode, denoiser.device:
        base = cost(stock, request.tokens)
        rows = [
            {**shown, "groups": None, "chunk_tokens": None, "cost": 1.0,
             "peak_bytes": stock_peak_bytes(request)}
        ]  # fmt: skip
        for groups in groups_of_heads:
            chosen = denoiser_plan(request, groups=groups).chunk_tokens
            for chunk in CHUNKS:
                plan = DenoiserPlan(groups, chunk)
                found = cost(lean(plan), request.tokens)
                rows.append(
                    {**shown, "groups": groups, "chunk_tokens": chunk,
                     "is_chosen": chunk == chosen, "cost": found.seconds / base.seconds,
                     "flops": found.flops / base.flops,
                     "traffic": found.moved_bytes / base.moved_bytes,
                     "peak_bytes": lean_peak_bytes(request, plan)}
                )  # fmt: skip
    return rows


def groups_in(rows: Sequence[dict[str, Any]]) -> list[int]:
    """The numbers of groups that were measured, the host's own block aside."""
    return sorted({row["groups"] for row in rows} - {None})


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Groups by chunk sizes; the chunk that `chunk_tokens` 0 takes is bold."""
    heads = " | ".join(f"chunks of {chunk}" for chunk in CHUNKS)
    lines = [f"| groups of heads | {heads} |", "|---|" + "---|" * len(CHUNKS)]
    for groups in groups_in(rows):
        cells = []
        for row in rows:
            if row["groups"] == groups:
                text = f"{row['peak_bytes'] / MIB:.0f} MiB, {row['cost']:.2f}x"
                cells.append(f"**{text}**" if row["is_chosen"] else text)
        lines.append(f"| {groups} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Peak against cost, a line for each number of groups; what is chosen is ringed."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for index, groups in enumerate(groups_in(rows)):
        mine = [row for row in rows if row["groups"] == groups]
        costs, peaks = ([row[k] for row in mine] for k in ("cost", "peak_bytes"))
        mib = [peak / MIB for peak in peaks]
        axes.plot(costs, mib, "o-", ms=4, lw=1, color=f"C{index}", label=f"{groups}")
        for row in mine:
            if row["is_chosen"]:
                axes.plot(row["cost"], row["peak_bytes"] / MIB, "o", ms=11, mfc="none", mec="k")
    axes.set_xlabel("roofline cost of a block, host = 1.00")
    axes.set_ylabel("peak of the forward, MiB")
    axes.set_title(title, fontsize=10)
    axes.set_ylim(bottom=0)
    axes.legend(title="groups of heads", fontsize=8)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--side", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--groups", type=int, nargs="+", choices=GROUPS, default=GROUPS)
    options = parser.parse_args()
    from pack.testing.stock_forward import settle_host

    with tempfile.TemporaryDirectory() as base_dir:
        settle_host(Path(os.environ["ZIMAGE_HOST_DIR"]), Path(base_dir))
        import comfyui_version

        known = {"host": comfyui_version.__version__, "torch": torch.__version__}
        print(
            "Peak of the forward and roofline cost of a block against the host's; bfloat16, "
            f"{TEXT_TOKENS} text tokens, batch 1, a card of {CARD}. Bold (ringed in the plot): the "
            f"chunk that is chosen. ComfyUI {known['host']}, torch {known['torch']}."
        )
        for side in options.side:
            rows = frontier(side, options.groups)
            measured = [{**row, "card": CARD, **known} for row in rows]
            write(RESULTS, merged(RESULTS, measured, KEY))
            print(
                f"\n{side}x{side} (host: {rows[0]['peak_bytes'] / MIB:.0f} MiB):\n\n{table(rows)}",
                flush=True,
            )
            title = f"Z-Image {side}x{side}, batch 1: memory against cost (points: chunk sizes)"
            plot(rows[1:], RESULTS_DIR / f"denoiser_frontier_{side}.png", title)


if __name__ == "__main__":
    main()
