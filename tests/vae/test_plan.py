"""The plans of Lean VAE, and what follows from their sizes alone."""

from __future__ import annotations

from itertools import pairwise

import pytest
from pack.nodes.vae.peak import lean_vae_peak_bytes, stock_vae_peak_bytes
from pack.nodes.vae.plan import PREFERENCES, VaeCall, VaePlan, VaeSizes, vae_plan

FLUX = VaeSizes()
MIB = 2**20


def _call(side: int = 1024, *, sizes: VaeSizes = FLUX, has_ram: bool = False) -> VaeCall:
    return VaeCall(sizes, side, side, 2, has_ram)


def _plan(call: VaeCall, **options: object) -> VaePlan:
    plan = vae_plan(call, **{"prefer": "balance", **options})  # type: ignore
    assert plan is not None
    return plan


def test_each_preference_holds_less() -> None:
    stock = stock_vae_peak_bytes(_call())
    assert round(stock / MIB) == 1286  # and the strips of the latent; FACTS: 1296
    for has_ram in (False, True):
        call = _call(has_ram=has_ram)
        peaks = [lean_vae_peak_bytes(call, _plan(call, prefer=prefer)) for prefer in PREFERENCES]
        assert peaks == sorted(peaks, reverse=True)
        assert peaks[0] < 0.5 * stock
        assert len(set(peaks)) == 3


def test_an_encoder_stays_below_the_shares_of_a_decoder() -> None:
    sizes = VaeSizes(is_decoder=False, widths=(128, 256, 512, 512), blocks=2, latent_channels=32)
    for side in (1024, 2048, 4096):
        call = _call(side, sizes=sizes)
        stock = stock_vae_peak_bytes(call)
        for prefer, share in (("speed", 0.594), ("balance", 0.332), ("smallest", 0.23)):
            assert lean_vae_peak_bytes(call, _plan(call, prefer=prefer)) < share * stock


def test_the_peak_grows_with_the_picture() -> None:
    for prefer in PREFERENCES:
        calls = [_call(side, has_ram=True) for side in (512, 1024, 2048, 4096)]
        peaks = [lean_vae_peak_bytes(call, _plan(call, prefer=prefer)) for call in calls]
        assert all(1.8 < b / a < 4.2 for a, b in pairwise(peaks)), peaks


def test_retries_shrink_and_end() -> None:
    plans, call = [], _call(2048)
    while (plan := vae_plan(call, prefer="speed", attempt=len(plans))) is not None:
        plans.append(plan)
    assert [p.prefer for p in plans] == sorted((p.prefer for p in plans), key=PREFERENCES.index)
    assert {p.prefer for p in plans} == set(PREFERENCES)
    peaks = [lean_vae_peak_bytes(call, p) for p in plans]
    assert peaks[0] > 3 * peaks[-1]
    for one, two in pairwise(plans):
        assert one != two
        assert two.levels[-1].limit <= one.levels[-1].limit


def test_strip_rows_are_those_at_the_pictures_size() -> None:
    assert _plan(_call(), strip_rows=24).levels[-1].limit == 24
    assert _plan(_call(), strip_rows=1).levels[-1].limit >= 1


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"prefer must be one of .*, got 'fast'"):
        _plan(_call(), prefer="fast")
    with pytest.raises(ValueError, match="strip_rows must be >= 0, got -1"):
        _plan(_call(), strip_rows=-1)
    with pytest.raises(ValueError, match="widths and blocks must be >= 1"):
        VaeSizes(widths=())
