"""The tables of `vae_compare`: one for each VAE, of its decodes and of its encodes."""

from __future__ import annotations

from collections.abc import Sequence

from ..card.tables import NOT_MEASURED, grid, mib
from ..rows import Row

BLOCKS = {
    "vae_compare_flux_decode": ("Flux", "decode"),
    "vae_compare_flux_encode": ("Flux", "encode"),
    "vae_compare_wan_decode": ("Wan 2.1", "decode"),
    "vae_compare_wan_encode": ("Wan 2.1", "encode"),
}
WAYS = {
    "stock": "ComfyUI", "stock, planar": "ComfyUI, planar picture",
    "VAEDecodeTiled": "VAEDecodeTiled", "fallback": "ComfyUI's fallback",
    "speed": "Lean VAE `speed`", "balance": "Lean VAE `balance`", "smallest": "Lean VAE `smallest`",
}  # fmt: skip
HEADS = ("live", "process", "time", "largest error")
DECODE_HEADS = ("PSNR", "seams", "equal 8-bit pixels", "most off", "equal to float64")
ENCODE_HEADS = ("relative error to float64",)


def tables(rows: Sequence[Row]) -> dict[str, str]:
    """By block; only of those that have rows. A line per picture or video and way."""
    made = {}
    for name, (vae, task) in BLOCKS.items():
        mine = [row for row in rows if (row["vae"], row["task"]) == (vae, task)]
        if mine:
            more = DECODE_HEADS if task == "decode" else ENCODE_HEADS
            made[name] = grid((f"{task}, way", *HEADS, *more), map(_cells, mine))
    return made


def case(row: Row) -> str:
    """The picture or video."""
    frames = f", {row['frames']} frames" if row["frames"] > 1 else ""
    return f"{row['side_px']}x{row['side_px']}{frames}"


def _cells(row: Row) -> list[str]:
    cells = [
        f"{case(row)}, {WAYS[row['way']]}", mib(row["live_bytes"], 0), mib(row["process_bytes"], 0),
        f"{row['time']:.2f}x", _error(row["max_error"]),
    ]  # fmt: skip
    if row["task"] == "encode":
        exact = row.get("from_float64")
        return [*cells, NOT_MEASURED if exact is None else _error(exact)]
    seams, psnr, exact = row["seams"], row["psnr_db"], row["pixels_off_float64"]
    return [
        *cells, "-" if psnr is None else f"{psnr} dB", "-" if seams is None else f"{seams:.2f}",
        _equal(row["pixels_off_8bit"]), f"{row['most_off_8bit']:.0f}",
        NOT_MEASURED if exact is None else _equal(exact),
    ]  # fmt: skip


def _error(value: float) -> str:
    if value == 0 or value >= 0.01:
        return f"{value:.2g}"
    digits, _, power = f"{value:.1e}".partition("e")
    return f"{digits}e{int(power)}"


def _equal(share_off: float) -> str:
    return f"{100 - 100 * share_off:.3f} %"
