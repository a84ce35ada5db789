"""A CLIP that keeps the weights of its text encoder within a budget while it encodes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import comfy.model_management as management
import comfy.ops
import comfy.sd
import torch
from comfy.text_encoders.z_image import ZImageTEModel
from torch import nn
from torch.nn import functional

from ...fit.planner import Planner
from ...fit.text_encoder import TextEncoderSizes
from ..base.fetch import is_plain
from ..base.reserve import make_room
from ..base.server import NodeLog
from . import budget

NO_TOKENS: Mapping[str, Any] = MappingProxyType({})
# Types whose rows torch gathers on the CPU.
GATHERED = (torch.float32, torch.bfloat16, torch.float16)


class RowsInRam(nn.Module):
    """Stands for an embedding table that stays in RAM: gathers rows there, and moves only them.

    ComfyUI moves the whole table to the card. Its loader does not see this one, as the table is no
    parameter here.

    Memory: of the card, the rows.
    Exact: bit-exact, each row is cast by itself.
    """

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.stock = (table,)  # in a tuple, so that it is no child

    @property
    def weight(self) -> torch.Tensor:
        return self.stock[0].weight

    def forward(self, tokens: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        """Rows [B, T, D] for tokens [B, T]."""
        comfy.ops.run_every_op()  # ends a cancelled prompt, as each layer of the host does
        weight = self.weight
        rows = functional.embedding(tokens.to(weight.device), weight)
        # The model's own type, where the file has another.
        stored = getattr(self.stock[0], "weight_comfy_model_dtype", None) or weight.dtype
        return rows.to(tokens.device).to(stored).to(out_dtype or stored)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight if keep_vars else self.weight.detach()


@dataclass(frozen=True)
class Limiter:
    """What one Fit to VRAM node limits with.

    table: the embedding table's name in the text encoder, where it stays in RAM; else None.
    """

    planner: Planner
    log: NodeLog
    table: str | None


class LimitedCLIP(comfy.sd.CLIP):
    """A CLIP whose encodes are planned when they begin, and kept within the plan.

    Clones, as of LoRA nodes, are limited too. Text that is generated is not: it is the host's own.
    """

    _limiter: Limiter
    _is_encoding = False
    _lift: Callable[[], None] | None = None

    @classmethod
    def of(cls, clone: Any, limiter: Limiter) -> LimitedCLIP:
        """What a clone of the host's CLIP is, limited."""
        made = cls(no_init=True)
        made.__dict__.update(clone.__dict__)
        made._limiter = limiter
        return made

    def clone(self, *args: Any, **kwargs: Any) -> LimitedCLIP:
        return self.of(super().clone(*args, **kwargs), self._limiter)

    def encode_from_tokens(self, *args: Any, **kwargs: Any) -> Any:
        with self._encoding():
            return super().encode_from_tokens(*args, **kwargs)

    def encode_from_tokens_scheduled(self, *args: Any, **kwargs: Any) -> Any:
        with self._encoding():
            return super().encode_from_tokens_scheduled(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Text by the host's own CLIP, which multiplies by the whole table."""
        stock = super().clone()
        if self._limiter.table is not None:
            stock.patcher.object_patches.pop(self._limiter.table, None)
        return stock.generate(*args, **kwargs)

    def load_model(self, tokens: Mapping[str, Any] = NO_TOKENS) -> Any:
        """Loads the weights; while a prompt is encoded, no more of them than its plan allows."""
        if not self._is_encoding:
            return super().load_model(tokens)
        patcher, limiter = self.patcher, self._limiter
        if limiter.table is not None and f"{limiter.table}.weight" in patcher.patches:
            # A LoRA of a node behind ours changes the table, so the host applies it to its own.
            patcher.object_patches.pop(limiter.table, None)
        allowed = limiter.planner.decide_text(
            token_count(tokens),
            budget.room_bytes(patcher.load_device),
            weight_bytes=budget.weight_bytes(patcher),
        )
        level = logging.WARNING if allowed.is_warning else logging.INFO
        limiter.log.say(allowed.text, level)
        make_room([patcher], allowed.peak_bytes, allowed.budget_bytes)
        with budget.loading_within(patcher, allowed.limit_bytes):
            management.load_models_gpu([patcher], memory_required=allowed.need_bytes)
        self._lift = budget.limit_weights(patcher, allowed.limit_bytes)
        return patcher

    @contextmanager
    def _encoding(self) -> Iterator[None]:
        """One encode, however the host divides it; at its end the limit is lifted."""
        if self._is_encoding:
            yield
            return
        self._is_encoding = True
        try:
            yield
        finally:
            self._is_encoding = False
            lift, self._lift = self._lift, None
            if lift is not None:
                lift()


def check_is_text_encoder(clip: Any) -> None:
    """Raises:
    ValueError: the CLIP is not Z-Image's.
    """
    model = getattr(clip, "cond_stage_model", None)
    if not isinstance(model, ZImageTEModel):
        raise ValueError(
            "clip must be Z-Image's text encoder (Qwen3-4B; Load CLIP with type lumina2), got "
            f"{type(model).__name__}: connect that one, or leave clip empty"
        )


def with_limit(clip: Any, planner: Planner, node_id: str | None, *, name: str) -> LimitedCLIP:
    """A CLIP whose encodes keep to the planner's budget; the CLIP is left as it is.

    Raises:
        ValueError: the CLIP is not Z-Image's.
    """
    check_is_text_encoder(clip)
    table, module = _table(clip)
    stage = planner.text_stage(budget.room_bytes(clip.patcher.load_device))
    gathers = stage.weight_bytes < planner.models.text_weight_bytes
    limiter = Limiter(planner, NodeLog(name, node_id), table if gathers else None)
    limited = LimitedCLIP.of(comfy.sd.CLIP.clone(clip), limiter)
    if gathers:
        limited.patcher.add_object_patch(table, RowsInRam(module))
    else:
        limited.patcher.object_patches.pop(table, None)  # of another Fit to VRAM
    return limited


def text_encoder_sizes(clip: Any) -> TextEncoderSizes:
    """The sizes of a CLIP's text encoder."""
    config = _transformer(clip).model.config
    return TextEncoderSizes(
        hidden=config.hidden_size,
        ffn=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        vocabulary=config.vocab_size,
    )


def table_bytes(clip: Any) -> int:
    """Bytes of the embedding table; 0 where it is not a plain one without LoRA."""
    name, table = _table(clip)
    if f"{name}.weight" in clip.patcher.patches or table.weight.dtype not in GATHERED:
        return 0
    return table.weight.nbytes if is_plain(table, comfy.ops.disable_weight_init.Embedding) else 0


def token_count(tokens: Mapping[str, Any]) -> int:
    """Tokens of the longest section of a prompt; an embedding stands for as many as its rows."""
    sections = [section for sections in tokens.values() for section in sections]
    return max((sum(map(_length, section)) for section in sections), default=1) or 1


def _length(token: Any) -> int:
    """Of a token with its weight, or of a textual-inversion embedding [T, D]."""
    value = token[0]
    return value.shape[0] if isinstance(value, torch.Tensor) and value.ndim > 1 else 1


def _transformer(clip: Any) -> Any:
    model = clip.cond_stage_model
    return getattr(model, model.clip).transformer


def _table(clip: Any) -> tuple[str, Any]:
    """Name and module of the embedding table, also where `RowsInRam` stands for it."""
    module = _transformer(clip).get_input_embeddings()
    name = f"{clip.cond_stage_model.clip}.transformer.model.embed_tokens"
    return name, module.stock[0] if isinstance(module, RowsInRam) else module
