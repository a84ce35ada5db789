"""Where each figure comes from that stands in the prose of a document, and what is said of it."""

# ruff: noqa: RUF001 (Chinese punctuation)

from __future__ import annotations

from typing import NamedTuple


class Cell(NamedTuple):
    """A cell of a table that benchmarks.documents makes.

    line: cells that the one line of that table has.
    """

    table: str
    line: tuple[str, ...]
    column: str


class Quote(NamedTuple):
    """What the documents say of a figure.

    english, chinese: words of its sentence, one of which each such sentence has: {} is the figure,
    … is anything within the sentence. Whoever rewrites a sentence changes them here.
    """

    cell: Cell
    english: tuple[str, ...]
    chinese: tuple[str, ...]


AT_2048, AT_4096, IN_8_GIB = ("2048x2048",), ("4096x4096",), ("8 GiB",)
QUOTED = {
    "467.4 MiB": Quote(
        Cell("denoiser_peak", AT_2048, "`balance` (default)"),
        ("2048x2048 a step holds {}",),
        ("2048x2048 的一步…降到 {}",),
    ),
    "1921.5 MiB": Quote(
        Cell("denoiser_peak", AT_2048, "ComfyUI alone"),
        ("2048x2048 a step … instead of {}",),
        ("2048x2048 的一步…从 {}",),
    ),
    "1177.0 MiB": Quote(
        Cell("vae_peak_flux", ("decode 2048x2048",), "`balance` (default)"),
        ("2048x2048 a decode holds {}",),
        ("2048x2048 的解码…降到 {}",),
    ),
    "5186.0 MiB": Quote(
        Cell("vae_peak_flux", ("decode 2048x2048",), "ComfyUI alone"),
        ("2048x2048 a decode … instead of {}",),
        ("2048x2048 的解码从 {}",),
    ),
    "7.75 GiB": Quote(
        Cell("vram_least", AT_2048, "ComfyUI alone"),
        ("2048x2048 needs {} with ComfyUI alone",),
        ("2048x2048 仅 ComfyUI 需要 {}",),
    ),
    "1.93 GiB": Quote(
        Cell("vram_least", AT_2048, "`prefer` balance"),
        ("2048x2048 … {} with this pack",),
        ("2048x2048 …用本插件 {}",),
    ),
    "30.36 GiB": Quote(
        Cell("vram_least", AT_4096, "ComfyUI alone"),
        ("4096x4096 needs {} and",),
        ("4096x4096 为 {} 和",),
    ),
    "6.72 GiB": Quote(
        Cell("vram_least", AT_4096, "`prefer` balance"),
        ("4096x4096 needs … and {}",),
        ("4096x4096 为…和 {}",),
    ),
    "2080x2080": Quote(
        Cell("by_card", IN_8_GIB, "largest square: ComfyUI alone"),
        ("8 GiB of free VRAM ComfyUI alone reaches {}", "Above {} ComfyUI alone still runs"),
        ("空闲显存 8 GiB 时仅 ComfyUI 最大 {}", "超过 {}，仅用 ComfyUI 仍能运行"),
    ),
    "4480x4480": Quote(
        Cell("by_card", IN_8_GIB, "our nodes at `balance`"),
        ("8 GiB of free VRAM … this pack {}",),
        ("空闲显存 8 GiB 时…用本插件可到 {}",),
    ),
    "2.10 GiB": Quote(
        Cell("vram_least", ("1024x1024",), "ComfyUI alone"),
        ("ComfyUI alone draws 1024x1024 in {}",),
        ("仅 ComfyUI 画 1024x1024 只需 {}",),
    ),
    "1.02x": Quote(
        Cell("launches_denoiser", ("1024x1024, balance",), "modelled, RTX 3060 12GB"),
        ("1024x1024 with `balance` a step takes {} ComfyUI's time on an RTX 3060",),
        ("1024x1024 用 `balance`，一步的时间在 RTX 3060 上是 ComfyUI 的 {}",),
    ),
    "1.07x": Quote(
        Cell("launches_denoiser", ("1024x1024, balance",), "modelled, H100 SXM"),
        ("1024x1024 with `balance` a step … {} on an H100",),
        ("1024x1024 用 `balance`，一步的时间…在 H100 上是 {}",),
    ),
    "537.1 MiB": Quote(
        Cell("fit_table", ("smallest budget that fits",), "1024x1024"),
        ("run at 1024x1024 … into {}",),
        ("1024x1024 的整次运行…到 {}",),
    ),
    "0.02 %": Quote(
        Cell("probe_overhead", ("steps", "128x128"), "of the step"),
        ("readings take {} of a step",),
        ("读数占一步时间的 {}",),
    ),
    "1.35 %": Quote(
        Cell("probe_overhead", ("blocks", "128x128"), "of the step"),
        ("{} with `detail` `blocks`",),
        ("`blocks` 时 {}",),
    ),
    "1.04x": Quote(
        Cell("load_ram", ("Load Z-Image-Turbo",), "of the folder"),
        ("a folder takes {} its size in RAM",),
        ("加载文件夹所需的内存是它大小的 {}",),
    ),
}
