"""What Lean VAE leaves alone, what it says, and how it ends."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from pack.nodes.probe.tracker import PeakTracker
from pack.nodes.vae.choice import VaeChoice
from pack.nodes.vae.decode import decode
from pack.nodes.vae.encode import encode
from pack.nodes.vae.plan import PREFERENCES, Prefer, VaeCall
from pack.nodes.vae.steps import step_count
from pack.testing.loading import write_tiny_vae
from pack.testing.vae_models import At, kl_vae, last_conv, lean, raise_oom
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

pytestmark = pytest.mark.usefixtures("host")

LATENT = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def vae(host: Any) -> Any:
    vae = kl_vae()
    with torch.inference_mode():
        vae.decode(LATENT)  # loads it: that takes weight functions away
    return vae


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Any:
    caplog.set_level("INFO", logger="pack.nodes")
    return lambda: "\n".join(r.message for r in caplog.records if r.message.startswith("Lean VAE"))


def _state(vae: Any) -> dict[str, Any]:
    model = vae.first_stage_model
    found: dict[str, Any] = {"vae": dict(vars(vae))}
    for name, module in model.named_modules():
        found[name] = (id(module), type(module), dict(vars(module)), dict(module._modules))
    return found


@torch.inference_mode()
def test_the_original_is_untouched_and_both_work_in_turn(vae: Any) -> None:
    wanted, before = vae.decode(LATENT), _state(vae)
    changed = lean(vae)
    made = changed.decode(LATENT)
    after = _state(vae)
    assert before.keys() == after.keys()
    assert all(before[k][:2] == after[k][:2] for k in before if k != "vae")
    assert all(before[k][3] == after[k][3] for k in before if k != "vae")
    assert "forward" not in vars(vae.first_stage_model.decoder)
    assert before["vae"] == after["vae"]
    assert torch.equal(vae.decode(LATENT), wanted)
    assert (made - wanted).norm() < 1e-5 * wanted.norm()
    # The copy saves under the same names and shares the weights.
    assert changed.patcher is vae.patcher
    one, two = changed.get_sd(), vae.get_sd()
    assert one.keys() == two.keys()
    assert all(one[k].data_ptr() == two[k].data_ptr() for k in one)


@torch.inference_mode()
def test_a_second_node_replaces_the_first(vae: Any, said: Any) -> None:
    wanted = vae.decode(LATENT)
    twice = lean(lean(vae, "speed"), "smallest", 3)
    made = twice.decode(LATENT)
    assert (made - wanted).norm() < 1e-5 * wanted.norm()
    assert "left unchanged" not in said()
    assert "ComfyUI's own code" not in said()
    one, two = (v.first_stage_model.decoder.forward.stock for v in (lean(vae), twice))
    assert one is two


@torch.inference_mode()
def test_another_class_passes_through(host: Any, said: Any) -> None:
    path = write_tiny_vae(host)
    import comfy.utils

    tiny = host.sd.VAE(sd=comfy.utils.load_torch_file(str(path)))
    assert lean(tiny) is tiny
    assert "this VAE is left unchanged: it is a TAESD, not a KL image VAE" in said()


@pytest.mark.parametrize(
    ("device", "dtype", "reason"),
    [
        ("mps", torch.bfloat16, "on Apple GPUs Lean VAE needs ComfyUI's option --fp32-vae"),
        ("xpu", torch.float32, "Lean VAE has not been tested on Intel GPUs"),
        ("privateuseone", torch.float32, "Lean VAE has not been tested on DirectML"),
    ],
)
@torch.inference_mode()
def test_an_unknown_device_decodes_as_without_the_node(
    vae: Any, said: Any, device: str, dtype: torch.dtype, reason: str
) -> None:
    from pack.nodes.host.vae.patch import decoder_sizes

    changed = lean(vae)
    vae.device, vae.vae_dtype = torch.device(device), dtype  # no more than names: nothing runs
    assert lean(vae) is vae
    assert f"this VAE is left unchanged: {reason}" in said()
    assert decoder_sizes(vae) is None, "Fit to VRAM plans a stock decode"
    if device == "privateuseone":  # fake tensors need its library
        return
    with FakeTensorMode():
        latent = torch.empty(1, 4, 8, 8, device=device, dtype=dtype)
    assert reason in changed.first_stage_model.decoder.forward._why_not(latent, {})


@torch.inference_mode()
def test_a_changed_layer_runs_as_the_host_runs_it(vae: Any, said: Any) -> None:
    changed = lean(vae)
    conv = last_conv(vae)
    handle = conv.register_forward_hook(lambda module, given, made: 2 * made)
    try:
        assert torch.equal(changed.decode(LATENT), vae.decode(LATENT))
        assert torch.equal(changed.decode(LATENT), vae.decode(LATENT))
        assert said().count("up.0.block.2.conv2 is a Conv2d of another kind") == 1
        assert changed.memory_used_decode((1, 4, 128, 128), torch.bfloat16) == (
            vae.memory_used_decode((1, 4, 128, 128), torch.bfloat16)
        )
        assert lean(vae) is vae
    finally:
        handle.remove()
    assert lean(vae) is not vae


@torch.inference_mode()
def test_convolutions_that_another_pack_wraps_run_as_wrapped(vae: Any, said: Any) -> None:
    """As packs do that make pictures tileable. Names the bug: their border was lost, unsaid."""
    changed, conv = lean(vae), last_conv(vae)
    plain = conv._conv_forward

    def around(given: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        wrapped = functional.pad(given, (1, 1, 1, 1), mode="circular")
        return plain(wrapped, weight, bias)[..., 1:-1, 1:-1]

    conv._conv_forward = around
    try:
        assert torch.equal(changed.decode(LATENT), vae.decode(LATENT))
        assert "up.0.block.2.conv2 is a Conv2d of another kind" in said()
    finally:
        del conv._conv_forward
    assert lean(vae) is not vae


def test_a_latent_that_wants_a_gradient_gets_it(vae: Any) -> None:
    """Names the bug: only the weights were asked whether they want one."""
    changed = lean(vae)
    vae.first_stage_model.requires_grad_(False)
    latent = torch.zeros(1, 4, 8, 8, requires_grad=True)
    changed.first_stage_model.decoder(latent).sum().backward()
    assert latent.grad is not None and latent.grad.abs().sum() > 0


@torch.inference_mode()
def test_cancel_frees_everything(vae: Any, host: Any) -> None:
    management = host.model_management
    changed = lean(vae, strip_rows=8)
    wanted = changed.decode(LATENT)
    conv = last_conv(vae)
    stop = At(lambda: management.interrupt_current_processing(True), {1})
    conv.weight_function = [stop]
    with PeakTracker() as tracker:
        try:
            with pytest.raises(management.InterruptProcessingException):
                changed.decode(LATENT)
        finally:
            conv.weight_function = []
            management.interrupt_current_processing(False)
        gc.collect()
    assert stop.count == 1
    assert tracker.peak_bytes > 2**20
    assert tracker.current_bytes < 2**14, tracker.live()
    assert torch.equal(changed.decode(LATENT), wanted)


@torch.inference_mode()
def test_cancel_ends_a_decode_after_its_last_weight_was_fetched(vae: Any, host: Any) -> None:
    """A fetch ends a cancelled prompt too, but `speed` fetches a weight once for all strips."""
    management = host.model_management
    norm = vae.first_stage_model.decoder.norm_out
    stop = At(lambda: management.interrupt_current_processing(True), {1})
    norm.weight_function = [stop]
    try:
        with pytest.raises(management.InterruptProcessingException):
            lean(vae, "speed").decode(LATENT)
    finally:
        norm.weight_function = []
        management.interrupt_current_processing(False)
    assert stop.count == 1


@pytest.mark.parametrize(("failures", "tries"), [({1}, 1), ({1, 2, 3}, 3)])
@torch.inference_mode()
def test_out_of_memory_is_tried_again_in_smaller_pieces(
    vae: Any, said: Any, failures: set[int], tries: int
) -> None:
    wanted = vae.decode(LATENT)
    changed = lean(vae, "speed")
    conv = last_conv(vae)
    conv.weight_function = [At(raise_oom, failures)]
    try:
        made = changed.decode(LATENT)
    finally:
        conv.weight_function = []
    assert (made - wanted).norm() < 1e-5 * wanted.norm()
    assert said().count("out of memory: tried again with strips of") == tries
    assert ("prefer balance" in said()) == (tries == 3)


@torch.inference_mode()
def test_each_decode_that_is_tried_again_is_told(vae: Any, said: Any) -> None:
    """The second decode's text was left out as known, while its node showed another."""
    changed = lean(vae, "speed")
    conv = last_conv(vae)
    for decodes in (1, 2):
        conv.weight_function = [At(raise_oom, {1})]
        try:
            changed.decode(LATENT)
        finally:
            conv.weight_function = []
        assert said().count("tried again with strips of") == decodes


