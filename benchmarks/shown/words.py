"""The texts of the tables that stand in documents of both languages."""
# ruff: noqa: RUF001 (Chinese punctuation)

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Words:
    """The texts of one language; `{}` stands for a figure.

    nothing: the section as long as there are no rows.
    intro: above the table.
    head: of its columns.
    step: says of a line that it is one sampling step.
    weights: by the rows' word.
    by_card: heads of the table by the memory of a card.
    by_card_intro: above it.
    nothing_streamed: what its cells say where all weights stay on the card.
    verdicts: what they say of a run that does not fit, by the rows' word.
    """

    nothing: str
    intro: str
    head: tuple[str, ...]
    imitated: str
    batch: str
    step: str
    to_the_bit: str
    close: str
    not_measured: str
    failed: str
    out_of_memory: str
    weights: dict[str, str]
    by_card: tuple[str, ...]
    by_card_intro: str
    nothing_streamed: str
    verdicts: dict[str, str]


FORM = "../../issues/new?template=card-report.yml"  # beside blob/main, the repository's root
ENGLISH = Words(
    nothing="No card has been measured yet: `python run.py bench card` measures yours, and the "
    f"issue form\n\"[Report of a card]({FORM})\" takes its report.",
    intro="A whole run goes from text to picture in ComfyUI's server. Peak: the driver's count, "
    "weights included. Of two\nruns the second is shown. One step: what torch allocated above its "
    "start, without the weights. All figures are\nmedians of the rows in "
    "`benchmarks/results/cards`; `python -m benchmarks.documents` writes the table. On a\n"
    "limited card another process holds the rest of the memory.",
    head=(
        "card", "picture", "ComfyUI: peak / time", "with this pack: peak / time",
        "same picture?", "versions",
    ),
    imitated="{card}, limited to {gib:g} GiB",
    batch="batch {}",
    step="one step, Apply Gradient Checkpoint",
    to_the_bit="to the bit",
    close="{} of 8-bit values equal, largest difference {}",
    not_measured="not measured",
    failed="failed",
    out_of_memory="out of memory",
    weights={"random": "random weights", "real": "real weights"},
    by_card=(
        "free VRAM", "largest square: ComfyUI alone", "our nodes at `balance`", "at `smallest`",
        "streamed per step at 1024x1024", "at 2048x2048",
        "whole run on a card of that size: peak, time (measured)",
    ),
    by_card_intro="Predicted for a whole run by the formulas of Fit to VRAM, with bf16 weights. "
    "ComfyUI alone decodes in one piece here;\n"
    "on a card it falls back to tiles, which change the picture. Streamed, with `balance`: weights "
    "copied from RAM in each\nstep; the seconds assume {rate:.0f} GB/s (PCIe 4.0 x16; x8 takes "
    "twice as long). Where ComfyUI prefetches, they\nmostly hide behind the computing.",
    nothing_streamed="nothing",
    verdicts={"tight": "tight", "too large": "does not fit"},
)  # fmt: skip
CHINESE = Words(
    nothing="还没有测量过任何显卡：`python run.py bench card` 可以测量你的显卡，"
    f"生成的报告请通过 issue 表单\n“[Report of a card]({FORM})” 提交。",
    intro="整次运行指 ComfyUI 服务器里从文本到图片的运行（有两次则取第二次）："
    "驱动统计的显存占用峰值（含权重）和耗时。单步指 torch 在该步开始之后分配的\n"
    "峰值（不含权重）和耗时。数字是 `benchmarks/results/cards` 中各行的中位数，"
    "由 `python -m benchmarks.documents` 写入；\n"
    "注明 GiB 数的是模拟的小显卡。",
    head=(
        "显卡", "图片", "仅 ComfyUI：峰值 / 耗时", "使用本节点包：峰值 / 耗时",
        "画面相同？", "版本",
    ),
    imitated="{card}，只用其中 {gib:g} GiB",
    batch="批次 {}",
    step="单步，应用梯度检查点",
    to_the_bit="逐位相同",
    close="{} 的 8 位数值相同，最大相差 {}",
    not_measured="未测量",
    failed="失败",
    out_of_memory="显存不足",
    weights={"random": "随机权重", "real": "真实权重"},
    by_card=(
        "空闲显存", "最大的正方形图片：仅 ComfyUI", "本插件 `balance`", "本插件 `smallest`",
        "1024x1024 每步传输", "2048x2048 每步传输", "该容量显卡上的整次运行：峰值、耗时（实测）",
    ),
    by_card_intro="按“适配显存”的公式对整次运行的预测，bf16 权重。"
    "仅 ComfyUI 一列按整张解码计算；在显卡上它会退回分块解码，画面会变。\n"
    "每步传输（`balance`）：每一步从内存拷贝的权重，秒数按假定的 {rate:.0f} GB/s\n"
    "（PCIe 4.0 x16，x8 加倍）计算；ComfyUI 预取时，大部分与计算重叠。",
    nothing_streamed="无",
    verdicts={"tight": "勉强", "too large": "放不下"},
)  # fmt: skip
