"""What the campaign makes of measured rows: medians, predictions, factors."""

from __future__ import annotations

import pytest
from pack.benchmarks.card.parts import predicted
from pack.benchmarks.card.variants import DEFAULT, HOST

MIB = 2**20


def row(variant: str, **more):
    return {"part": "denoiser", "case": "1024x1024x1", "variant": variant, "error": None, **more}


def test_loading_by_estimate_comes_before_dynamic_vram_and_its_median_is_a_measured_value():
    known = [
        row(HOST, mode="dynamic VRAM", peak_bytes=99),
        *(row(HOST, mode="loading by estimate", peak_bytes=count) for count in (5, 1, 3, 2)),
    ]
    [found] = predicted.medians(known, "denoiser")
    assert found.peak_bytes == 2


def test_rows_with_errors_and_of_other_parts_are_left_out():
    known = [
        row(HOST, peak_bytes=None, **{"error": "out of memory"}),
        {**row(HOST, peak_bytes=7), "part": "vae"},
        {**row("ended"), "case": "leg"},
    ]
    assert predicted.medians(known, "denoiser") == []


@pytest.mark.parametrize(
    ("variant", "spare", "wanted"), [(DEFAULT, 0, [1.5]), (DEFAULT, 50, [1.0]), (HOST, 0, [])]
)
def test_the_factor_over_the_prediction_is_asked_of_our_nodes_alone(variant, spare, wanted):
    known = [row(variant, peak_bytes=90, reserved_bytes=1150, weights_bytes=1000)]
    [found] = predicted.medians(known, "denoiser")
    assert list(predicted.reserved_factor(found, 100, spare_bytes=spare)) == wanted


def test_without_a_card_there_is_no_factor():
    [found] = predicted.medians([row(DEFAULT, peak_bytes=None)], "denoiser")
    assert list(predicted.reserved_factor(found, 100)) == []


def test_predictions_are_those_of_the_pack_for_the_settings_of_each_variant():
    from pack.nodes.denoiser.need import denoiser_live_bytes
    from pack.nodes.denoiser.peak import stock_peak_bytes
    from pack.nodes.denoiser.sizes import Request
    from pack.nodes.fit.stages import head_groups, published_models, vae_stage

    models, request = published_models(), Request(64, 64, 1, 256)
    shape = Request(1024, 1024, 1, 256)
    fast, middle, small = head_groups(models.denoiser)

    def of(variant: str, case: str = "1024x1024x1") -> int | None:
        found = predicted.Measured(case, variant, None, None)
        return predicted.denoiser_bytes(found, models, request)

    assert of(HOST) == stock_peak_bytes(shape)
    assert of(DEFAULT) == denoiser_live_bytes(shape, fast, is_plain=True)
    assert of("Fit to VRAM speed") is None  # it plans by what is free
    assert of("+ Attention Slice auto") == denoiser_live_bytes(shape, middle, is_plain=True)
    assert of("+ Attention Slice max") == denoiser_live_bytes(shape, small, is_plain=True)
    assert of(HOST, "1024x1024x1 fp8") is None

    decode = predicted.Measured("1024x1024x1 decode", "Lean VAE speed", None, None)
    stage = vae_stage(models, shape, "speed")
    assert predicted.vae_bytes(decode, models, request) == stage.activation_bytes
    stock = decode._replace(variant=HOST)
    assert predicted.vae_bytes(stock, models, request) == stage.stock_bytes
    tiled = decode._replace(variant="VAEDecodeTiled")
    assert predicted.vae_bytes(tiled, models, request) is None
