"""The limit on a model's weights: never exceeded, and lifted however the sampling ends."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pack.nodes.units import GIB, MIB, PAGE_BYTES
from pack.testing import lean_models
from pack.testing.control_models import UNIONS, control_net, controlled, picture
from pack.testing.fake_card import FakeCard, Pages, on_fake_card
from pack.testing.lean_models import prepare, sample

pytestmark = pytest.mark.usefixtures("host")
WEIGHT_BYTES = 100 * MIB
WEIGHTS = 80


@pytest.fixture(scope="module")
def loaded(host: Any, small_folder: Path) -> Any:
    return lean_models.from_loader(host, small_folder).model


@pytest.fixture
def as_card(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's CPU is taken for a card with dynamic VRAM."""
    from pack.nodes.host.fit import budget, inputs

    monkeypatch.setattr(budget, "is_card", lambda device: True)
    for module in (budget, inputs):
        monkeypatch.setattr(module, "is_dynamic", lambda patcher: True)
    monkeypatch.setattr(budget, "weight_bytes", lambda patcher: WEIGHTS * WEIGHT_BYTES)


def pages_of(model: Any, **options: Any) -> Pages:
    """Pages for the model's weights, asked for at each call of it."""
    from comfy.patcher_extension import WrappersMP

    pages = Pages(model, [WEIGHT_BYTES] * WEIGHTS, **options)

    def call(executor: Any, *args: Any, **kwargs: Any) -> Any:
        pages.forward()
        return executor(*args, **kwargs)

    model.remove_wrappers_with_key(WrappersMP.DIFFUSION_MODEL, "test")
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", call)
    return pages


def limited(model: Any, *, share: float = 0.25) -> tuple[Any, int]:
    """The model with a budget for a share of its weights; and their limit."""
    from pack.nodes.denoiser.sizes import Request
    from pack.nodes.host.fit.inputs import planner_for
    from pack.nodes.host.fit.patch import with_plan

    planner = planner_for(
        model, Request(384, 384), named_bytes=0, prefer="speed", vae=None, clip=None,
        latent=None, conditioning=lean_models.prompt(),
    )  # fmt: skip
    stage = planner.plan(planner.request, None).stage("denoise")
    budget_bytes = stage.least_bytes + int(share * stage.weight_bytes)
    assert budget_bytes < stage.need_bytes + stage.weight_bytes
    planner = replace(planner, named_bytes=budget_bytes)
    stage = planner.plan(planner.request, 4 * GIB).stage("denoise")  # as for the budget
    return with_plan(model, planner, None), stage.resident_bytes(budget_bytes)


@pytest.mark.once
@on_fake_card
def test_the_limit_holds_from_step_to_step_and_no_longer(loaded: Any, as_card: None) -> None:
    """Bug: the library rounds up, so a limit that is no multiple of a page was exceeded."""
    FakeCard(16 * GIB)
    pages = pages_of(loaded)
    patched, limit = limited(loaded)
    assert limit % PAGE_BYTES == 0
    for _ in range(2):
        pages.resident.clear()
        sample(patched, steps=3)
        assert len(pages.resident) == 3
        assert len(set(pages.resident)) == 1
        assert limit - WEIGHT_BYTES - PAGE_BYTES < pages.resident[0] <= limit
        assert pages.forward() == pages.load() == WEIGHTS * WEIGHT_BYTES, "no limit is left"


@pytest.mark.once
@on_fake_card
def test_a_controlnets_pages_share_the_limit(
    host: Any, small_folder: Path, loaded: Any, as_card: None
) -> None:
    """Bug: they took what the card had, whatever the budget."""
    FakeCard(24 * GIB)
    vae = lean_models.from_loader(host, small_folder).vae
    net = control_net(dim=384, n_heads=3, n_kv_heads=3, **UNIONS["lite"])
    own, other = pages_of(loaded), Pages(net, [WEIGHT_BYTES] * WEIGHTS)
    net.model.register_forward_pre_hook(lambda *_: other.forward() and None)
    patched, limit = limited(controlled(loaded, net, vae, image=picture(384, 384)))
    sample(patched, steps=2)
    assert len(own.resident) == len(other.resident) == 2
    for used in zip(own.resident, other.resident, strict=True):
        assert 0.8 * limit < sum(used) <= limit
        assert min(used) > 0.3 * limit
    assert other.forward() == WEIGHTS * WEIGHT_BYTES, "no limit is left"


