"""Lean VAE decodes and encodes with the Wan class as the host does, and leaves the rest alone."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from pack.nodes.probe.tracker import PeakTracker
from pack.testing.vae_models import At, lean, raise_oom
from pack.testing.video_models import wan_vae

pytestmark = pytest.mark.usefixtures("host")

PREFER = ["speed", "balance", "smallest"]


@pytest.fixture(scope="module")
def vae(host: Any) -> Any:
    vae = wan_vae()
    with torch.inference_mode():
        vae.decode(_latent(1, 2, 2))  # loads it: that takes weight functions away
    return vae


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Any:
    caplog.set_level("INFO", logger="pack.nodes")
    return lambda: "\n".join(r.message for r in caplog.records if r.message.startswith("Lean VAE"))


def _latent(frames: int, height: int = 7, width: int = 5, batch: int = 1) -> torch.Tensor:
    torch.manual_seed(frames + height)
    return torch.randn(batch, 16, frames, height, width)


def _video(frames: int, height: int = 56, width: int = 40) -> torch.Tensor:
    torch.manual_seed(frames)
    return torch.rand(frames, height, width, 3)


def _assert_near(made: torch.Tensor, wanted: torch.Tensor) -> None:
    assert made.shape == wanted.shape
    assert made.dtype == wanted.dtype
    assert wanted.std() > 0.05, "a picture of one colour shows nothing"
    assert (made - wanted).norm() < 3e-6 * wanted.norm()


def _last_conv(vae: Any) -> Any:
    return vae.first_stage_model.decoder.upsamples[-1].residual[6]


# Of an image, and of videos of 5, 9 and 13 frames, the last of which the host takes in twos.
@pytest.mark.parametrize("frames", [1, 2, 3, 4])
@torch.inference_mode()
def test_bfloat16_is_bit_for_bit_the_hosts(frames: int) -> None:
    """Strips of one row, of a remainder, of more than the height."""
    vae = wan_vae(dtype=torch.bfloat16, seed=frames)
    latent, video = _latent(frames), _video(4 * frames - 3)
    wanted, wanted_latent = vae.decode(latent), vae.encode(video)
    assert wanted.std() > 0.05
    for strip_rows in (1, 20, 100) if frames < 3 else (20,):
        changed = lean(vae, "balance", strip_rows)
        assert changed is not vae
        assert torch.equal(changed.decode(latent), wanted)
        assert torch.equal(changed.encode(video), wanted_latent)


@pytest.mark.parametrize("prefer", PREFER)
@torch.inference_mode()
def test_float32_is_the_hosts_up_to_rounding(vae: Any, prefer: str) -> None:
    """The CPU's float32 convolutions sum in another order for other frames or rows at a time."""
    for frames, rows in ((1, 0), (1, 1), (2, 16), (3, 0)):
        latent, video = _latent(frames), _video(4 * frames - 3)
        changed = lean(vae, prefer, rows)
        wanted = vae.decode(latent)
        _assert_near(changed.decode(latent), wanted)
        _assert_near(changed.encode(video), vae.encode(video))
        # As packs call it that want a preview.
        direct = changed.first_stage_model.decode(latent.to(vae.vae_dtype))
        _assert_near(changed.process_output(direct).movedim(1, -1), wanted)


@torch.inference_mode()
def test_odd_sizes_batches_and_frames_that_are_left_out(vae: Any) -> None:
    changed = lean(vae, "smallest", 8)
    latents = _latent(2, 1, 1, batch=2)
    _assert_near(changed.decode(latents), vae.decode(latents))
    for frames, height, width in ((7, 21, 30), (4, 16, 9)):  # 5 and 1 frames, cropped by the host
        video = _video(frames, height, width)
        _assert_near(changed.encode(video), vae.encode(video))
    pictures = torch.rand(1, 3, 1, 19, 21)  # not cropped
    wanted = vae.first_stage_model.encode(pictures)
    _assert_near(changed.first_stage_model.encode(pictures), wanted)
    images = torch.rand(2, 8, 16, 24, 3)  # the host crops frames to eights here
    _assert_near(changed.encode(images), vae.encode(images))


@torch.inference_mode()
def test_four_channels(host: Any) -> None:
    """As of layered pictures: colours and opacity."""
    vae = wan_vae(channels=4)
    latent, picture = _latent(1), torch.rand(1, 24, 16, 4)
    changed = lean(vae, "balance", 16)
    _assert_near(changed.decode(latent), vae.decode(latent))
    _assert_near(changed.encode(picture), vae.encode(picture))


