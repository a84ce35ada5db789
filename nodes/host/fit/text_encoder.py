"""A CLIP that keeps the weights of its text encoder within a budget while it encodes."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import comfy.ldm.modules.attention as attention
import comfy.model_management as management
import comfy.ops
import comfy.sd
import torch
from comfy.text_encoders.z_image import ZImageTEModel
from torch import nn
from torch.nn import functional

from ...fit.planner import Planner
from ...fit.text_encoder import BASIC_SCORE, FUSED_SCORE, MATH_SCORE, TextEncoderSizes
from ...units import PAGE_BYTES
from ..base.device import is_card, is_dynamic
from ..base.fetch import is_plain
from ..base.reserve import make_room
from ..base.sdpa import sdpa_choice
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
    """What one Fit to VRAM node limits with."""

    planner: Planner
    log: NodeLog
    device: torch.device


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
        stock.patcher.object_patches.pop(_table(self)[0], None)
        self._limiter.log.say_once("generate", "text is generated without the budget")
        return stock.generate(*args, **kwargs)

    def load_model(self, tokens: Mapping[str, Any] = NO_TOKENS) -> Any:
        """Loads the weights; while a prompt is encoded, no more of them than its plan allows."""
        patcher, limiter = self.patcher, self._limiter
        reason = why_not_limited(self, limiter.device)
        if reason is not None or not self._is_encoding:
            if reason is not None and self._is_encoding:
                limiter.log.say_once(reason, f"the text encoder is not limited: {reason}")
            patcher.object_patches.pop(_table(self)[0], None)
            return super().load_model(tokens)
        allowed = limiter.planner.decide_text(
            token_count(tokens),
            budget.room_bytes(patcher.load_device),
            weight_bytes=budget.weight_bytes(patcher),
            table_bytes=table_bytes(self),
        )
        level = logging.WARNING if allowed.is_warning else logging.INFO
        limiter.log.say(allowed.text, level)
        name, table = _table(self)
        if allowed.gathers_rows:
            if _has_table_on_card(self, table):
                # The host would see no table to move back to RAM.
                if is_dynamic(patcher):
                    patcher.partially_unload(patcher.offload_device, patcher.loaded_size())
                else:
                    patcher.detach()
            patcher.add_object_patch(name, RowsInRam(table))
            # Else the host counts a table as loaded that is not.
            most = patcher.model_size() - 1
        else:
            patcher.object_patches.pop(name, None)
            most = None
        make_room([patcher], allowed.peak_bytes, allowed.budget_bytes)
        loaded = most if allowed.limit_bytes is None else allowed.limit_bytes
        with budget.loading_within(patcher, loaded):
            management.load_models_gpu([patcher], memory_required=allowed.need_bytes)
        limit = allowed.limit_bytes
        if limit is not None and allowed.gathers_rows and hasattr(table, "_v"):
            # Its pages are the lowest, as it is the largest weight, and nobody asks for them.
            limit += table.weight.nbytes // PAGE_BYTES * PAGE_BYTES
        self._lift = budget.limit_weights(patcher, limit)
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


def why_not_limited(clip: Any, device: torch.device) -> str | None:
    """Why a CLIP cannot keep to a budget of that device; None if it can."""
    if clip.patcher.load_device != device:
        return f"it computes on {clip.patcher.load_device}"
    if type(clip) not in (comfy.sd.CLIP, LimitedCLIP):
        return f"it is a {type(clip).__name__} of another node"
    if clip.patcher.model is not clip.cond_stage_model:
        return "hooks replaced its model"
    return None


def with_limit(
    clip: Any, planner: Planner, device: torch.device, node_id: str | None, *, name: str
) -> Any:
    """A CLIP whose encodes keep to the planner's budget; the CLIP is left as it is.

    One that cannot keep to it stays stock, see `why_not_limited`.
    """
    log, reason = NodeLog(name, node_id), why_not_limited(clip, device)
    if reason is not None:
        log.say(f"the text encoder is not in the budget: {reason}", logging.WARNING)
        return clip
    return LimitedCLIP.of(comfy.sd.CLIP.clone(clip), Limiter(planner, log, device))


@functools.cache
def bytes_per_score(device: torch.device, sizes: TextEncoderSizes) -> int:
    """What the attention of a prompt holds for each score there; the most without a card to ask."""
    chosen = attention.optimized_attention_for_device(device, mask=True, small_input=True)
    if chosen is attention.attention_basic:
        return BASIC_SCORE
    if not is_card(device) or chosen is not attention.attention_pytorch:
        return MATH_SCORE
    one = torch.empty(1, sizes.heads, 8, sizes.head_dim, device=device)  # in float32, as the host
    is_fused = sdpa_choice(one, one, one, one[:, :1, :, :8]) == "fused"
    return FUSED_SCORE if is_fused else MATH_SCORE


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


def _has_table_on_card(clip: Any, table: nn.Embedding) -> bool:
    """Whether the host may have loaded the table, by estimate or into pages."""
    if is_dynamic(clip.patcher):
        is_hidden = isinstance(_transformer(clip).get_input_embeddings(), RowsInRam)
        return not is_hidden and clip.patcher.loaded_size() > 0
    return getattr(table, "comfy_patched_weights", False)


def _transformer(clip: Any) -> Any:
    model = clip.cond_stage_model
    return getattr(model, model.clip).transformer


def _table(clip: Any) -> tuple[str, Any]:
    """Name and module of the embedding table, also where `RowsInRam` stands for it."""
    module = _transformer(clip).get_input_embeddings()
    name = f"{clip.cond_stage_model.clip}.transformer.model.embed_tokens"
    return name, module.stock[0] if isinstance(module, RowsInRam) else module
