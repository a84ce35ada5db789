"""One watched sampling: the peaks of its steps, also where the counter stood higher before."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pack.testing.lean_models import OVERRIDE, sample
from pack.testing.probe_prompts import MIB, can_reset, resident

pytestmark = pytest.mark.usefixtures("host")
KEEP, RESET = "measure", "measure and reset peak"
AT_LEAST = "at least"
CALLS = 6  # of the attention, in a step


@pytest.fixture(autouse=True)
def _calm() -> Iterator[None]:
    """One thread, and nothing of earlier tests that goes while a sampling is measured."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.collect()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def reset() -> Callable[[], None]:
    """Sets the process' peak back, as any reader may."""
    from pack.nodes.host.probe import device as probe_device

    if not can_reset():
        pytest.skip("this system does not let a process set its peak back")
    act = probe_device.gauge_of(torch.device("cpu")).reset
    assert act is not None
    return act


def growing(model: Any, mib: int, *, first_mib: int | None = None) -> Any:
    """A clone that takes so much memory for a moment in the first attention call of each step.

    Args:
        model: left as it is.
        mib: in each step.
        first_mib: in the very first step instead.
    """
    clone = model.clone()
    steps = itertools.chain([mib if first_mib is None else first_mib], itertools.repeat(mib))
    sizes = (size for step in steps for size in (step, *[0] * (CALLS - 1)))

    def override(function: Any, *args: Any, **kwargs: Any) -> Any:
        if size := next(sizes):
            resident(size)
        return function(*args, **kwargs)

    clone.model_options["transformer_options"][OVERRIDE] = override
    return clone


def record_of(
    model: Any, *, loading_mib: int = 0, mode: str = KEEP, detail: Any = "steps"
) -> dict[str, Any]:
    """Samples two steps behind a probe.

    Args:
        model: that is sampled.
        loading_mib: so much its loading takes for a moment.
        mode: the probe's.
        detail: the probe's.
    """
    from comfy.patcher_extension import WrappersMP
    from pack.nodes.host.probe.settings import ProbeSettings
    from pack.nodes.host.probe.wrappers import with_probe

    def loading(executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if loading_mib:
            resident(loading_mib)
        return executor(*args, **kwargs)

    reset_progress_state()
    settings = ProbeSettings("", mode, detail, False, None)
    watched = with_probe(model, settings)
    watched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "test", loading)
    sample(watched, steps=2)
    return settings.live


def reset_progress_state() -> None:
    """As for a new prompt: the watch of the one before goes, and its counters with it."""
    from comfy_execution import progress
    from comfy_execution.graph import DynamicPrompt

    progress.reset_progress_state("", DynamicPrompt({}))


def rises(record: dict[str, Any]) -> list[float]:
    """MiB of each step's peak above what the sampling began with."""
    began = sum(record["timeline"][0][1:4])
    return [(step["peak_bytes"] - began) / MIB for step in record["steps"]]


@pytest.mark.parametrize("mode", [KEEP, RESET])
def test_the_first_step_has_its_own_peak_below_that_of_the_loading(loaded, reset, mode):
    """Bug: the counter was not reset in front of step 1, which then had only its readings."""
    reset()
    seen = record_of(growing(loaded.model, 100), loading_mib=300, mode=mode, detail="steps")
    assert all(95 < rise < 200 for rise in rises(seen)), rises(seen)
    assert len(seen["steps"]) == 2
    assert seen["peak_at"]["step"] is None, "the loading was the highest"
    assert not any(AT_LEAST in note for note in seen["notes"])


def test_the_first_step_has_its_own_peak_below_one_of_an_earlier_run(loaded, reset):
    reset()
    resident(300)
    seen = record_of(growing(loaded.model, 100), mode=KEEP, detail="steps")
    assert all(95 < rise < 200 for rise in rises(seen)), rises(seen)


@pytest.mark.parametrize("detail", ["totals", "steps"])
def test_a_peak_below_where_the_counter_stood_is_said_to_be_the_least(loaded, reset, detail):
    """Bug: with steps nothing was said, though the loading was only read."""
    reset()
    resident(300)
    seen = record_of(loaded.model, loading_mib=200, mode=KEEP, detail=detail)
    assert [note for note in seen["notes"] if AT_LEAST in note]
    assert AT_LEAST in seen["report"]


@pytest.mark.parametrize("detail", ["totals", "steps"])
@pytest.mark.parametrize("mode", [KEEP, RESET])
def test_a_peak_that_was_seen_is_not_said_to_be_the_least(loaded, reset, mode, detail):
    reset()
    resident(100)
    seen = record_of(growing(loaded.model, 250), mode=mode, detail=detail)
    assert seen["peak_bytes"] - sum(seen["timeline"][0][1:4]) > 245 * MIB
    assert not any(AT_LEAST in note for note in seen["notes"])


def test_a_steps_peak_below_that_of_another_is_the_least_where_nothing_is_reset(
    loaded, reset, monkeypatch
):
    """Bug: with steps nothing was said, though step 2 had only its readings."""
    from pack.nodes.host.probe import device as probe_device

    reset()
    # As on a system where the peak of a process stays.
    monkeypatch.setattr(probe_device, "_CLEAR_REFS", Path("not here"))
    model = growing(loaded.model, 100, first_mib=300)
    seen = record_of(model, mode=RESET)
    assert 295 < rises(seen)[0] < 400
    assert rises(seen)[1] < 95
    assert [note for note in seen["notes"] if AT_LEAST in note]
