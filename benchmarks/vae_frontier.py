"""Memory against cost of the lean VAE decode: every mix of what its levels store, and where.

    python run.py bench vae_frontier [--side 2048] [--mix AAA] [--check EEE] [--show]

A mix has a letter for each of the three larger levels, smallest first: A stores all maps on the
card, B the blocks' results, C nothing; D the blocks' results in RAM, E all maps in RAM.
Memory: the predicted peak on the card (nodes/vae/peak.py; within 3 % of what fake tensors
measure for the three preferences, whose measured rows of `vae_peak` are ringed). Arithmetic and
traffic with RAM: counted in one decode of 256x256 on fake tensors for each mix, in strips of whole
maps, and scaled by the pixels; attention by its formula. Cost: the arithmetic at the stated card's
peak, and the traffic at the stated rate after it, because the copies wait in the same stream. A
bound: the larger of the two, as if all copies hid behind the arithmetic. Nothing is timed.
`--check` measures the peak of a mix. Rows of other sizes and mixes are kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pack.nodes.units import GIB, MIB
from torch.utils._python_dispatch import TorchDispatchMode

from .rows import RESULTS_DIR, merged, read, versions, write
from .vae_peak import RESULTS as MEASURED

RESULTS = RESULTS_DIR / "vae_frontier.jsonl"
# keeps_input, keeps_hidden, keeps_output, in_ram
WAYS = {
    "A": (True, True, True, False),
    "B": (False, False, True, False),
    "C": (False, False, False, False),
    "D": (False, False, True, True),
    "E": (True, True, True, True),
}
MIXES = tuple(map("".join, itertools.product(WAYS, repeat=3)))
KEY = ("side_px", "mix")
SIDE_PX = 256  # of the counted decodes
# A GeForce RTX 4090 by its data sheet; pinned copies over PCIe 4.0 x16 at 80 % of its rate.
CARD = "165 TFLOP/s, 25 GB/s to RAM"
FLOPS_PER_S, RAM_BYTES_PER_S = 165e12, 25e9
GOAL_MIB, GOAL_COST = 700, 1.25


class RamTraffic(TorchDispatchMode):
    """Counts the bytes that are copied between the card and RAM."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("copy_", "to", "_to_copy"):
            source = args[1] if name == "copy_" else args[0]
            # The statistics of groups are small, and no maps.
            if source.device != out.device and source.ndim == 4:
                self.nbytes += out.numel() * out.element_size()
        return out


def plan_of(mix: str, call: Any, strip_rows: int = 0) -> Any:
    """The plan of a mix, with the strips of `smallest`."""
    from pack.nodes.vae.plan import vae_plan

    plan = vae_plan(call, prefer="smallest", strip_rows=strip_rows)
    assert plan is not None  # the first attempt has one
    names = ("keeps_input", "keeps_hidden", "keeps_output", "in_ram")
    changed = (
        dataclasses.replace(level, **dict(zip(names, WAYS[way], strict=True)))
        for level, way in zip(plan.levels[1:], mix, strict=True)
    )
    return dataclasses.replace(plan, levels=(plan.levels[0], *changed))


