"""What products with weights in fewer bits hold, by hand at the sizes of FLUX.2."""

from __future__ import annotations

import pytest
from pack.nodes.denoiser.cuts import DenoiserPlan
from pack.nodes.denoiser.plan import DenoiserChoice, plan_for
from pack.nodes.denoiser.products import (
    BALANCE_COPY,
    LEAST_COPY,
    SPEED_COPY,
    columns_at_a_time,
    product_elements,
)
from pack.nodes.denoiser.sizes import TransformerSizes

DIM, FFN = 6144, 18432


def sizes(**stored: int) -> TransformerSizes:
    return TransformerSizes(
        dim=DIM, heads=48, kv_heads=48, ffn_dim=FFN, is_parallel=True, stock_elements=17 * DIM,
        **stored,  # type: ignore[arg-type]
    )  # fmt: skip


def test_plain_weights_hold_nothing_besides() -> None:
    assert product_elements(sizes(), DenoiserPlan(1, 64, 64), 1000, DIM, FFN) == 0


@pytest.mark.parametrize(("bits", "of_rows"), [(8, 0.5), (4, 0.25), (0, 0)])
def test_rows_as_they_are_quantised_and_columns_that_are_then_written(
    bits: int, of_rows: float
) -> None:
    of, plan = sizes(is_quantised=True, row_bits=bits), DenoiserPlan(1, 64, 64)
    assert product_elements(of, plan, 1000, DIM, FFN, is_written=False) == 1000 * DIM * of_rows
    assert product_elements(of, plan, 1000, DIM, FFN) == 1000 * (DIM * of_rows + FFN)


def test_a_copy_of_as_many_columns_as_live_at_a_time() -> None:
    of, plan = sizes(is_copied=True), DenoiserPlan(1, 64, 64, copy_elements=2**23)
    assert columns_at_a_time(DIM, 2**23) == 1280
    assert product_elements(of, plan, 1000, DIM, FFN) == 1280 * DIM
    assert product_elements(of, plan, 1000, DIM, 512) == 512 * DIM
    assert product_elements(of, plan, 1000, DIM + FFN, DIM) == 256 * (DIM + FFN)
    whole = sizes(is_copied=True, is_whole=True)
    assert product_elements(whole, plan, 1000, DIM, FFN) == FFN * DIM


def test_columns_where_even_few_have_more_elements_and_where_none_are_named() -> None:
    assert columns_at_a_time(10**6, 2**23) == 256
    assert columns_at_a_time(DIM, 0) > 10**9


@pytest.mark.parametrize(
    ("choice", "elements"),
    [
        (DenoiserChoice("speed"), SPEED_COPY),
        (DenoiserChoice(), BALANCE_COPY),
        (DenoiserChoice("smallest"), LEAST_COPY),
        (DenoiserChoice(chunk_tokens=1024), LEAST_COPY),
    ],
)
def test_the_plan_says_how_much_of_a_weight_is_copied(
    choice: DenoiserChoice, elements: int
) -> None:
    plan = plan_for(sizes(is_copied=True), 1, (4608,), choice)
    assert plan.copy_elements == elements
    assert plan.parallel is not None and plan.parallel.copy_elements == elements
    assert plan_for(sizes(), 1, (4608,), choice).copy_elements == 0
