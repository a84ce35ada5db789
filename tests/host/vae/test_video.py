"""Lean VAE decodes and encodes with the Wan class as the host does, and leaves the rest alone."""

from __future__ import annotations

import gc
import re
from typing import Any

import pytest
import torch
from pack.nodes.probe.tracker import PeakTracker
from pack.testing.vae_models import At, lean, raise_oom
from pack.testing.video_models import VERSIONS, Version, wan_vae

pytestmark = pytest.mark.usefixtures("host")

PREFER = ["speed", "balance", "smallest"]


@pytest.fixture(scope="module", params=VERSIONS)
def vae(host: Any, request: pytest.FixtureRequest) -> Any:
    vae = wan_vae(version=request.param)
    with torch.inference_mode():
        vae.decode(_latent(vae, 1, 2, 2))  # loads it: that takes weight functions away
    return vae


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Any:
    caplog.set_level("INFO", logger="pack.nodes")
    return lambda: "\n".join(r.message for r in caplog.records if r.message.startswith("Lean VAE"))


def _factor(vae: Any) -> int:
    """Pixels per position of the latent."""
    return vae.upscale_ratio[1]


def _sides(vae: Any) -> tuple[int, int]:
    """Of a latent whose picture has 56x40 pixels, or 64x48."""
    return (7, 5) if _factor(vae) == 8 else (4, 3)


def _latent(vae: Any, frames: int, height: int = 0, width: int = 0, batch: int = 1) -> torch.Tensor:
    torch.manual_seed(frames + height)
    sides = (height, width) if height else _sides(vae)
    return torch.randn(batch, vae.latent_channels, frames, *sides)


def _video(vae: Any, frames: int, height: int = 0, width: int = 0) -> torch.Tensor:
    torch.manual_seed(frames)
    sides = (height, width) if height else [_factor(vae) * side for side in _sides(vae)]
    return torch.rand(frames, *sides, 3)


def _assert_near(made: torch.Tensor, wanted: torch.Tensor) -> None:
    assert made.shape == wanted.shape
    assert made.dtype == wanted.dtype
    assert wanted.std() > 0.05, "a picture of one colour shows nothing"
    assert (made - wanted).norm() < 3e-6 * wanted.norm()


def _last_conv(vae: Any) -> Any:
    last = vae.first_stage_model.decoder.upsamples[-1]
    return getattr(last, "upsamples", [last])[-1].residual[6]


def _name(vae: Any, module: Any) -> str:
    return next(name for name, one in vae.first_stage_model.named_modules() if one is module)


# Of an image, and of videos of 5, 9 and 13 frames. Wan 2.1's last ones the host takes in twos.
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("frames", [1, 2, 3, 4])
@torch.inference_mode()
def test_bfloat16_is_bit_for_bit_the_hosts(frames: int, version: Version) -> None:
    """Strips of one row, of a remainder, of more than the height."""
    vae = wan_vae(dtype=torch.bfloat16, seed=frames, version=version)
    latent, video = _latent(vae, frames), _video(vae, 4 * frames - 3)
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
        latent, video = _latent(vae, frames), _video(vae, 4 * frames - 3)
        changed = lean(vae, prefer, rows)
        wanted = vae.decode(latent)
        _assert_near(changed.decode(latent), wanted)
        _assert_near(changed.encode(video), vae.encode(video))
        # As packs call it that want a preview.
        direct = changed.first_stage_model.decode(latent.to(vae.vae_dtype))
        _assert_near(changed.process_output(direct).movedim(1, -1), wanted)


@torch.inference_mode()
def test_odd_sizes_batches_and_frames_that_are_left_out(vae: Any) -> None:
    changed, factor = lean(vae, "smallest", 8), _factor(vae)
    latents = _latent(vae, 2, 1, 1, batch=2)
    _assert_near(changed.decode(latents), vae.decode(latents))
    # 5 and 1 frames, cropped by the host
    for frames, height, width in ((7, 21 + factor, 30), (4, 16, 9 + factor)):
        video = _video(vae, frames, height, width)
        _assert_near(changed.encode(video), vae.encode(video))
    images = torch.rand(2, factor, 16, 48, 3)  # the host crops frames to the factor here
    _assert_near(changed.encode(images), vae.encode(images))


@torch.inference_mode()
def test_sides_that_are_not_cropped(vae: Any, said: Any) -> None:
    changed, pictures = lean(vae), torch.rand(1, 3, 1, 19, 22)
    if _factor(vae) == 8:
        wanted = vae.first_stage_model.encode(pictures)
        _assert_near(changed.first_stage_model.encode(pictures), wanted)
        return
    with pytest.raises(Exception) as of_host:
        vae.first_stage_model.encode(pictures)
    with pytest.raises(type(of_host.value), match=re.escape(str(of_host.value))):
        changed.first_stage_model.encode(pictures)
    assert "ComfyUI's own code runs: sides that are not a multiple of 16" in said()


