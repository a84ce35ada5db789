"""Weights that stream, with the host's own prefetch queue and without: see testing/streamed.py."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import count, pairwise
from typing import Any
from unittest import mock

import pytest
import torch
from pack.nodes.denoiser.cost import WAITING
from pack.nodes.denoiser.sizes import Z_IMAGE, Request
from pack.nodes.fit.stages import Models, denoise_stages
from pack.nodes.host.base.options import PREFETCH
from pack.nodes.units import GIB, MIB
from pack.testing import lean_models
from pack.testing.control_models import fake_controlled
from pack.testing.fake_card import FakeCard, on_fake_card
from pack.testing.stock_forward import FakeDenoiser
from pack.testing.streamed import DEVICE, Access, Streamed

pytestmark = [pytest.mark.usefixtures("host"), pytest.mark.once]
SIZES = dataclasses.replace(Z_IMAGE, layers=3, refiner_layers=1)
BLOCKS = SIZES.layers + 2 * SIZES.refiner_layers
REQUEST = Request(512, 512, 1, 256)
NOTHING, ALL_QKV, ALL = 0, 5 * 96 * MIB, 4 * GIB


def on_card(size_bytes: int = 4 * GIB) -> Streamed:
    return Streamed(FakeCard(size_bytes), FakeDenoiser(SIZES, weights="streamed"))


def lean(model: Any, chunk_tokens: int = 0) -> Any:
    return lean_models.lean(model, chunk_tokens=chunk_tokens, head_groups=0)


def blocks_of(model: Any) -> dict[int, Any]:
    """By their place in the forward; not the first, whose accesses come with the embedders'."""
    denoiser = model.model.diffusion_model
    return dict(enumerate([*denoiser.noise_refiner, *denoiser.layers], SIZES.refiner_layers))


def copied_bytes(accesses: Sequence[Access]) -> Counter[int]:
    """What is copied to the card, by the block that is computed next."""
    fetches = {(a.block, a.fetch): a.end - a.begin for a in accesses if a.is_write}
    found: Counter[int] = Counter()
    for (block, _), size in fetches.items():
        found[block] += size
    return found


def weight_bytes(block: Any) -> int:
    """Of the layers that may have a page: the host keeps smaller ones on the card."""
    layers = (layer for layer in block.modules() if hasattr(layer, "_v"))
    return sum(layer.weight.nbytes + getattr(layer.bias, "nbytes", 0) for layer in layers)


@pytest.mark.parametrize(
    ("limit", "prefetches"),
    [(NOTHING, True), (NOTHING, False), (ALL_QKV, True), (ALL, True)],
)
@on_fake_card
def test_each_weight_is_fetched_once_a_step_and_never_overwritten(
    host: Any, limit: int, prefetches: bool
) -> None:
    """Also by the copies of the blocks around it. What has a page is copied in the first step."""
    streamed = on_card()
    model = lean(streamed.patcher, chunk_tokens=256)
    streamed.load(model, limit)
    for step in range(2):
        accesses = streamed.forward(model, REQUEST, **{PREFETCH: prefetches})
        assert streamed.order.faults == []
        resident = streamed.pages.loaded_size()
        assert resident <= limit
        copied = copied_bytes(accesses)
        for index, block in blocks_of(model).items():
            whole = weight_bytes(block)
            if step == 0 or limit == NOTHING:
                assert copied[index] == whole
            else:
                assert copied[index] < whole
        if step and limit:
            qkv = 2 * SIZES.dim * SIZES.qkv_dim
            assert copied[BLOCKS - 1] == (whole - qkv if limit == ALL_QKV else 0)


