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
    from pack.nodes.denoiser.plan import DenoiserChoice, denoiser_plan
    from pack.nodes.denoiser.sizes import Request
    from pack.nodes.fit.stages import published_models, vae_stage

    models, request = published_models(), Request(64, 64, 1, 256)
    shape = Request(1024, 1024, 1, 256)

    def of(variant: str, case: str = "1024x1024x1") -> int | None:
        found = predicted.Measured(case, variant, None, None)
        return predicted.denoiser_bytes(found, models, request)

    def live(choice: DenoiserChoice) -> int:
        return denoiser_live_bytes(shape, denoiser_plan(shape, choice), is_plain=True).plain

    assert of(HOST) == stock_peak_bytes(shape)
    assert of(DEFAULT) == live(DenoiserChoice())
    assert of("Fit to VRAM speed") is None  # it plans by what is free
    assert of("+ Attention Slice auto") == live(DenoiserChoice(groups=3))  # 10 heads in a group
    assert of("+ Attention Slice max") == live(DenoiserChoice("smallest"))
    assert of(HOST, "1024x1024x1 fp8") is None

    decode = predicted.Measured("1024x1024x1 decode", "Lean VAE speed", None, None)
    stage = vae_stage(models, shape, "speed")
    assert predicted.vae_bytes(decode, models, request) == stage.activation_bytes
    stock = decode._replace(variant=HOST)
    assert predicted.vae_bytes(stock, models, request) == stage.stock_bytes
    tiled = decode._replace(variant="VAEDecodeTiled")
    assert predicted.vae_bytes(tiled, models, request) is None


@pytest.mark.parametrize(
    ("variant", "case", "device", "wanted"),
    [
        (HOST, "1024x1024x1", "NVIDIA GeForce RTX 4060", True),
        (HOST, "1024x1024x1", "NVIDIA H100 80GB HBM3", True),
        (DEFAULT, "1024x1024x1", "NVIDIA GeForce RTX 4060", False),
        (HOST, "1024x1024x1 fp8", "NVIDIA GeForce RTX 4060", False),
        (HOST, "1024x1024x1", "A card without a data sheet", False),
    ],
)
def test_the_share_that_is_reached_is_asked_of_the_host_on_known_cards(
    variant, case, device, wanted
):
    """A step that takes twice as long as modelled reaches half of what the model has."""
    from pack.nodes.denoiser.cost import H100, REACHED, RTX_4060, seconds, step_work
    from pack.nodes.denoiser.sizes import Request

    request = Request(1024, 1024, 1, 256)
    card = H100 if "H100" in device else RTX_4060
    step_s = 2 * seconds(step_work(request, None), card)
    found = predicted.Measured(case, variant, None, None, step_s)
    shares = list(predicted.reached_share(found, request, device))
    assert shares == ([pytest.approx(REACHED / 2)] if wanted else [])