def decode(fake: Any, plan: Any, side: int, mode: Any) -> int:
    """Runs a decode on fake tensors under a mode; returns its multiply-adds."""
    with torch.inference_mode(), fake.mode:
        x = torch.empty(1, fake.latent, side // 8, side // 8, dtype=torch.bfloat16, device="cuda")
        with mode:
            if hasattr(mode, "watch"):
                mode.watch(x)
            out = torch.empty(1, 3, side, side, dtype=torch.bfloat16, device="cuda")
            return fake.run(x, out[0], plan)


def measure(fake: Any, side: int, mixes: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each mix."""
    from pack.nodes.vae.peak import lean_vae_peak_bytes

    call, small = fake.call(side, side), fake.call(SIDE_PX, SIDE_PX)
    sizes = call.sizes
    base, area = fake.stock_work(side, side), (side / SIDE_PX) ** 2
    tokens = (SIDE_PX // sizes.factor) ** 2
    attention = 2 * tokens**2 * sizes.widths[0]
    rows = []
    for mix in mixes:
        counted, traffic = plan_of(mix, small, SIDE_PX), RamTraffic()
        work = decode(fake, counted, SIDE_PX, traffic)
        plan = plan_of(mix, call)
        work = (work - attention) * area + attention * area**2  # attention is quadratic
        ram_bytes = traffic.nbytes * area
        seconds = 2 * work / FLOPS_PER_S + ram_bytes / RAM_BYTES_PER_S
        rows.append(
            {"side_px": side, "mix": mix, "dtype": "bfloat16",
             "peak_bytes": lean_vae_peak_bytes(call, plan),
             "arithmetic": round(work / base, 3), "ram_bytes": round(ram_bytes),
             "cost": round(seconds * FLOPS_PER_S / 2 / base, 3)}
        )  # fmt: skip
    return rows


def best(rows: Sequence[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """The rows that no other beats in both peak and `key`."""
    kept: list[dict[str, Any]] = []
    for row in sorted(rows, key=lambda row: (row["peak_bytes"], row[key])):
        if not kept or row[key] < kept[-1][key]:
            kept.append(row)
    return kept


def chosen(side: int, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The measured rows of the preferences at that size, and the host's, with their cost."""
    found = [r for r in read(MEASURED) if r["way"] == "decode" and r["batch"] == 1]
    found = [r for r in found if r["width_px"] == r["height_px"] == side]
    mix = {"speed": "AAA", "balance": "AAB", "smallest": "BDD"}
    costs = {row["mix"]: row for row in rows}
    for row in found:
        like = costs.get(mix.get(row["prefer"], ""))
        row["cost"], row["ram_bytes"] = (like["cost"], like["ram_bytes"]) if like else (1.0, 0)
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    heads = ("mix or preference", "peak", "arithmetic", "traffic with RAM", "cost")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in sorted(rows, key=lambda row: -row["peak_bytes"]):
        name = row["mix"] if "mix" in row else f"**{row['prefer']}**"
        lines.append(
            f"| {name} | {row['peak_bytes'] / MIB:.0f} MiB | {row['arithmetic']:.2f}x | "
            f"{row['ram_bytes'] / GIB:.1f} GiB | {row['cost']:.2f}x |"
        )
    return "\n".join(lines)


def plot(rows: Sequence[dict[str, Any]], ringed: Sequence[dict[str, Any]], path: Path) -> None:
    """Peak against arithmetic, and against the cost with the traffic."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, both = pyplot.subplots(1, 2, figsize=(10, 4.5), sharey=True)
    heads = ("arithmetic", "arithmetic, stock = 1"), ("cost", f"cost at {CARD}, stock = 1")
    for axes, (key, label) in zip(both, heads, strict=True):
        for uses_ram in (False, True):
            mine = [row for row in rows if (row["ram_bytes"] > 0) == uses_ram]
            name = "with maps in RAM" if uses_ram else "on the card alone"
            peaks = [row["peak_bytes"] / MIB for row in mine]
            axes.plot(
                [row[key] for row in mine], peaks, "o", ms=3, color=f"C{int(uses_ram)}", label=name
            )
        for row in ringed:
            at = row[key], row["peak_bytes"] / MIB
            axes.plot(*at, "o", ms=10, mfc="none", mec="k")
            axes.annotate(row["prefer"], at, xytext=(7, 5), textcoords="offset points", fontsize=8)
        axes.axhline(GOAL_MIB, lw=0.6, ls="--", color="grey")
        axes.axvline(GOAL_COST, lw=0.6, ls="--", color="grey")
        axes.set_xlabel(label)
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
    both[0].set_ylabel("peak on the card, MiB")
    both[0].legend(fontsize=8)
    figure.suptitle("VAE decode: memory against cost of all mixes (ringed: measured)", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Prints the tables of one size and draws the plot."""
    side = rows[0]["side_px"]
    ringed = chosen(side, rows)
    plot(rows, ringed, RESULTS_DIR / f"vae_frontier_{side}.png")
    for key, title in (("arithmetic", "arithmetic"), ("cost", f"cost at {CARD}")):
        print(f"\n{side}x{side}, bfloat16: the best mixes of peak and {title}.\n")
        print(table([*best(rows, key), *ringed]))
    within = [row for row in rows if row["peak_bytes"] < GOAL_MIB * MIB]
    for row in within:
        row["bound"] = max(row["arithmetic"], row["cost"] - row["arithmetic"])
    if not within:
        print(f"\nNo mix stays below {GOAL_MIB} MiB.")
        return
    for key in ("arithmetic", "cost", "bound"):
        least = min(within, key=lambda row: (row[key], row["peak_bytes"]))
        print(
            f"\nBelow {GOAL_MIB} MiB, the least {key}: {least[key]:.2f}x ({least['mix']}, "
            f"{least['peak_bytes'] / MIB:.0f} MiB, {least['ram_bytes'] / GIB:.1f} GiB of traffic)."
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--side", type=int, default=2048)
    parser.add_argument("--mix", action="append", choices=MIXES, metavar="MIX", help="only these")
    parser.add_argument(
        "--check", choices=MIXES, metavar="MIX", help="only measure the peak of this mix"
    )
    parser.add_argument("--show", action="store_true", help="only show the rows counted before")
    options = parser.parse_args()
    if options.show:
        rows = read(RESULTS)
        for side in sorted({row["side_px"] for row in rows}):
            show([row for row in rows if row["side_px"] == side])
        return
    from pack.testing.stock_forward import settle_host

    with tempfile.TemporaryDirectory() as base_dir:
        settle_host(Path(os.environ["ZIMAGE_HOST_DIR"]), Path(base_dir))
        from pack.nodes.vae.peak import lean_vae_peak_bytes
        from pack.testing.vae_models import CardTracker, FakeVae

        fake, side = FakeVae(is_decoder=True), options.side
        if options.check:
            call, tracker = fake.call(side, side), CardTracker()
            plan = plan_of(options.check, call)
            decode(fake, plan, side, tracker)
            predicted = lean_vae_peak_bytes(call, plan)
            print(
                f"{options.check} at {side}x{side}: {tracker.peak_bytes / MIB:.1f} MiB measured, "
                f"{predicted / MIB:.1f} MiB predicted"
            )
            return
        rows = [{**row, **versions()} for row in measure(fake, side, options.mix or MIXES)]
    kept = merged(RESULTS, rows, KEY)
    write(RESULTS, kept)
    show([row for row in kept if row["side_px"] == side])


if __name__ == "__main__":
    main()
