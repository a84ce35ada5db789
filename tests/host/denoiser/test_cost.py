"""The cost model against what the blocks ask of a card, at full size on fake tensors."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from pack.nodes.denoiser.cost import block_work
from pack.nodes.denoiser.plan import DenoiserChoice, denoiser_plan
from pack.nodes.denoiser.sizes import Z_IMAGE, Request
from pack.testing import lean_models
from pack.testing.launches import run_main_block
from pack.testing.stock_forward import FakeDenoiser

# Of operations in place that comfy-kitchen fuses, the fake tensors show the reads alone.
BYTES_APART = 0.03
CASES = [
    (Request(1024, 1024), None),
    (Request(512, 512, 2), None),
    (Request(1024, 1024), DenoiserChoice("speed")),
    (Request(1024, 1024), DenoiserChoice("balance")),
    (Request(512, 768, 2, 77), DenoiserChoice("balance", 3)),
    (Request(512, 512), DenoiserChoice("smallest")),
    (Request(1024, 1024), DenoiserChoice("balance", 7, 512)),
]


@pytest.fixture(scope="module")
def denoiser(host: Any) -> FakeDenoiser:
    return FakeDenoiser(dataclasses.replace(Z_IMAGE, layers=2, refiner_layers=0))


@pytest.mark.parametrize(("request_", "choice"), CASES, ids=str)
def test_work_of_a_block_is_as_counted(
    denoiser: FakeDenoiser, request_: Request, choice: DenoiserChoice | None
) -> None:
    from pack.nodes.host.denoiser.heads import IS_FUSED

    patcher, plan = denoiser.patcher(), None
    if choice is not None:
        patcher = lean_models.lean(
            patcher, chunk_tokens=choice.chunk_tokens, head_groups=choice.groups,
            prefer=choice.prefer,
        )  # fmt: skip
        plan = denoiser_plan(request_, choice)
    counted = run_main_block(denoiser, request_, patcher, attention="flash").block
    work = block_work(request_, plan)
    assert work.flops == counted.flops
    if IS_FUSED:
        assert work.launches == counted.launches
        assert work.moved_bytes == pytest.approx(counted.moved_bytes, rel=BYTES_APART)
