"""FLUX.1 and FLUX.2: two streams joined in one attention, then one with both halves at once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import comfy.ldm.flux.layers as layers
import comfy.ldm.flux.math as flux_math
import comfy.ldm.flux.model as flux
import torch
from torch import nn
from torch.nn import functional

from ...denoiser import families
from ...denoiser.attention_half import AttendFn, Heads, Part, add_joint_attention
from ...denoiser.cuts import DenoiserPlan, chunks
from ...denoiser.mlp import ActivationFn, Hidden, add_mlp
from ...denoiser.rows import Columns, Projection, RowsFn, Shift, clamp_fp16_
from ...denoiser.sizes import TransformerSizes
from ...denoiser.stream import Factors, Stream
from ..base.fetch import fetch_layer_norm
from ..base.options import within_groups
from .block import BlockSettings
from .family import Family
from .heads import RopeFn, rotation
from .projections import has_whole, projection
from .replaced import InPlace, OnHandover, is_stock

# What the host's block holds of a token at its peak, in streams: linear1's product, silu and their
# product in FLUX.2; what attention made and the joined rows in FLUX.1.
STOCK_STREAMS = {True: 17, False: 14}


def _is_possible(part: Any) -> bool:
    """True for the blocks of FLUX.1 and FLUX.2, and not for others of the same classes."""
    if isinstance(part, layers.DoubleStreamBlock):
        return all(_activation(mlp) is not None for mlp in (part.img_mlp, part.txt_mlp))
    return not isinstance(part, layers.SingleStreamBlock) or bool(_activation_of(part.mlp_act))


def _sizes_of(denoiser: Any, blocks: list[Any]) -> TransformerSizes:
    """The sizes of the transformer, of which these blocks are known."""
    dim, heads = denoiser.hidden_size, denoiser.num_heads
    is_gated = denoiser.params.mlp_silu_act
    return TransformerSizes(
        dim=dim,
        heads=heads,
        kv_heads=heads,
        head_dim=dim // heads,
        ffn_dim=int(dim * denoiser.params.mlp_ratio),
        layers=len(denoiser.double_blocks) + len(denoiser.single_blocks),
        refiner_layers=0,
        cap_dim=denoiser.params.context_in_dim,
        patch=denoiser.patch_size,
        channels=denoiser.params.in_channels,
        pad_multiple=1,
        is_whole=has_whole(blocks),
        is_gated=is_gated,
        is_parallel=True,
        stock_elements=STOCK_STREAMS[is_gated] * dim,
    )


class Activation(NamedTuple):
    """What an activation does in place, and whether it multiplies two halves."""

    apply_: ActivationFn
    is_gated: bool


def _activation_of(module: Any) -> Activation | None:
    """None for one that is not known."""
    if type(module) is layers.SiLUActivation:
        return Activation(functools.partial(functional.silu, inplace=True), True)
    if type(module) is nn.GELU and module.approximate == "tanh":
        return Activation(functools.partial(torch.ops.aten.gelu_, approximate="tanh"), False)
    return None


def _activation(mlp: Any) -> Activation | None:
    """Of a feed-forward of a double block."""
    if type(mlp) is not nn.Sequential or len(mlp) != 3:
        return None
    return _activation_of(mlp[1])


class _Modulated(NamedTuple):
    """One stream of a block, and what modulates it there.

    tokens: [B, T, D], written over.
    factors: shift, scale and gate, [B or 1, 1, D].
    """

    tokens: torch.Tensor
    norm: Any
    factors: Any

    def of(self, sample: int, norm: RowsFn) -> Stream:
        """The stream of one sample; norm: fetched."""
        source, factors = self.tokens[sample], self.factors
        shift = Shift(1 + _of(factors.scale, sample), _of(factors.shift, sample))
        run = Factors(0, source.shape[0], shift, _of(factors.gate, sample))
        return Stream(source, source, norm, [run], is_fused=False)


def _of(factors: torch.Tensor, sample: int) -> torch.Tensor:
    return factors[sample if len(factors) > 1 else 0, 0]


def _is_by_token(vec: Any) -> bool:
    """True where tokens are modulated apart. What modulates is not computed for the answer."""
    if isinstance(vec, torch.Tensor):
        return vec.ndim == 3 and vec.shape[1] != 1
    if isinstance(vec, layers.ModulationOut):
        return vec.shift.ndim != 3 or vec.shift.shape[1] != 1
    return any(map(_is_by_token, vec))


class _Lean(InPlace):
    """What both kinds of blocks have in common."""

    def __init__(self, block: Any, settings: BlockSettings, on_handover: OnHandover) -> None:
        super().__init__(block, on_handover)
        self.settings = settings

    def why_not(self, given: Mapping[str, Any]) -> str | None:
        if not self._is_untouched():
            return "another node changed a block"
        if given.get("pe", 0) is None:
            return "the request has no positions"
        if _is_by_token(given["vec"]):
            return "each token is modulated by itself"
        return super().why_not(given)

    def _is_untouched(self) -> bool:
        raise NotImplementedError

    def _modulations(self, vec: Any) -> list[Any]:
        raise NotImplementedError

    def _plan(self, streams: list[torch.Tensor], options: Mapping[str, Any]) -> DenoiserPlan:
        tokens = sum(stream.shape[1] for stream in streams)
        first = streams[0]
        return self.settings.plan_for(first.shape[0], (tokens,), first.device, options)

    @property
    def _heads(self) -> Heads:
        sizes = self.settings.sizes
        return Heads(sizes.heads, sizes.heads, sizes.head_dim)


def _rope(pe: torch.Tensor, sample: int, first: int = 0) -> RopeFn:
    """The rotary table of tokens of a part that begins at token `first`."""
    table = pe[sample if len(pe) > 1 else 0].movedim(0, 1)[None]  # [1, T, 1, C / 2, 2, 2]
    return lambda start, stop: table[:, first + start : first + stop]


def _attend(
    options: dict[str, Any], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    return flux_math.optimized_attention(
        q, k, v, q.shape[1], skip_reshape=True, mask=None, transformer_options=options
    )


def _attend_of(options: dict[str, Any], *, is_grouped: bool) -> AttendFn:
    return functools.partial(_attend, within_groups(options) if is_grouped else options)


def _packed(qkv: Projection, dim: int) -> tuple[Columns, Columns, Columns]:
    return Columns(qkv), Columns(qkv, dim), Columns(qkv, 2 * dim)


class LeanDouble(_Lean):
    """A DoubleStreamBlock in pieces: the text and the picture, joined in the attention."""

    STREAMS = ("img", "txt")
    KNOWN = ("vec", "pe", "transformer_options")

    def _is_untouched(self) -> bool:
        (block,) = self.stock
        norms = (block.img_attn.norm, block.txt_attn.norm)
        mlps = (block.img_mlp, block.txt_mlp)
        return (
            is_stock(block, layers.DoubleStreamBlock)
            and all(is_stock(norm, layers.QKNorm) for norm in norms)
            and all(is_stock(mlp, nn.Sequential) for mlp in mlps)
            and all(is_stock(mlp[1], type(mlp[1])) for mlp in mlps)
        )

    def _modulations(self, vec: Any) -> list[Any]:
        """Of the picture's attention and feed-forward, then of the text's."""
        (block,) = self.stock
        if not block.modulation:
            return [modulation for pair in vec for modulation in pair]
        return [*block.img_mod(vec), *block.txt_mod(vec)]

    def run(self, *, img, txt, vec, pe, transformer_options=None, **_):
        (block,) = self.stock
        options = transformer_options or {}
        plan = self._plan([txt, img], options)
        img_1, img_2, txt_1, txt_2 = self._modulations(vec)
        of_text = (_Modulated(txt, block.txt_norm1, txt_1), block.txt_attn)
        of_picture = (_Modulated(img, block.img_norm1, img_1), block.img_attn)
        self._attention([of_text, of_picture], pe, options, plan)
        _feed_forward(_Modulated(img, block.img_norm2, img_2), block.img_mlp, plan)
        _feed_forward(_Modulated(txt, block.txt_norm2, txt_2), block.txt_mlp, plan)
        return img, clamp_fp16_(txt)

    def _attention(
        self,
        streams: list[tuple[_Modulated, Any]],
        pe: torch.Tensor,
        options: dict[str, Any],
        plan: DenoiserPlan,
    ) -> None:
        heads, dim = self._heads, self.settings.sizes.dim
        with ExitStack() as until:
            fetched = [
                (
                    fetch_layer_norm(stream.norm, stream.tokens, until),
                    projection(attention.qkv, stream.tokens, until),
                    projection(attention.proj, stream.tokens, until),
                )
                for stream, attention in streams
            ]
            is_grouped = not any(qkv.is_whole for _, qkv, _ in fetched)
            attend = _attend_of(options, is_grouped=is_grouped)
            for sample in range(streams[0][0].tokens.shape[0]):
                parts, first = [], 0
                for (stream, attention), (norm, qkv, out) in zip(streams, fetched, strict=True):
                    tokens, norms = stream.tokens, attention.norm
                    of_sample = stream.of(sample, norm)
                    parts.append(
                        Part(
                            tokens[sample],
                            of_sample.modulated,
                            *_packed(qkv, dim),
                            rotation(
                                _rope(pe, sample, first),
                                (norms.query_norm, norms.key_norm),
                                heads.channels,
                                tokens,
                                until,
                                plan,
                                is_fused=False,
                            ),
                            out=lambda attended, start, out=out: out.own(attended),
                            add=of_sample.add,
                        )
                    )
                    first += tokens.shape[1]
                add_joint_attention(parts, attend=attend, heads=heads, plan=plan)


def _feed_forward(stream: _Modulated, mlp: Any, plan: DenoiserPlan) -> None:
    activation = _activation(mlp)
    assert activation is not None
    with ExitStack() as until:
        first = projection(mlp[0], stream.tokens, until)
        out = projection(mlp[2], stream.tokens, until)
        width = mlp[2].in_features
        second = Columns(first, width) if activation.is_gated else None
        norm = fetch_layer_norm(stream.norm, stream.tokens, until)
        for sample in range(stream.tokens.shape[0]):
            of_sample = stream.of(sample, norm)
            add_mlp(
                of_sample.source,
                modulated=of_sample.modulated,
                hidden=Hidden(width, Columns(first), second, activation.apply_),
                out=out,
                add=of_sample.add,
                plan=plan,
            )


class LeanSingle(_Lean):
    """A SingleStreamBlock in pieces: its feed-forward is computed where it joins the attention."""

    STREAMS = ("x",)
    KNOWN = ("vec", "pe", "transformer_options")

    def _is_untouched(self) -> bool:
        (block,) = self.stock
        return (
            is_stock(block, layers.SingleStreamBlock)
            and is_stock(block.norm, layers.QKNorm)
            and is_stock(block.mlp_act, type(block.mlp_act))
            and not getattr(block, "yak_mlp", False)
        )

    def _modulations(self, vec: Any) -> list[Any]:
        (block,) = self.stock
        return [vec if block.modulation is None else block.modulation(vec)[0]]

    def run(self, *, x, vec, pe, transformer_options=None, **_):
        (block,) = self.stock
        options = transformer_options or {}
        plan = self._plan([x], options)
        heads, dim = self._heads, self.settings.sizes.dim
        activation = _activation_of(block.mlp_act)
        assert activation is not None
        stream = _Modulated(x, block.pre_norm, *self._modulations(vec))
        with ExitStack() as until:
            first = projection(block.linear1, x, until)
            last = projection(block.linear2, x, until)
            width = block.linear2.in_features - dim
            second = Columns(first, 3 * dim + width) if activation.is_gated else None
            hidden = Hidden(width, Columns(first, 3 * dim), second, activation.apply_)
            norm = fetch_layer_norm(block.pre_norm, x, until)
            attend = _attend_of(options, is_grouped=not first.is_whole)
            for sample in range(x.shape[0]):
                of_sample = stream.of(sample, norm)

                def out(
                    attended: torch.Tensor,
                    start: int,
                    modulated: Callable[[int, int], torch.Tensor] = of_sample.modulated,
                ) -> torch.Tensor:
                    stop = start + attended.shape[0]
                    whole = attended.new_empty(attended.shape[0], dim + width)
                    whole[:, :dim] = attended
                    del attended  # before the rows of the feed-forward
                    hidden.write(modulated(start, stop), whole[:, dim:], plan)
                    return last.own(whole)

                part = Part(
                    x[sample],
                    of_sample.modulated,
                    *_packed(first, dim),
                    rotation(
                        _rope(pe, sample),
                        (block.norm.query_norm, block.norm.key_norm),
                        heads.channels,
                        x,
                        until,
                        plan,
                        is_fused=False,
                    ),
                    out=out,
                    add=of_sample.add,
                )
                add_joint_attention([part], attend=attend, heads=heads, plan=plan)
        return clamp_fp16_(x)


class LeanLast(_Lean):
    """The last layer in chunks of tokens."""

    STREAMS = ("x",)
    KNOWN = ("vec",)

    def _is_untouched(self) -> bool:
        return is_stock(self.stock[0], layers.LastLayer)

    def _modulations(self, vec: Any) -> list[Any]:
        (layer,) = self.stock
        made = layer.adaLN_modulation(vec[:, None, :] if vec.ndim == 2 else vec)
        shift, scale = made.chunk(2, dim=-1)
        return [layers.ModulationOut(shift, scale, scale)]

    def run(self, *, x, vec, **_):
        (layer,) = self.stock
        stream = _Modulated(x, layer.norm_final, *self._modulations(vec))
        plan = self._plan([x], {})
        with ExitStack() as until:
            norm = fetch_layer_norm(layer.norm_final, x, until)
            linear = projection(layer.linear, x, until)
            made = x.new_empty(*x.shape[:2], layer.linear.out_features)
            for sample in range(x.shape[0]):
                modulated = stream.of(sample, norm).modulated
                for start, stop in chunks(x.shape[1], plan.chunk_tokens):
                    made[sample, start:stop] = linear(modulated(start, stop))
        return made


FLUX = Family(
    names=("FLUX.1", "FLUX.2"),
    kinds=(flux.Flux,),
    parts={
        layers.DoubleStreamBlock: LeanDouble,
        layers.SingleStreamBlock: LeanSingle,
        layers.LastLayer: LeanLast,
    },
    sizes_of=_sizes_of,
    stacks=("double_blocks", "single_blocks"),
    around=("final_layer",),
    published=lambda sizes: families.FLUX2_DEV if sizes.is_gated else families.FLUX1_DEV,
    is_possible=_is_possible,
)