@torch.inference_mode()
def test_out_of_memory_to_the_floor_ends_in_the_hosts_tiles(
    vae: Any, caplog: pytest.LogCaptureFixture
) -> None:
    changed = lean(vae, "smallest")
    conv = last_conv(vae)
    conv.weight_function = [At(raise_oom, {1, 2, 3})]
    try:
        made = changed.decode(LATENT)
    finally:
        conv.weight_function = []
    assert "retrying with tiled VAE decoding" in caplog.text
    assert made.shape == vae.decode(LATENT).shape


@torch.inference_mode()
def test_another_error_is_not_tried_again(vae: Any, said: Any) -> None:
    changed = lean(vae)
    conv = last_conv(vae)

    def fail() -> None:
        raise RuntimeError("not of memory")

    conv.weight_function = [At(fail, {1})]
    try:
        with pytest.raises(RuntimeError, match="not of memory"):
            changed.decode(LATENT)
    finally:
        conv.weight_function = []
    assert "tried again" not in said()


@torch.inference_mode()
def test_a_long_decode_moves_the_nodes_bar(vae: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import comfy.utils
    from pack.nodes.host.vae import forward as vae_forward

    seen: list[int] = []
    monkeypatch.setattr(
        comfy.utils, "PROGRESS_BAR_HOOK", lambda value, *rest, **kw: seen.append(value)
    )
    lean(vae).decode(LATENT)
    assert seen == [], "short work shows no bar"
    assert 512**2 < vae_forward._LONG_PX < 1024**2, "a tile shows none, the usual picture does"
    monkeypatch.setattr(vae_forward, "_LONG_PX", 0)
    lean(vae).decode(LATENT)
    assert seen == sorted(set(seen))
    assert len(seen) > 1  # the host leaves steps out that follow soon
    assert seen[-1] == 100


@pytest.mark.parametrize("has_ram", [False, True])
@pytest.mark.parametrize("prefer", PREFERENCES)
@torch.inference_mode()
def test_the_bar_counts_the_maps_that_are_read(vae: Any, prefer: Prefer, has_ram: bool) -> None:
    """A decode reads some maps once more where it recomputes; the bar may reach its end early."""
    from pack.nodes.host.vae import layers as vae_layers

    for run, part, shape in (
        (decode, vae.first_stage_model.decoder, (1, 4, 8, 8)),
        (encode, vae.first_stage_model.encoder, (1, 3, 64, 64)),
    ):
        given, shares = torch.zeros(shape), []
        layers = vae_layers.read(part, given)
        call = VaeCall(vae_layers.sizes(part), 64, 64, dtype_bytes=4, has_ram=has_ram)
        plan = VaeChoice(prefer, 8).plan(call)
        assert plan is not None
        run(
            given,
            layers,
            plan,
            write=lambda first, rows: None,
            tick=shares.append,
        )
        assert len(shares) > 2 * step_count(layers), "several strips for each map"
        assert -1e-6 < sum(shares) - step_count(layers) < len(layers.levels)


@torch.inference_mode()
def test_attention_that_is_not_fused_takes_few_queries(
    vae: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few, but not 8 at a time at 4096x4096: each part reads all keys and values."""
    import comfy.ops
    from pack.nodes.host.vae import layers as vae_layers

    attend, seen = comfy.ops.scaled_dot_product_attention, []

    def watched(query: torch.Tensor, *args: Any) -> torch.Tensor:
        seen.append(query.shape[2])
        return attend(query, *args)

    latent = torch.randn(1, 4, 24, 8, generator=torch.Generator().manual_seed(0))
    wanted = vae.decode(latent)
    monkeypatch.setattr(comfy.ops, "scaled_dot_product_attention", watched)

    def parts(**patches: Any) -> list[int]:
        seen.clear()
        for name, value in patches.items():
            monkeypatch.setattr(vae_layers, name, value)
        assert (lean(vae).decode(latent) - wanted).norm() < 1e-5 * wanted.norm()
        return list(seen)

    assert parts(_SCORE_BYTES=8 * 192 * 80) == [192]
    assert parts(sdpa_choice=lambda *args: "math") == [80, 80, 32]
    assert parts(_SCORE_BYTES=1) == [64, 64, 64], "scores of as many bytes as the keys"
    assert parts(_has_sdpa=lambda device: False) == []


def test_a_card_attends_as_the_host_has_it_attend(
    host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ComfyUI keeps torch's attention out of an AMD card's VAE, where it crashes."""
    import comfy.ldm.modules.diffusionmodules.model as kl
    from pack.nodes.host.vae import layers as vae_layers

    card = torch.device("cuda")
    management = host.model_management
    monkeypatch.setattr(management, "cpu_state", management.CPUState.GPU)
    for is_allowed, hip, wanted in ((True, None, True), (False, None, False), (True, "7", False)):
        monkeypatch.setattr(management, "ENABLE_PYTORCH_ATTENTION", is_allowed)
        monkeypatch.setattr(torch.version, "hip", hip)
        assert vae_layers._has_sdpa(card) == wanted
        assert vae_layers._has_sdpa(torch.device("cpu"))
    query, key, value = torch.randn(3, 1, 24, 8, generator=torch.Generator().manual_seed(0))
    made = vae_layers._attend_by_scores(*(t[None] for t in (query, key, value)))
    stock = kl.slice_attention(query, key.mT, value.mT).mT
    assert (made[0] - stock).abs().max() < 1e-6


@torch.inference_mode()
def test_the_host_is_told_the_need(vae: Any) -> None:
    for name, shape in (("decode", (1, 4, 256, 256)), ("encode", (1, 3, 2048, 2048))):
        stock = getattr(vae, f"memory_used_{name}")(shape, torch.bfloat16)
        needs = [
            getattr(lean(vae, prefer), f"memory_used_{name}")(shape, torch.bfloat16)
            for prefer in ("speed", "balance", "smallest")
        ]
        assert 0 < needs[2] < needs[1] < needs[0] < stock
        five = (*shape[:2], 1, *shape[2:])
        assert getattr(lean(vae), f"memory_used_{name}")(five, torch.bfloat16) == needs[1]


@torch.inference_mode()
def test_results_are_counted_only_where_they_lie_on_the_card(vae: Any) -> None:
    """Of a batch of three, two results beside the sample; hosts from 0.30 write them into RAM."""
    changed, seen = lean(vae), []
    decoder = changed.first_stage_model.decoder
    forward = decoder.forward
    decoder.forward = lambda given, **options: seen.append(options) or forward(given, **options)
    changed.decode(LATENT)
    writes_to_ram = "output_buffer" in seen[0]
    cards = torch.device("cuda", 0), torch.device("cuda", 1)
    vae.device = cards[0]  # no more than a name: nothing runs from here on
    picture, moments = 2 * 3 * 64 * 64, 2 * 8 * 8 * 8
    for results_at in (*cards, torch.device("cpu")):
        vae.output_device = results_at
        for name, shape, result in (
            ("decode", (4, 8, 8), 0 if results_at.type == "cpu" and writes_to_ram else picture),
            ("encode", (3, 64, 64), moments),
        ):
            setattr(vae, f"memory_used_{name}", lambda shape, dtype: 2**62)
            need = getattr(lean(vae, "smallest"), f"memory_used_{name}")
            one, three = (need((batch, *shape), torch.bfloat16) for batch in (1, 3))
            assert three - one == 2 * result
