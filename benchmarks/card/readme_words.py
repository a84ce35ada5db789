"""The texts of the READMEs' table of cards. Standard library only."""
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


ENGLISH = Words(
    nothing="No card has been measured yet: `python run.py bench card` measures yours, and the "
    "issue form\n\"Report of a card\" takes the report that it writes.",
    intro="Whole runs go from text to picture in ComfyUI's server, the second one where there are "
    "two: the most that\nthey took of the card by the driver's count, weights included, and their "
    "time. One step is what torch\nallocated above the step's start, weights apart, and its "
    "time. Medians of the rows in `benchmarks/results/cards`, as\n"
    "`python -m benchmarks.card.readme_table` writes them; cards of so many GiB are imitated.",
    head=(
        "card", "picture", "ComfyUI: peak / time", "with this pack: peak / time",
        "same picture?", "versions",
    ),
    imitated="{card}, {gib:g} GiB of it",
    batch="batch {}",
    step="one step, Apply Gradient Checkpoint",
    to_the_bit="to the bit",
    close="{} of the 8-bit values, most off {}",
    not_measured="not measured",
    failed="failed",
    out_of_memory="out of memory",
    weights={"random": "random weights", "real": "real weights"},
)  # fmt: skip
CHINESE = Words(
    nothing="还没有测量过任何显卡：`python run.py bench card` 可以测量你的显卡，"
    "它写出的报告可以用 issue 表单 “Report of a card” 寄来。",
    intro="整次运行指 ComfyUI 服务器里从文本到图片的运行（有两次则取第二次）："
    "驱动统计的显存占用峰值（含权重）和耗时。单步指 torch 在该步开始之后分配的\n"
    "峰值（不含权重）和耗时。数字是 `benchmarks/results/cards` 中各行的中位数，"
    "由 `python -m benchmarks.card.readme_table` 写入；\n"
    "注明 GiB 数的是模拟的小显卡。",
    head=(
        "显卡", "图片", "仅 ComfyUI：峰值 / 耗时", "使用本节点包：峰值 / 耗时",
        "画面相同？", "版本",
    ),
    imitated="{card}，只用其中 {gib:g} GiB",
    batch="批次 {}",
    step="单步，应用梯度检查点",
    to_the_bit="逐位相同",
    close="{} 的 8 位数值相同，最多差 {}",
    not_measured="未测量",
    failed="失败",
    out_of_memory="显存不足",
    weights={"random": "随机权重", "real": "真实权重"},
)  # fmt: skip