@torch.inference_mode()
def test_tiled_nodes_behind_it_still_tile(vae: Any) -> None:
    latent, video = _latent(3, 12, 10), _video(5, 96, 80)
    changed = lean(vae)
    for name, given, tile in (("encode", video, 64), ("decode", latent, 8)):
        settings = {"tile_x": tile, "tile_y": tile, "overlap": tile // 4}
        wanted = getattr(vae, f"{name}_tiled")(given, **settings)
        _assert_near(getattr(changed, f"{name}_tiled")(given, **settings), wanted)
    assert (wanted - vae.decode(latent)).std() > 1e-3, "tiles must show, or this compares nothing"


@torch.inference_mode()
def test_the_original_is_untouched_and_both_work_in_turn(vae: Any) -> None:
    latent = _latent(2)
    wanted = vae.decode(latent)
    before = dict(vars(vae)), dict(vars(vae.first_stage_model))
    modules = [(id(m), type(m), dict(vars(m))) for m in vae.first_stage_model.modules()]
    changed = lean(vae)
    made = changed.decode(latent)
    assert before == (dict(vars(vae)), dict(vars(vae.first_stage_model)))
    for (where, kind, attributes), m in zip(modules, vae.first_stage_model.modules(), strict=True):
        assert (where, kind) == (id(m), type(m))
        assert attributes.keys() == vars(m).keys()
    assert torch.equal(vae.decode(latent), wanted)
    _assert_near(made, wanted)
    assert changed.patcher is vae.patcher
    one, two = changed.get_sd(), vae.get_sd()
    assert one.keys() == two.keys()
    assert all(one[k].data_ptr() == two[k].data_ptr() for k in one)


@torch.inference_mode()
def test_a_second_node_replaces_the_first(vae: Any, said: Any) -> None:
    latent = _latent(1)
    twice = lean(lean(vae, "speed"), "smallest", 3)
    _assert_near(twice.decode(latent), vae.decode(latent))
    assert "stock" not in said()
    assert twice.first_stage_model.decode.stock is vae.first_stage_model
    assert "MiB predicted at 1024x1024" in said()


@torch.inference_mode()
def test_a_changed_layer_runs_as_the_host_runs_it(vae: Any, said: Any) -> None:
    latent, changed = _latent(2), lean(vae)
    conv = _last_conv(vae)
    handle = conv.register_forward_hook(lambda module, given, made: 2 * made)
    try:
        assert torch.equal(changed.decode(latent), vae.decode(latent))
        assert torch.equal(changed.decode(latent), vae.decode(latent))
        reason = "decoder.upsamples.14.residual.6 is a CausalConv3d of another kind"
        assert said().count(f"the host's own code runs: {reason}") == 1
        shape = (1, 16, 1, 128, 128)
        assert changed.memory_used_decode(shape, torch.bfloat16) == (
            vae.memory_used_decode(shape, torch.bfloat16)
        )
        assert lean(vae) is vae
        assert f"this VAE stays stock: {reason}" in said()
    finally:
        handle.remove()
    assert lean(vae) is not vae


@torch.inference_mode()
def test_an_unknown_subclass_passes_through(said: Any) -> None:
    vae = wan_vae()

    class Wider(type(vae.first_stage_model)):
        pass

    model = Wider(dim=16, z_dim=16, temperal_downsample=[False, True, True])
    vae.first_stage_model = model.eval()
    assert lean(vae) is vae
    assert "this VAE stays stock: it is a Wider, not the WanVAE of Wan 2.1" in said()


@torch.inference_mode()
def test_a_replaced_forward_passes_through(said: Any) -> None:
    vae = wan_vae()
    block = vae.first_stage_model.decoder.middle[0]
    block.forward = block.forward
    assert lean(vae) is vae
    assert "decoder.middle.0 is a ResidualBlock of another kind" in said()


@torch.inference_mode()
def test_options_it_does_not_know_run_the_hosts_code(vae: Any, said: Any) -> None:
    model = lean(vae).first_stage_model
    with pytest.raises(TypeError, match="unexpected keyword argument 'timestep'"):
        model.decode(_latent(1), timestep=1)
    assert "the host's own code runs: it was called with timestep" in said()


@torch.inference_mode()
def test_cancel_frees_everything(vae: Any, host: Any) -> None:
    management, latent = host.model_management, _latent(2, 16, 16)
    changed = lean(vae, "balance", 8)
    wanted = changed.decode(latent)
    conv = _last_conv(vae)
    conv.weight_function = [At(lambda: management.interrupt_current_processing(True), {1})]
    with PeakTracker() as tracker:
        try:
            with pytest.raises(management.InterruptProcessingException):
                changed.decode(latent)
        finally:
            conv.weight_function = []
            management.interrupt_current_processing(False)
        gc.collect()
    assert tracker.current_bytes < 2**14, tracker.live()
    assert torch.equal(changed.decode(latent), wanted)


@pytest.mark.parametrize(("failures", "tries"), [({1}, 1), ({1, 2, 3}, 3)])
@torch.inference_mode()
def test_out_of_memory_is_tried_again_in_smaller_pieces(
    vae: Any, said: Any, failures: set[int], tries: int
) -> None:
    latent = _latent(2)
    wanted, changed, conv = vae.decode(latent), lean(vae, "speed"), _last_conv(vae)
    conv.weight_function = [At(raise_oom, failures)]
    try:
        made = changed.decode(latent)
    finally:
        conv.weight_function = []
    _assert_near(made, wanted)
    assert said().count("out of memory: tried again with strips of") == tries
    assert ("prefer balance" in said()) == (tries == 3)


@torch.inference_mode()
def test_a_long_decode_moves_the_nodes_bar(vae: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import comfy.utils
    from pack.nodes.host.vae import video_forward

    seen: list[int] = []
    monkeypatch.setattr(
        comfy.utils, "PROGRESS_BAR_HOOK", lambda value, *rest, **kw: seen.append(value)
    )
    lean(vae).decode(_latent(2))
    assert seen == [], "short work shows no bar"
    monkeypatch.setattr(video_forward, "_LONG_PX", 0)
    lean(vae).decode(_latent(2))
    assert seen == sorted(set(seen))
    assert seen[-1] == 100


@torch.inference_mode()
def test_the_host_is_told_the_need(vae: Any) -> None:
    """At 2560x1440 the host plans with 15 GiB for a decode, of which 2.7 are ever alive."""
    for name, shape in (("decode", (1, 16, 1, 180, 320)), ("encode", (1, 3, 1, 1440, 2560))):
        stock = getattr(vae, f"memory_used_{name}")(shape, torch.bfloat16)
        needs = [
            getattr(lean(vae, prefer), f"memory_used_{name}")(shape, torch.bfloat16)
            for prefer in PREFER
        ]
        assert 0 < needs[2] < needs[1] < needs[0] < stock
        batch = (3, *shape[1:])
        more = getattr(lean(vae), f"memory_used_{name}")(batch, torch.bfloat16)
        assert needs[1] < more < 3 * needs[1]
    decode, five = lean(vae).memory_used_decode, (1, 16, 5, 60, 104)
    assert decode((1, 16, 1, 60, 104), torch.bfloat16) < decode(five, torch.bfloat16)


@pytest.mark.parametrize("is_bug_here", [False, True])
def test_a_card_convolves_by_the_kernel_that_the_host_takes(
    host: Any, monkeypatch: pytest.MonkeyPatch, is_bug_here: bool
) -> None:
    """With some versions of cuDNN, torch's own conv3d of half types takes a slow way."""
    import comfy.ops
    from pack.nodes.host.vae import video_layers
    from torch._subclasses.fake_tensor import FakeTensorMode

    seen: list[torch.Tensor] = []

    def convolution(window: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        seen.append(window)
        return torch.nn.functional.conv3d(window, args[0], None, args[2], args[1])

    monkeypatch.setattr(comfy.ops, "NVIDIA_MEMORY_CONV_BUG_WORKAROUND", is_bug_here)
    monkeypatch.setattr(torch, "cudnn_convolution", convolution)
    for dtype in (torch.bfloat16, torch.float32):
        with FakeTensorMode(), torch.device("cuda"):
            window, weight = torch.empty(1, 4, 3, 5, 6, dtype=dtype), torch.empty(8, 4, 3, 3, 3)
            made = video_layers._convolve(
                window, weight.to(dtype), torch.empty(8, dtype=dtype), columns=1
            )
        assert made.shape == (1, 8, 1, 3, 6)
    assert len(seen) == int(is_bug_here)