@pytest.mark.once
@pytest.mark.parametrize("is_refused", [False, True])
@pytest.mark.parametrize("is_cancelled", [False, True], ids=["error", "cancel"])
@on_fake_card
def test_the_limit_is_lifted_where_a_sampling_does_not_end(
    loaded: Any, as_card: None, caplog: Any, is_cancelled: bool, is_refused: bool
) -> None:
    """It stayed: every later sampling streamed weights that the card had room for.

    Where the library refuses to lift it, the sampling's own error is the one that is raised.
    """
    import comfy.model_management as management
    from comfy.patcher_extension import WrappersMP

    def fail(executor: Any, *args: Any, **kwargs: Any) -> Any:
        executor(*args, **kwargs)
        if not is_cancelled:
            raise ValueError("in the middle")
        management.interrupt_current_processing()
        management.throw_exception_if_processing_interrupted()

    FakeCard(16 * GIB)
    pages = pages_of(loaded, refused=lambda size: is_refused and size > GIB * 4)
    error = management.InterruptProcessingException if is_cancelled else ValueError
    # In the first step, and after the limit was set but before there is a step.
    for kind in (WrappersMP.SAMPLER_SAMPLE, WrappersMP.PREPARE_SAMPLING):
        failing = loaded.clone()
        failing.add_wrapper_with_key(kind, "test", fail)
        patched, limit = limited(failing)
        caplog.clear()
        with pytest.raises(error):
            sample(patched)
        said = [r.getMessage() for r in caplog.records if "comfy-aimdo refused" in r.getMessage()]
        assert len(said) == is_refused
        assert (pages.forward() <= limit) == is_refused, kind
        assert pages.load() == WEIGHTS * WEIGHT_BYTES


@pytest.mark.once
@on_fake_card
def test_a_limit_that_is_refused_is_said_and_the_sampling_goes_on(
    loaded: Any, as_card: None, caplog: Any
) -> None:
    FakeCard(16 * GIB)
    pages = pages_of(loaded, refused=lambda size: size < GIB * 4)
    patched, _ = limited(loaded)
    with caplog.at_level(logging.WARNING):
        assert torch.isfinite(sample(patched).latent).all()
    assert "nothing is enforced, comfy-aimdo refused the limit: VBAR" in caplog.text
    assert pages.resident == [WEIGHTS * WEIGHT_BYTES]


class Estimated:
    """Models for a card of 4 GiB that the host loads by estimate; what it sends back is noted.

    Device "meta" stands for the card: weights move there and take no memory.
    """

    def __init__(self) -> None:
        self.patchers: list[Any] = []
        self.unloaded: list[float] = []

    def free_and_total(self, device: Any = None) -> tuple[int, int]:
        return 4 * GIB - sum(p.loaded_size() for p in self.patchers), 4 * GIB

    def added(self, patcher: Any) -> Any:
        patcher.load_device = patcher.offload_device = torch.device("meta")
        self.patchers.append(patcher)
        unload = patcher.partially_unload

        def noted(device: Any, memory_to_free: float = 0, *args: Any, **kwargs: Any) -> Any:
            self.unloaded.append(memory_to_free)
            return unload(device, memory_to_free, *args, **kwargs)

        patcher.partially_unload = noted
        return patcher


@pytest.fixture
def estimated(host: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Estimated]:
    import comfy.model_management as management
    from pack.nodes.host.fit import budget

    made = Estimated()
    none = {"active_bytes.all.current": 0, "reserved_bytes.all.current": 0}
    monkeypatch.setattr(torch.cuda, "mem_get_info", made.free_and_total)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device=None: none)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(budget, "is_card", lambda device: device.type == "meta")
    yield made
    management.current_loaded_models.clear()