@on_fake_card
def test_a_block_is_copied_while_the_one_before_computes(host: Any) -> None:
    """Bug: nothing was, so that large cards waited for most of each block's weights.

    Copies of a block wait for the block before the last one, whose buffer they write over, and for
    nothing of the last one. They are in another stream than those before. The CPU asks for them
    once it has issued the block before; how far it is ahead of the card is not seen here.
    """
    streamed = on_card()
    model = lean(streamed.patcher)
    streamed.load(model, NOTHING)
    accesses = streamed.forward(model, REQUEST, **{PREFETCH: True})
    streams = []
    for index in range(2, BLOCKS):
        here = [access for access in accesses if access.block == index]
        copies = [access for access in here if access.is_write]
        assert here[: len(copies)] == copies, "all that the block reads is on its way"
        streams.append({access.stream for access in copies})
        before = [a for a in accesses if a.block == index - 1 and not a.is_write]
        assert all(not copy.is_after(read) for copy in copies for read in before)
        earlier = [a for a in accesses if a.block == index - 2 and not a.is_write]
        assert all(copy.is_after(read) for copy in copies for read in earlier)
    assert all(len(found) == 1 for found in streams)
    assert all(a != b for a, b in pairwise(streams))


@on_fake_card
def test_without_prefetch_copies_of_qkv_w2_and_w3_hide_behind_nothing(host: Any) -> None:
    """What the cost model assumes: at most a norm or one chunk's product runs beside them."""
    streamed = on_card()
    model = lean(streamed.patcher, chunk_tokens=256)
    streamed.load(model, NOTHING)
    accesses = streamed.forward(model, REQUEST, **{PREFETCH: False})
    compute, waits, whole = streamed.order.compute, 0, 0
    copies = {a.fetch: a for a in accesses if a.is_write and 1 < a.block < BLOCKS}
    for read in accesses:
        copy = None if read.is_write else copies.pop(read.fetch, None)
        if copy is not None:
            size, beside = copy.end - copy.begin, read.clock[compute] - copy.clock[compute]
            whole += size
            waits += size if beside < 10 else 0
    assert not copies and waits / whole == pytest.approx(WAITING, abs=5e-3)


@pytest.mark.parametrize(("budget_gib", "prefetches"), [(1.0, True), (1.0, False), (1.5, True)])
@on_fake_card
def test_pages_and_buffers_are_no_more_than_the_plan_says(
    host: Any, budget_gib: float, prefetches: bool
) -> None:
    """Of pages and buffers together, whenever one is asked for; at full width."""
    from pack.nodes.denoiser.plan import DenoiserChoice

    streamed, budget = on_card(), int(budget_gib * GIB)
    model = lean(streamed.patcher)
    models = Models(streamed.patcher.model_size(), 1, 1, denoiser=SIZES, has_prefetch=prefetches)
    request = dataclasses.replace(REQUEST, sizes=SIZES)
    stage = denoise_stages(models, request)[DenoiserChoice("balance")].within(budget)
    assert stage.prefetches == prefetches and stage.resident_bytes(budget) < stage.weight_bytes
    streamed.load(model, stage.resident_bytes(budget))
    used: list[int] = []
    streamed.order.on_fetch = lambda: used.append(streamed.card.used_bytes)
    for _ in range(2):
        streamed.forward(model, REQUEST, **{PREFETCH: prefetches})
    planned = stage.weights_on_card_bytes(budget) - stage.copy_bytes
    assert 0.6 * planned < max(used) <= planned


@pytest.mark.parametrize("at", ["block", "copy"])
@on_fake_card
def test_an_error_leaves_nothing_for_the_next_forward(host: Any, at: str) -> None:
    """Else it would compute with what lies in the buffers, which is another block by then.

    In a block; or in the copies to it, at which the host's queue does not yet know that block.
    """
    from comfy import model_management, model_prefetch

    def fail(module: Any, args: Any) -> None:
        raise InterruptedError

    streamed = on_card()
    model = lean(streamed.patcher)
    streamed.load(model, ALL if at == "block" else ALL_QKV)
    with ExitStack() as undo:
        if at == "block":  # a part that our blocks call as a module
            part = blocks_of(model)[2].adaLN_modulation
            undo.callback(part.register_forward_pre_hook(fail).remove)
        else:
            copy, calls = model_management.cast_to_gathered, count(1)

            def failing(*args: Any, **kwargs: Any) -> Any:
                if next(calls) == 18:
                    raise InterruptedError
                return copy(*args, **kwargs)

            undo.enter_context(mock.patch.object(model_management, "cast_to_gathered", failing))
        with pytest.raises(InterruptedError):
            streamed.forward(model, REQUEST, **{PREFETCH: True})
    layers = list(streamed.denoiser.model.modules())
    assert not [layer for layer in layers if hasattr(layer, "_prefetch")]
    assert model_prefetch.PREFETCH_QUEUES == []
    assert not any(page & 2 for page in streamed.pages.get_residency()), "no page stays pinned"
    streamed.end_node()
    streamed.forward(model, REQUEST, **{PREFETCH: True})
    assert streamed.order.faults == []


