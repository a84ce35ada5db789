"""The limit on a model's pages: set for each sampling, lifted however the sampling ends.

Pages are the NVIDIA driver's, so they are the one part that stands in for the real one here.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pack.testing import lean_models
from pack.testing.lean_models import sample

pytestmark = pytest.mark.usefixtures("host")
WHOLE = 2**40


class Pages:
    """The pages of a model on a card, by the two names of comfy_aimdo's ModelVBAR that we use."""

    max_size = WHOLE

    def __init__(self) -> None:
        self.limits: list[int] = []

    def set_watermark(self, size_bytes: int) -> None:
        self.limits.append(size_bytes)


@pytest.fixture(scope="module")
def loaded(host: Any, small_folder: Path) -> Any:
    return lean_models.from_loader(host, small_folder).model


@pytest.fixture
def pages(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> Pages:
    """Pages for the loaded model, with its CPU taken for a card."""
    from pack.nodes.host.fit import budget

    monkeypatch.setattr(budget, "is_card", lambda device: True)
    monkeypatch.setattr(budget, "is_dynamic", lambda patcher: True)
    made = Pages()
    vbars = {loaded.load_device: made}
    monkeypatch.setattr(loaded.model, "dynamic_vbars", vbars, raising=False)
    return made


def limited(model: Any) -> tuple[Any, int]:
    """The model with a budget that keeps part of its weights off the card; and their limit."""
    from pack.nodes.denoiser.sizes import Request
    from pack.nodes.host.fit.inputs import planner_for
    from pack.nodes.host.fit.patch import with_plan

    planner = planner_for(
        model, Request(384, 384), named_bytes=0, prefer="speed", vae=None, latent=None,
        conditioning=lean_models.prompt(),
    )  # fmt: skip
    stage = planner.plan(planner.request, None).stage("denoise")
    budget_bytes = stage.least_bytes + stage.weight_bytes // 4
    assert budget_bytes < stage.need_bytes + stage.weight_bytes
    planned = with_plan(model, replace(planner, named_bytes=budget_bytes), None)
    return planned, stage.resident_bytes(budget_bytes)


def test_the_limit_holds_while_a_sampling_runs_and_no_longer(loaded: Any, pages: Pages) -> None:
    from comfy.patcher_extension import WrappersMP

    during: list[list[int]] = []

    def note(executor: Any, *args: Any, **kwargs: Any) -> Any:
        during.append(list(pages.limits))
        return executor(*args, **kwargs)

    patched, limit = limited(loaded)
    patched.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, "test", note)
    sample(patched)
    sample(patched)
    assert 0 < limit < loaded.model_size()
    assert during == [[limit], [limit, WHOLE, limit]]
    assert pages.limits == [limit, WHOLE] * 2


@pytest.mark.parametrize("is_cancelled", [False, True], ids=["error", "cancel"])
def test_the_limit_is_lifted_where_a_sampling_does_not_end(
    loaded: Any, pages: Pages, is_cancelled: bool
) -> None:
    """It stayed: every later sampling of the model streamed weights that the card had room for."""
    import comfy.model_management as management
    from comfy.patcher_extension import WrappersMP

    def fail(executor: Any, *args: Any, **kwargs: Any) -> Any:
        executor(*args, **kwargs)
        if not is_cancelled:
            raise RuntimeError("in the middle")
        management.interrupt_current_processing()
        management.throw_exception_if_processing_interrupted()

    error = management.InterruptProcessingException if is_cancelled else RuntimeError
    # In the first step, and after the limit was set but before there is a step.
    for kind in (WrappersMP.DIFFUSION_MODEL, WrappersMP.PREPARE_SAMPLING):
        pages.limits.clear()
        failing = loaded.clone()
        failing.add_wrapper_with_key(kind, "test", fail)
        patched, limit = limited(failing)
        with pytest.raises(error):
            sample(patched)
        assert pages.limits == [limit, WHOLE], kind
        patched.remove_wrappers_with_key(kind, "test")
        sample(patched)
        assert pages.limits == [limit, WHOLE] * 2, "planned again after the failure"