@torch.inference_mode()
def test_four_channels(host: Any) -> None:
    """As of layered pictures: colours and opacity."""
    vae = wan_vae(channels=4)
    latent, picture = _latent(vae, 1), torch.rand(1, 24, 16, 4)
    changed = lean(vae, "balance", 16)
    _assert_near(changed.decode(latent), vae.decode(latent))
    _assert_near(changed.encode(picture), vae.encode(picture))


@torch.inference_mode()
def test_tiled_nodes_behind_it_still_tile(vae: Any) -> None:
    latent, factor = _latent(vae, 3, 12, 10), _factor(vae)
    video, changed = _video(vae, 5, 12 * factor, 10 * factor), lean(vae)
    for name, given, tile in (("encode", video, 8 * factor), ("decode", latent, 8)):
        settings = {"tile_x": tile, "tile_y": tile, "overlap": tile // 4}
        wanted = getattr(vae, f"{name}_tiled")(given, **settings)
        _assert_near(getattr(changed, f"{name}_tiled")(given, **settings), wanted)
    assert (wanted - vae.decode(latent)).std() > 1e-3, "tiles must show, or this compares nothing"


@torch.inference_mode()
def test_the_original_is_untouched_and_both_work_in_turn(vae: Any) -> None:
    latent = _latent(vae, 2)
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
    latent = _latent(vae, 1)
    twice = lean(lean(vae, "speed"), "smallest", 3)
    _assert_near(twice.decode(latent), vae.decode(latent))
    assert "left unchanged" not in said()
    assert twice.first_stage_model.decode.stock is vae.first_stage_model
    assert "MiB predicted at 1024x1024" in said()


@torch.inference_mode()
def test_a_changed_layer_runs_as_the_host_runs_it(vae: Any, said: Any) -> None:
    latent, changed = _latent(vae, 2), lean(vae)
    conv = _last_conv(vae)
    handle = conv.register_forward_hook(lambda module, given, made: 2 * made)
    try:
        assert torch.equal(changed.decode(latent), vae.decode(latent))
        assert torch.equal(changed.decode(latent), vae.decode(latent))
        reason = f"{_name(vae, conv)} is a CausalConv3d of another kind"
        assert said().count(f"ComfyUI's own code runs: {reason}") == 1
        shape = (1, vae.latent_channels, 1, 128, 128)
        assert changed.memory_used_decode(shape, torch.bfloat16) == (
            vae.memory_used_decode(shape, torch.bfloat16)
        )
        assert lean(vae) is vae
        assert f"this VAE is left unchanged: {reason}" in said()
    finally:
        handle.remove()
    assert lean(vae) is not vae


@torch.inference_mode()
def test_options_it_does_not_know_run_the_hosts_code(vae: Any, said: Any) -> None:
    model = lean(vae).first_stage_model
    with pytest.raises(TypeError, match="unexpected keyword argument 'timestep'"):
        model.decode(_latent(vae, 1), timestep=1)
    assert "ComfyUI's own code runs: it was called with timestep" in said()


@torch.inference_mode()
def test_cancel_frees_everything(vae: Any, host: Any) -> None:
    management, latent = host.model_management, _latent(vae, 2, 16, 16)
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
    latent = _latent(vae, 2)
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
    lean(vae).decode(_latent(vae, 2))
    assert seen == [], "short work shows no bar"
    monkeypatch.setattr(video_forward, "_LONG_PX", 0)
    lean(vae).decode(_latent(vae, 2))
    assert seen == sorted(set(seen))
    assert seen[-1] == 100


@torch.inference_mode()
def test_the_host_is_told_the_need(vae: Any) -> None:
    """At 2560x1440 it plans with 15 GiB for Wan 2.1's decode, of which 2.7 are ever alive."""
    factor, channels = _factor(vae), vae.latent_channels
    latent, picture = (1, channels, 1, 180, 320), (1, 3, 1, 180 * factor, 320 * factor)
    for name, shape in (("decode", latent), ("encode", picture)):
        stock = getattr(vae, f"memory_used_{name}")(shape, torch.bfloat16)
        needs = [
            getattr(lean(vae, prefer), f"memory_used_{name}")(shape, torch.bfloat16)
            for prefer in PREFER
        ]
        assert 0 < needs[2] <= needs[1] < needs[0] < stock
        # This narrow encoder of Wan 2.2 holds the picture and little besides.
        assert needs[2] < needs[1] or (name, factor) == ("encode", 16)
        batch = (3, *shape[1:])
        more = getattr(lean(vae), f"memory_used_{name}")(batch, torch.bfloat16)
        assert needs[1] < more < 3 * needs[1]
    decode, shapes = lean(vae).memory_used_decode, [(1, channels, n, 30, 52) for n in (1, 5)]
    assert decode(shapes[0], torch.bfloat16) < decode(shapes[1], torch.bfloat16)


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
