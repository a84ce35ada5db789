"""The shape of a Qwen3 text encoder, read from its tensors and its config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .blocks import count_blocks, extent
from .component import Component
from .header import TensorInfo, WeightsError

HEAD_DIM = 128
# Z-Image reads the output of the last layer but one.
MIN_LAYERS = 3
_SIZES = {1024: "Qwen3-0.6B", 2048: "Qwen3-1.7B", 2560: "Qwen3-4B", 4096: "Qwen3-8B"}


def size_name(hidden_size: int) -> str:
    """The published Qwen3 of that width, or the width in words."""
    return _SIZES.get(hidden_size, f"a Qwen3 of width {hidden_size}")


def key_prefix(tensors: Mapping[str, TensorInfo]) -> str | None:
    """The prefix before ``layers.0.`` in a Qwen3's tensor names; None where it is no Qwen3."""
    for prefix in ("model.", "", "language_model.model."):
        layer = f"{prefix}layers.0."
        norms = ("self_attn.q_norm", "self_attn.k_norm", "post_attention_layernorm")
        has_norms = all(f"{layer}{norm}.weight" in tensors for norm in norms)
        # Gemma 3 has the same norms and two more.
        if has_norms and f"{layer}post_feedforward_layernorm.weight" not in tensors:
            return prefix
    return None


def qwen3_config(component: Component) -> dict[str, Any]:
    """The sizes of a Qwen3 text encoder.

    The layer count, widths and head counts come from the tensors, so that smaller (distilled)
    encoders load as what they are; the constants that no tensor shows come from config.json.

    Returns:
        Keyword arguments by the names that transformers' Qwen3Config uses.

    Raises:
        WeightsError: not a Qwen3, too few layers, another head size, or a config.json that
            contradicts the tensors.
    """
    label, tensors = component.label, component.tensors
    prefix = key_prefix(tensors)
    if prefix is None:
        raise WeightsError(f"{label} is not a Qwen3 text encoder: choose qwen_3_4b.safetensors")

    def rows(name: str) -> int:
        return extent(label, tensors, f"{prefix}{name}.weight")

    head_dim = rows("layers.0.self_attn.q_norm")
    if head_dim != HEAD_DIM:
        raise WeightsError(
            f"{label} has heads of size {head_dim}, Qwen3-4B for Z-Image has {HEAD_DIM}: "
            "choose another text encoder"
        )
    layers = count_blocks(label, tensors, f"{prefix}layers.")
    if layers < MIN_LAYERS:
        raise WeightsError(
            f"{label} has {layers} layers, at least {MIN_LAYERS} are needed (Z-Image reads the "
            "last but one): choose another text encoder"
        )
    found: dict[str, Any] = {
        "vocab_size": rows("embed_tokens"),
        "hidden_size": rows("layers.0.post_attention_layernorm"),
        "intermediate_size": rows("layers.0.mlp.gate_proj"),
        "num_hidden_layers": layers,
        "num_attention_heads": rows("layers.0.self_attn.q_proj") // HEAD_DIM,
        "num_key_value_heads": rows("layers.0.self_attn.k_proj") // HEAD_DIM,
    }
    for key, value in found.items():
        stated = component.config.get(key, value)
        if stated != value:
            raise WeightsError(
                f"{label} contradicts its config.json: {key} is {stated} there and {value} in the "
                "tensors: download it again"
            )
    found.update(_constants(component.config))
    return found


def _constants(config: Mapping[str, Any]) -> dict[str, float]:
    rope = config.get("rope_parameters")
    # transformers 5 moved rope_theta into rope_parameters.
    tables = {"rms_norm_eps": config, "rope_theta": rope if isinstance(rope, dict) else config}
    values = {key: table.get(key) for key, table in tables.items()}
    return {k: float(v) for k, v in values.items() if isinstance(v, int | float)}
