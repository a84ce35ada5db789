"""One call of the host's attention, as an `optimized_attention_override` receives it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import comfy.ldm.modules.attention as attention
import torch

# Order of the arguments of every host attention function; sub-quadratic names the first three
# differently.
_NAMES = ("q", "k", "v", "heads", "mask", "attn_precision", "skip_reshape", "skip_output_reshape")
_OTHER_NAMES = {"query": "q", "key": "k", "value": "v"}


class AttentionCall:
    """Reads the arguments of a call, and repeats the call with some of them replaced.

    Arguments that it does not know (by position or by keyword) are passed on unchanged.

    Args:
        function: the host function that the model asked for, not wrapped.
        args: its positional arguments.
        kwargs: its keyword arguments.
        previous: the override that was there before ours, or None.
        is_foreign: that override, or one below it, is not ours.

    Raises:
        ValueError: query, key, value and heads are not among the arguments, or no tensors.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        previous: Callable[..., Any] | None,
        is_foreign: bool,
    ) -> None:
        self.function, self.args, self.options = function, args, kwargs
        self.previous, self.is_foreign = previous, is_foreign
        named: dict[str, Any] = dict.fromkeys((*_NAMES, "enable_gqa"))
        named.update((_OTHER_NAMES.get(name, name), value) for name, value in kwargs.items())
        named.update(zip(_NAMES, args, strict=False))
        self.q, self.k, self.v = (named[name] for name in "qkv")
        self.heads, self.mask = named["heads"], named["mask"]
        self.attn_precision = named["attn_precision"]
        self.skip_reshape = bool(named["skip_reshape"])
        self.skip_output_reshape = bool(named["skip_output_reshape"])
        self.enable_gqa = bool(named["enable_gqa"])
        tensors = (self.q, self.k, self.v, *(() if self.mask is None else (self.mask,)))
        if not isinstance(self.heads, int) or not all(
            isinstance(t, torch.Tensor) and t.ndim >= 2 for t in tensors
        ):
            raise ValueError("an attention call must give query, key, value and heads")

    @property
    def function_name(self) -> str:
        return getattr(self.function, "__name__", "")

    @property
    def is_of_host(self) -> bool:
        return getattr(self.function, "__module__", "") == attention.__name__

    @property
    def channels(self) -> int:
        return self.q.shape[-1] if self.skip_reshape else self.q.shape[-1] // self.heads

    @property
    def sliceable_mask(self) -> torch.Tensor | None:
        """The mask; None where every slice must get it whole.

        `attention_basic` reads bool masks as [B, S], with no axis of queries.
        """
        is_by_key = self.function_name == "attention_basic" and self.is_of_host
        if self.mask is not None and self.mask.dtype == torch.bool and is_by_key:
            return None
        return self.mask

    def by_head(self) -> tuple[Any, Any, Any, Any]:
        """Views: query, key, value as [B, H, T, D], mask with 4 axes, as for SDPA."""
        q, k, v, mask = self.q, self.k, self.v, self.mask
        if not self.skip_reshape:
            q, k, v = (t.unflatten(-1, (-1, self.channels)).transpose(1, 2) for t in (q, k, v))
        if mask is not None and mask.ndim == 2:
            mask = mask.unsqueeze(0)
        if mask is not None and mask.ndim == 3:
            mask = mask.unsqueeze(1)
        return q, k, v, mask

    def whole(self) -> Any:
        """Runs the call unchanged."""
        return self._run(self.args, self.options)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        heads: int,
    ) -> Any:
        """Runs the call with these in their places, for a slice of `sliceable_mask`."""
        mask = self.mask if self.sliceable_mask is None else mask
        replaced = {"q": query, "k": key, "v": value, "heads": heads, "mask": mask}
        # Positional arguments past the known ones stay where they are.
        names = _NAMES[: len(self.args)]
        args = tuple(replaced.get(n, given) for n, given in zip(names, self.args, strict=False))
        args += self.args[len(args) :]
        options = {n: replaced.get(_OTHER_NAMES.get(n, n), x) for n, x in self.options.items()}
        return self._run(args, options)

    def _run(self, args: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
        if self.previous is not None:
            return self.previous(self.function, *args, **options)
        return self.function(*args, **options)