@pytest.mark.parametrize(
    ("state", "ratio"),
    [("NORMAL_VRAM", 0.0), ("NORMAL_VRAM", 0.4), ("HIGH_VRAM", 0.0)],
    ids=["NVIDIA", "others", "--highvram"],
)
def test_a_host_that_loads_by_estimate_never_goes_beyond_the_limit(
    estimated: Estimated, monkeypatch: pytest.MonkeyPatch, state: str, ratio: float
) -> None:
    """Bug: it loaded all weights, of which those beyond the limit went back at each sampling.

    The other model stays where it is: there is room for it.
    """
    import comfy.model_management as management
    from comfy.model_patcher import ModelPatcher

    monkeypatch.setattr(management, "vram_state", management.VRAMState[state])
    monkeypatch.setattr(management, "MIN_WEIGHT_MEMORY_RATIO", ratio)
    meta = torch.device("meta")
    other = estimated.added(ModelPatcher(torch.nn.Linear(2**10, 2**10), meta, meta))
    management.load_models_gpu([other])
    patched, limit = limited(estimated.added(lean_models.built("ZImage", lean_models.Z_IMAGE)))
    estimated.added(patched)
    del estimated.patchers[1]  # the same weights
    for _ in range(3):
        prepare(patched, torch.empty(1, 16, 48, 48, device="meta"))
        assert 0.7 * limit < patched.loaded_size() <= limit
        assert "partially_load" not in vars(patched)
    assert estimated.unloaded == []
    assert other.loaded_size() == other.model_size()


def test_a_controlnet_that_is_loaded_by_estimate_shares_the_limit(
    host: Any, small_folder: Path, estimated: Estimated
) -> None:
    """Bug: all of its weights were taken off the budget, and more than the budget was refused."""
    vae = lean_models.from_loader(host, small_folder).vae
    net = estimated.added(control_net(**UNIONS["lite"]))
    model = estimated.added(lean_models.built("ZImage", lean_models.Z_IMAGE))
    patched, limit = limited(controlled(model, net, vae, image=picture(384, 384)), share=0.5)
    estimated.added(patched)
    del estimated.patchers[1]  # the same weights
    for _ in range(2):
        prepare(patched, torch.empty(1, 16, 48, 48, device="meta"))
        assert 0.4 * limit < patched.loaded_size() + net.loaded_size() <= limit
        assert 0.1 * limit < net.loaded_size()
        assert "partially_load" not in vars(net)


