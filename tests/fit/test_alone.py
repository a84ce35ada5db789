"""The plan of the same run on ComfyUI alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
from pack.nodes.denoiser.peak import stock_peak_bytes
from pack.nodes.denoiser.sizes import Request
from pack.nodes.fit.alone import alone
from pack.nodes.fit.stages import published_models
from pack.nodes.fit.what_fits import WHOLE_RUN, Run, fit

GIB = 2**30
MODELS = published_models()


def test_every_stage_holds_what_comfyui_holds_and_is_judged():
    plan = fit(MODELS, Request(1024, 1024), 8 * GIB, run=Run(has_encode=True))
    stock = alone(plan)
    assert [s.name for s in stock.stages] == [s.name for s in plan.stages]
    assert {s.setting for s in stock.stages} == {"ComfyUI's own"}
    assert all(s.is_judged and s.activation_bytes == s.stock_bytes for s in stock.stages)
    shown = [s.stock_bytes for s in plan.stages]
    assert [s.stock_bytes for s in stock.stages] == shown
    assert stock.stage("denoise").activation_bytes == stock_peak_bytes(plan.request)
    assert stock.budget_bytes == plan.budget_bytes and stock.request == plan.request


@pytest.mark.parametrize("side", [1024, 2048])
def test_workspaces_get_the_same_allowance_as_ours(side):
    plan = fit(MODELS, Request(side, side), None, prefer="speed")
    for ours, stock in zip(plan.stages, alone(plan).stages, strict=True):
        spare = 64 * 2**20 if ours.name.startswith("VAE") else 0
        share = (ours.workspace_bytes - spare) / ours.activation_bytes
        expected = share * stock.activation_bytes + spare
        assert stock.workspace_bytes == pytest.approx(expected, rel=1e-6, abs=2)


def test_a_decode_that_would_fall_back_to_tiles_does_not_fit():
    plan = fit(MODELS, Request(2560, 2560), 8 * GIB)
    assert plan.verdict == "fits"
    assert alone(plan).verdict == "too large"
    assert alone(plan).missing_bytes > 3 * GIB
    without = fit(MODELS, Request(2560, 2560), 8 * GIB, run=Run(has_decode=False))
    assert alone(without).verdict == "fits"


def test_prompts_in_one_call_and_what_the_host_keeps_free_count():
    request = Request(1024, 1024)
    one = alone(fit(MODELS, request, None)).stage("denoise")
    two = alone(fit(MODELS, request, None, run=Run(prompts=2))).stage("denoise")
    assert two.activation_bytes > 1.7 * one.activation_bytes
    kept = alone(fit(MODELS, request, None, run=Run(least_need_bytes=3 * GIB))).stage("denoise")
    assert kept.need_bytes == 3 * GIB > one.need_bytes
    no_text = alone(fit(MODELS, request, None, run=replace(WHOLE_RUN, has_text=False)))
    assert [s.name for s in no_text.stages] == ["denoise", "VAE decode"]
