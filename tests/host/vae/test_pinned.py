"""Pinned RAM: asked for once a call, and given back to the system."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pack.nodes.probe.tracker import PeakTracker
from pack.nodes.units import GIB
from pack.nodes.vae.choice import VaeChoice
from pack.nodes.vae.plan import Prefer
from pack.nodes.vae.ram import Ram, RamStrip
from pack.testing.fake_card import FakeCard, on_fake_card
from pack.testing.vae_models import At, kl_vae, last_conv, raise_oom

pytestmark = pytest.mark.usefixtures("host")

LATENT = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def vae(host: Any) -> Any:
    vae = kl_vae()
    with torch.inference_mode():
        vae.decode(LATENT)  # loads it: that takes weight functions away
    return vae


class _Driver:
    """What the host and torch call to pin RAM and to wait for a card, without a card."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.sizes: list[int] = []
        self.fails = self.is_lost = False

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: N802
        self.calls.append("register")
        self.sizes.append(size)
        return int(self.fails)

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        self.calls.append("unregister")
        return 0

    def synchronize(self) -> None:
        self.calls.append("wait")
        if self.is_lost:
            raise RuntimeError("the card is lost")


@pytest.fixture
def driver(host: Any, monkeypatch: pytest.MonkeyPatch) -> _Driver:
    driver = _Driver()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: driver)
    monkeypatch.setattr(host.model_management, "MAX_PINNED_MEMORY", 2**40)
    return driver


class _InRam(VaeChoice):
    """Chooses on the CPU what is chosen on a card: the large maps wait in RAM."""

    def plan(self, call: Any, attempt: int = 0) -> Any:
        return super().plan(call._replace(has_ram=True), attempt)


def _lean(vae: Any, prefer: Prefer = "smallest", strip_rows: int = 8) -> Any:
    from pack.nodes.host.base.server import NodeLog
    from pack.nodes.host.vae.forward import VaeSettings
    from pack.nodes.host.vae.patch import with_lean_vae

    settings = VaeSettings(lambda call, device: _InRam(prefer, strip_rows))
    changed, _ = with_lean_vae(vae, settings, NodeLog("Lean VAE", None))
    return changed.first_stage_model


def _pinned_ram() -> Any:
    from pack.nodes.host.base.pinned import PinnedRam
    from pack.nodes.host.base.server import NodeLog

    return PinnedRam(NodeLog("Lean VAE", None))


def _fail() -> None:
    raise ValueError("injected")


def _cancel() -> None:
    import comfy.model_management

    comfy.model_management.interrupt_current_processing(True)


@pytest.mark.parametrize(
    ("prefer", "act", "pins"),
    [
        ("speed", lambda: None, 0),
        ("smallest", lambda: None, 1),
        ("smallest", raise_oom, 1),
        ("smallest", _fail, 1),
        ("smallest", _cancel, 1),
    ],
    ids=["without RAM", "done", "tried again", "error", "cancel"],
)
@torch.inference_mode()
def test_ram_is_pinned_once_for_a_batch_and_given_back(
    vae: Any, host: Any, driver: _Driver, monkeypatch: pytest.MonkeyPatch, prefer: Any, act: Any,
    pins: int,
) -> None:  # fmt: skip
    """It was pinned for each strip, and an error's frames held it beyond the call."""
    management = host.model_management
    wanted, changed, conv = vae.first_stage_model.decode(LATENT), _lean(vae, prefer), last_conv(vae)
    emptied: list[int] = []  # what was held when the card's cache was emptied for another try
    empty_card = management.soft_empty_cache

    def watched(*args: Any) -> None:
        emptied.append(tracker.current_bytes)
        empty_card(*args)

    monkeypatch.setattr(management, "soft_empty_cache", watched)
    conv.weight_function = [At(act, {1})]
    with PeakTracker() as tracker:
        try:
            made = changed.decode(torch.cat([LATENT, LATENT]))
        except (ValueError, management.InterruptProcessingException):
            assert act in (_fail, _cancel)
        else:
            assert act not in (_fail, _cancel)
            assert (made - wanted).norm() < 1e-5 * made.norm()
        finally:
            conv.weight_function = []
            management.interrupt_current_processing(False)
    assert tracker.peak_bytes > 2**20
    assert driver.calls == ["register", "wait", "unregister"] * pins
    assert management.TOTAL_PINNED_MEMORY == 0
    assert len(emptied) == (act is raise_oom)
    assert all(count < sum(driver.sizes) + 2**17 for count in emptied), emptied  # and the results


@pytest.mark.parametrize("reason", ["option", "RAM", "driver"])
@torch.inference_mode()
def test_maps_wait_in_ram_that_is_not_pinned_where_none_can_be_had(
    vae: Any, host: Any, driver: _Driver, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, reason: str,
) -> None:  # fmt: skip
    """The option was ignored, free RAM not asked for, and a failure met again at each strip."""
    from comfy.cli_args import args

    caplog.set_level("INFO", logger="pack.nodes")
    wanted, changed = vae.first_stage_model.decode(LATENT), _lean(vae)
    psutil = host.model_management.psutil
    if reason == "option":
        monkeypatch.setattr(args, "disable_pinned_memory", True)
    elif reason == "RAM":
        scarce = psutil.virtual_memory()._replace(available=2**31)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: scarce)
    else:
        driver.fails = True
    for _ in range(2):
        made = changed.decode(LATENT)
        assert (made - wanted).norm() < 1e-5 * wanted.norm()
    assert driver.calls == (["register"] if reason == "driver" else [])
    assert caplog.text.count("not pinned, which is slower") == (reason != "option")