def test_a_text_encoder_that_is_loaded_by_estimate_keeps_to_its_limit(
    host: Any, small_folder: Path, estimated: Estimated, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where Load CLIP put all of it on the card, and the transformer came in between.

    Bugs: it loaded all weights that the card had room for, whatever the budget; an embedding table
    that was on the card stayed there.
    """
    import comfy.model_management as management
    from pack.nodes.denoiser.sizes import Request
    from pack.nodes.fit.stages import text_stage
    from pack.nodes.host.base import reserve
    from pack.nodes.host.fit.inputs import planner_for
    from pack.nodes.host.fit.text_encoder import table_bytes, token_count, with_limit

    monkeypatch.setattr(reserve, "is_card", lambda device: True)
    own = lean_models.from_loader(host, small_folder)
    clip, model = own.clip, estimated.added(own.model)
    clip.patcher.detach()  # without a card it is loaded at once
    estimated.added(clip.patcher)
    planner = planner_for(
        model, Request(64, 64), named_bytes=0, prefer="smallest", vae=None, clip=clip,
        latent=None, conditioning=None,
    )  # fmt: skip
    management.load_models_gpu([clip.patcher])
    table = clip.cond_stage_model.qwen3_4b.transformer.get_input_embeddings()
    assert clip.patcher.loaded_size() == clip.patcher.model_size() and table.comfy_patched_weights
    stage = text_stage(planner.models, 512, is_limited=True, gathers_rows=True)
    planner = replace(planner, named_bytes=stage.least_bytes + stage.weight_bytes // 2)
    limited = with_limit(clip, planner, clip.patcher.load_device, None, name="test")
    tokens = limited.tokenize("a " * 500)
    plan = planner.decide_text(
        token_count(tokens), None, weight_bytes=clip.patcher.model_size(),
        table_bytes=table_bytes(clip),
    )  # fmt: skip
    assert plan.limit_bytes is not None and plan.gathers_rows
    for _ in range(2):
        with limited._encoding():
            limited.load_model(tokens)
        assert 0.5 * plan.limit_bytes < limited.patcher.loaded_size() <= plan.limit_bytes
        assert not hasattr(table, "comfy_patched_weights")
        assert plan.peak_bytes <= planner.named_bytes
        # Padding tokens and the like, which ComfyUI does not unload.
        assert model.loaded_size() < model.model_size() // 1000
        management.load_models_gpu([model])
        assert model.loaded_size() == model.model_size()


def test_a_run_that_is_loaded_by_estimate_stays_within_its_budget(
    host: Any, small_folder: Path, estimated: Estimated, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By ComfyUI's own accounts: weights of both models and the stage's need, and so again.

    Bug: it counted an embedding table in RAM as loaded, 0.72 GiB of the published one, so that the
    card seemed to have as much more room.
    """
    from pack.nodes.denoiser.sizes import Request
    from pack.nodes.host.base import reserve
    from pack.nodes.host.fit.inputs import planner_for
    from pack.nodes.host.fit.patch import with_plan
    from pack.nodes.host.fit.text_encoder import table_bytes, token_count, with_limit

    monkeypatch.setattr(reserve, "is_card", lambda device: True)
    own = lean_models.from_loader(host, small_folder)
    clip, model = own.clip, estimated.added(own.model)
    clip.patcher.detach()
    estimated.added(clip.patcher)
    planner = planner_for(
        model, Request(384, 384), named_bytes=48 * MIB, prefer="smallest", vae=None, clip=clip,
        latent=None, conditioning=None,
    )  # fmt: skip
    text, denoise, _ = planner.plan(planner.request, 4 * GIB).stages
    limited = with_limit(clip, planner, clip.patcher.load_device, None, name="test")
    patched = estimated.added(with_plan(model, planner, None))
    layers = text.weight_bytes - planner.models.text_table_bytes
    resident = denoise.resident_bytes(planner.named_bytes)
    for words in ("a " * 500, "a " * 1000):  # the second leaves less room beside it
        tokens = limited.tokenize(words)
        with limited._encoding():
            limited.load_model(tokens)
        assert layers - 1000 < limited.patcher.loaded_size() <= layers
        need = planner.decide_text(
            token_count(tokens), None, weight_bytes=clip.patcher.model_size(),
            table_bytes=table_bytes(clip),
        ).need_bytes  # fmt: skip
        assert layers + patched.loaded_size() + need <= planner.named_bytes
        prepare(patched, torch.empty(1, 16, 48, 48, device="meta"))
        assert 0.7 * resident < patched.loaded_size() <= resident < denoise.weight_bytes
        loaded = limited.patcher.loaded_size() + patched.loaded_size()
        assert loaded + denoise.need_bytes <= planner.named_bytes


@pytest.mark.parametrize(
    ("factor", "end"), [(1.0, "MiB"), (1.5, "50 % apart"), (0.5, "50 % apart"), (0.0, None)]
)
def test_the_peak_is_compared_with_the_plan(
    loaded: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any, factor: float, end: str | None
) -> None:
    """With the allocator's readings before and after: weights in it, current bytes, peak."""
    from pack.nodes.denoiser.need import denoiser_live_bytes
    from pack.nodes.denoiser.plan import denoiser_plan
    from pack.nodes.denoiser.sizes import Request
    from pack.nodes.host.fit import enforcer
    from pack.nodes.host.fit.inputs import planner_for
    from pack.nodes.host.fit.patch import with_plan

    planner = planner_for(
        loaded, Request(384, 384), named_bytes=0, prefer="balance", vae=None, clip=None,
        latent=None, conditioning=lean_models.prompt(),
    )  # fmt: skip
    plan = planner.plan(planner.request, None)
    how = denoiser_plan(planner.request, plan.choice)
    live = denoiser_live_bytes(planner.request, how, is_plain=True).plain
    weights, others = 100 * MIB, 30 * MIB
    measured = int(factor * (weights + live))
    readings = iter([(0, others, others + MIB), (weights, others, others + measured)])
    monkeypatch.setattr(enforcer, "_readings", lambda device: next(readings))
    with caplog.at_level(logging.INFO):
        sample(with_plan(loaded, planner, None))
    (line,) = (r.getMessage() for r in caplog.records if "measured" in r.getMessage())
    said = line.splitlines()[-1]
    if end is None:
        assert said == "measured: unknown, an earlier peak of 31 MiB was higher"
    else:
        assert f"predicted {(weights + live) / MIB:.0f} MiB, measured" in said
        assert said.endswith(end)
