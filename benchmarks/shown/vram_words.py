"""The words of the memory chart, in both languages of the README."""
# ruff: noqa: RUF001 (Chinese punctuation, and the sign between the sides of a picture)

from __future__ import annotations

from typing import Literal, NamedTuple


class Label(NamedTuple):
    """Words at a line, placed by a picture's side and GiB."""

    text: str
    side_px: float
    gib: float
    colour: str
    size: float = 13
    is_bold: bool = False
    anchor: Literal["start", "middle", "end"] = "start"


class Words(NamedTuple):
    """small: lines below the chart; source is `measured` or `not_measured`."""

    title: str
    subtitle: str
    description: str
    card: str
    axis: str
    labels: tuple[Label, ...]
    small: tuple[str, ...]
    measured: str
    not_measured: str


ENGLISH = Words(
    title="{gib} GiB of free VRAM: {balance}×{balance} with this pack, {alone}×{alone} without",
    subtitle=(
        "VRAM for a whole run of Z-Image-Turbo (text encode, sampling, VAE decode), weights "
        "included, by picture size"
    ),
    description=(
        "At {px}×{px} a whole run needs {alone} GiB with ComfyUI alone, {balance} GiB with this "
        "pack, {smallest} GiB with its smallest settings."
    ),
    card="{gib} GiB free",
    axis="side of a square picture, px",
    labels=(
        Label("ComfyUI alone", 3400, 22.2, "alone", 15, True, "end"),
        Label("with this pack", 3560, 5.9, "ours", 15, True, "end"),
        Label("smallest settings, slower", 4580, 0.6, "ours", 12, False, "end"),
        Label("ComfyUI alone, all weights on the card", 560, 14.8, "alone", 12),
        Label("with this pack, all weights on the card", 4580, 12.35, "ours", 12, False, "end"),
    ),
    small=(
        "Thick lines: the least free VRAM, with weights that do not fit streamed from RAM; this "
        "pack at its default, balance.",
        "Above its line ComfyUI decodes in tiles, which changes the picture. Smallest settings: "
        "up to {smallest}×{smallest} on {gib} GiB.",
        "{source} {dtype}, {text_tokens} text tokens, ComfyUI {host}.",
        "Free is less than the card has: the desktop and the CUDA context take some. Both sides "
        "get the same allowance for workspaces.",
    ),
    measured="Lines: by formula. Rings: whole runs on a {device}; crosses: out of memory or tiles.",
    not_measured="Predicted by formula, not measured on a card.",
)
CHINESE = Words(
    title="空闲显存 {gib} GiB：用本插件可到 {balance}×{balance}，不用时只到 {alone}×{alone}",
    subtitle="Z-Image-Turbo 整个流程（文本编码、采样、VAE 解码）所需显存，含权重，按图片尺寸",
    description=(
        "{px}×{px} 的整个流程：仅 ComfyUI 需要 {alone} GiB，用本插件 {balance} GiB，"
        "用最省设置 {smallest} GiB。"
    ),
    card="空闲 {gib} GiB",
    axis="正方形图片的边长，像素",
    labels=(
        Label("仅 ComfyUI", 3400, 22.2, "alone", 15, True, "end"),
        Label("用本插件", 3560, 5.9, "ours", 15, True, "end"),
        Label("最省设置，更慢", 4580, 0.6, "ours", 12, False, "end"),
        Label("仅 ComfyUI，权重全部在显存", 560, 14.6, "alone", 12),
        Label("用本插件，权重全部在显存", 4580, 12.35, "ours", 12, False, "end"),
    ),
    small=(
        "粗线：完成整个流程所需的最少空闲显存，放不下的权重从内存传入；本插件用默认设置 balance。",
        "超出红线时 ComfyUI 会分块解码，画面会变。最省设置在空闲 {gib} GiB 时可到 "
        "{smallest}×{smallest}。",
        "{source}{dtype}，{text_tokens} 个文本 token，ComfyUI {host}。",
        "空闲显存小于显卡容量：桌面和 CUDA 上下文也占一些。双方为工作区（workspace）留同样的余量。",
    ),
    measured="线为公式预测；圆圈：在 {device} 上实测完成；叉：显存不足或分块。",
    not_measured="公式预测，未在显卡上实测。",
)