@pytest.mark.once
@on_fake_card
def test_the_host_makes_room_among_pinned_weights(
    host: Any, driver: _Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hosts with dynamic VRAM pin weights until 2 GiB of RAM are left; none was had beside them."""
    import comfy.ops
    from comfy import memory_management, pinned_memory
    from comfy.model_patcher import ModelPatcherDynamic

    FakeCard(GIB)
    monkeypatch.setattr(memory_management, "aimdo_enabled", True)
    management, card = host.model_management, torch.device("cuda", 0)
    layers = [comfy.ops.disable_weight_init.Linear(512, 2048, bias=False) for _ in range(4)]
    for layer in layers:
        layer.weight = torch.nn.Parameter(torch.zeros(2048, 512), requires_grad=False)
    patcher = ModelPatcherDynamic(torch.nn.Sequential(*layers), card, torch.device("cpu"))
    management.current_loaded_models.insert(0, management.LoadedModel(patcher))
    patcher.load(card)
    for layer in layers:
        pinned_memory.pin_memory(layer)
    of_weights = management.TOTAL_PINNED_MEMORY
    assert of_weights >= 2**24
    ram = management.psutil.virtual_memory()

    def memory_left() -> Any:
        return ram._replace(available=2**31 + of_weights - management.TOTAL_PINNED_MEMORY)

    monkeypatch.setattr(management.psutil, "virtual_memory", memory_left)
    with _pinned_ram().of_call(card) as pinned:
        memory = pinned(2**23)
        assert memory is not None
        assert management.TOTAL_PINNED_MEMORY == 2**23


@pytest.mark.parametrize(
    ("strip_rows", "shapes", "least"),
    [
        (0, [(8, 8), (13, 6), (24, 10)], 0),
        (3, [(8, 8), (13, 6), (24, 10)], 1),
        (40, [(8, 8), (13, 6), (24, 10)], 1),
        (12, [(47, 1)], 2),
        (16, [(67, 1), (128, 1)], 1),  # the strips of 1024x1024
        pytest.param(8, [(256, 1)], 1, marks=pytest.mark.once),  # of 2048x2048
    ],
)
@torch.inference_mode()
def test_every_strip_fits_the_pinned_ram(
    vae: Any, driver: _Driver, monkeypatch: pytest.MonkeyPatch, strip_rows: int, shapes: Any,
    least: int,
) -> None:  # fmt: skip
    """One that does not is copied through RAM that is not pinned.

    `least` strips beside the map are what these shapes need: with one less, not all strips fit.
    """
    from pack.nodes.vae import peak

    kept: list[bool] = []
    keep = Ram.keep

    def watched(ram: Ram, rows: torch.Tensor) -> RamStrip:
        strip = keep(ram, rows)
        kept.append(strip._piece is not None)
        return strip

    monkeypatch.setattr(Ram, "keep", watched)
    changed = _lean(vae, strip_rows=strip_rows)
    for strips in (peak.RAM_STRIPS, least - 1):
        monkeypatch.setattr(peak, "RAM_STRIPS", strips)
        kept.clear()
        for height, width in shapes:
            changed.decode(torch.zeros(1, 4, height, width))
        assert len(kept) > 12
        assert all(kept) == (strips >= least)


def test_the_same_memory_is_lent_until_more_is_wanted(driver: _Driver) -> None:
    with _pinned_ram().of_call(torch.device("cuda")) as pinned:
        given = [pinned(count) for count in (2**12, 2**11, 2**12, 2**13)]
    assert [memory.nbytes for memory in given] == [2**12] * 3 + [2**13]
    assert driver.sizes == [2**12, 2**13]
    assert driver.calls == ["register", "wait", "unregister"] * 2


@pytest.mark.parametrize(
    "error", [RuntimeError("the card is lost"), ValueError("injected")], ids=repr
)
def test_a_lost_card_leaves_nothing_pinned_and_hides_no_error(
    host: Any, driver: _Driver, error: Exception
) -> None:
    """The memory was freed while the driver and the host still counted it as pinned."""
    driver.is_lost = True

    def call() -> None:
        with _pinned_ram().of_call(torch.device("cuda")) as pinned:
            pinned(2**12)
            if isinstance(error, ValueError):
                raise error

    with pytest.raises(type(error), match=str(error)):
        call()
    assert driver.calls == ["register", "wait", "unregister"]
    assert host.model_management.TOTAL_PINNED_MEMORY == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nothing_stays_pinned(host: Any) -> None:
    def held() -> int:
        return host.model_management.TOTAL_PINNED_MEMORY

    card, before = torch.device("cuda", torch.cuda.current_device()), held()
    with _pinned_ram().of_call(card) as pinned:
        memory = pinned(2**26)
        assert memory is not None
        assert memory.is_pinned()
        copied = memory.to(card, non_blocking=True)
        assert held() == before + 2**26
    assert held() == before
    assert not memory.is_pinned()
    assert copied.shape == (2**26,)