@on_fake_card
def test_without_a_plan_a_card_must_have_room_for_two_blocks(host: Any) -> None:
    streamed = on_card()
    model = lean(streamed.patcher)
    streamed.load(model, NOTHING)
    for gib, prefetches in ((2.5, False), (3.0, True)):
        streamed.card.size_bytes = int(gib * GIB)
        block = [a.is_write for a in streamed.forward(model, REQUEST) if a.block == 1]
        assert all(block[:5]) == prefetches


@on_fake_card
def test_a_lora_is_added_once_to_layers_that_are_called_for_each_chunk(host: Any) -> None:
    """Bug: the host adds it to a prefetched weight in its buffer at each call of the layer."""
    import comfy.ops

    class Louder(comfy.ops.disable_weight_init.Linear):
        def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            return 2 * super().forward(*args, **kwargs)

    streamed = on_card()
    layer = streamed.denoiser.model.diffusion_model.layers[1].feed_forward.w1
    layer.__class__ = Louder
    with streamed.denoiser.mode:
        change = (torch.empty_like(layer.weight),)
    model = lean(streamed.patcher, chunk_tokens=256)
    assert model.add_patches({"diffusion_model.layers.1.feed_forward.w1.weight": change})
    streamed.load(model, NOTHING)
    accesses = streamed.forward(model, REQUEST, **{PREFETCH: True})
    compute = streamed.order.compute
    added = [a for a in accesses if a.is_write and a.stream is compute]
    assert len(added) > 1, "one for each chunk"
    assert len({a.fetch for a in added}) == len(added), "each to a weight that was fetched for it"


@pytest.mark.parametrize("prefetches", [True, False])
@on_fake_card
def test_weights_of_a_controlnet_share_the_buffers(host: Any, prefetches: bool) -> None:
    """Its blocks run between ours, and copy each weight by itself into the same two buffers."""
    import comfy.memory_management as memory
    from comfy.model_patcher import ModelPatcherDynamic

    streamed = on_card()
    lean_model = lean(streamed.patcher, chunk_tokens=256)
    memory.aimdo_enabled = False  # else layers begin without weights
    with fake_controlled(streamed.denoiser, lean_model, REQUEST, "lite") as model:
        memory.aimdo_enabled = True
        patches = model.model_options["transformer_options"]["patches"]["double_block"]
        net = patches[0].model_patch.model
        with streamed.denoiser.mode:
            for layer in net.modules():  # to RAM, which `to` refuses for fake ones
                for name, weight in layer.named_parameters(recurse=False):
                    held = torch.empty_like(weight, device="cpu")
                    layer._parameters[name] = torch.nn.Parameter(held, requires_grad=False)
            ModelPatcherDynamic(net, DEVICE, torch.device("cpu")).load(DEVICE)
        net.dynamic_vbars[DEVICE].set_watermark(0)
        streamed.load(model, NOTHING)
        copied = copied_bytes(streamed.forward(model, REQUEST, **{PREFETCH: prefetches}))
    assert streamed.order.faults == []
    first = SIZES.refiner_layers * 2
    more = weight_bytes(net.control_layers[0])
    assert max(copied[first], copied[first + 1]) > weight_bytes(blocks_of(model)[first]) + more // 2
