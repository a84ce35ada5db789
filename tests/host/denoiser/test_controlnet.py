"""Z-Image Fun ControlNets behind our nodes: the host's bits, little memory, and nothing left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pack.nodes.denoiser.peak import lean_peak_bytes, stock_peak_bytes
from pack.nodes.denoiser.plan import DenoiserChoice, denoiser_plan
from pack.nodes.denoiser.sizes import UNIONS as PUBLISHED
from pack.nodes.denoiser.sizes import Z_IMAGE, Request
from pack.testing import attention_models, lean_models
from pack.testing.control_models import (
    NARROW,
    UNIONS,
    control_net,
    controlled,
    fake_controlled,
    net_sizes,
    picture,
)
from pack.testing.lean_models import assert_same, block_lora, built, fail, lean, sample, stopping
from pack.testing.stock_forward import FakeDenoiser

pytestmark = pytest.mark.usefixtures("host", "_one_thread")

SAMPLED = (pytest.mark.once, pytest.mark.slow)
SIDE = 44  # 484 picture tokens and 32 of text: two chunks
HINT = picture(8 * SIDE, 8 * SIDE)
MASK = torch.zeros(1, 64, 64)
MASK[:, 16:48, 8:40] = 1


@pytest.fixture(scope="module")
def vae(host: Any, small_folder: Path) -> Any:
    return lean_models.from_loader(host, small_folder).vae


@pytest.fixture(scope="module")
def model(host: Any) -> Any:
    return built("ZImage", NARROW)


@pytest.fixture(scope="module")
def nets(host: Any) -> dict[str, Any]:
    return {name: control_net(**config) for name, config in UNIONS.items()}


def latent(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def patches_of(model: Any) -> list[Any]:
    return model.model_options["transformer_options"]["patches"]["double_block"]


@contextmanager
def stock_calls() -> Iterator[list[Any]]:
    """The ControlNets' blocks that run as the host's modules."""
    from comfy.ldm.lumina.controlnet import ZImageControlTransformerBlock as Block

    called: list[Any] = []

    def hook(module: Any, args: Any, output: Any) -> None:
        if type(module) is Block:
            called.append(module)

    handle = torch.nn.modules.module.register_module_forward_hook(hook)
    try:
        yield called
    finally:
        handle.remove()


def assert_lean(stock: Any, ours: Any, *, rounding: bool = False, **options: Any) -> torch.Tensor:
    """Ours is the host's, with no block of a ControlNet that runs as the host's module.

    Each needs patches of its own: the host's leave their last control stream behind.
    """
    options.setdefault("noise", latent(1, 16, SIDE, SIDE))
    with stock_calls() as called:
        wanted = sample(stock, **options).latent
        assert called
        called.clear()
        got = sample(ours, **options).latent
        assert not called, "of the host's modules"
    if rounding:
        assert (got - wanted).norm() / wanted.norm() < 1e-5
    else:
        assert torch.equal(got, wanted)
    return got


@pytest.mark.parametrize(
    "name",
    ["union", "union 2.1", *(pytest.param(n, marks=SAMPLED) for n in ("union 2.0", "lite"))],
)
def test_has_the_hosts_bits(model, vae, nets, name):
    """The node behind ours; and before it, see the next tests."""

    def put(on: Any) -> Any:
        return controlled(on, nets[name], vae, image=HINT, strength=0.7)

    got = assert_lean(put(model), put(lean(model)))
    assert not torch.equal(sample(model, noise=latent(1, 16, SIDE, SIDE)).latent, got)


def test_has_the_hosts_bits_in_bfloat16(vae, nets):
    half = built("ZImage", NARROW)
    half.model.diffusion_model.to(torch.bfloat16).dtype = torch.bfloat16
    stock, ours = (controlled(m, nets["union"], vae, image=HINT) for m in (half, lean(half)))
    assert_lean(stock, ours)


@pytest.mark.parametrize(
    ("name", "shape", "pictures", "rounding"),
    [
        pytest.param("union", (1, 16, 44, 47), {"image": HINT}, False, id="odd"),
        pytest.param("union", (2, 16, 44, 44), {"image": HINT}, True, id="batch", marks=SAMPLED),
        pytest.param("lite", (2, 16, 44, 44), {"image": HINT}, True, id="lite batch"),
        pytest.param(
            "lite",
            (2, 16, 44, 44),
            {"image": picture(352, 352, batch=2)},
            True,
            id="two hints",
            marks=SAMPLED,
        ),
        pytest.param(
            "lite", (1, 16, 44, 44), {"inpaint_image": HINT, "mask": MASK}, False, id="inpaint"
        ),
        pytest.param(
            "union 2.1",
            (1, 16, 44, 44),
            {"image": HINT, "inpaint_image": picture(300, 300), "mask": MASK},
            False,
            id="scaled",
        ),
    ],
)
def test_requests(model, vae, nets, name, shape, pictures, rounding):
    stock, ours = (controlled(m, nets[name], vae, **pictures) for m in (model, lean(model)))
    assert_lean(stock, ours, noise=latent(*shape), rounding=rounding)
    # What the patch encoded for the picture's size is kept, as by the host's.
    kept = [patches_of(m)[0] for m in (stock, ours)]
    padded = tuple(-(-side // 2) * 16 for side in shape[2:])
    assert kept[0].encoded_image_size == kept[1].encoded_image_size == padded
    assert torch.equal(kept[0].encoded_image, kept[1].encoded_image)


@pytest.mark.once
def test_two_of_them_beside_another_patch_and_a_lora(host, model, vae, nets):
    def put(on: Any) -> Any:
        on = controlled(on, nets["union"], vae, image=HINT)
        on.set_model_double_block_patch(lambda args: {"txt": 1.1 * args["txt"]})
        return controlled(on, nets["union 2.1"], vae, image=picture(8 * SIDE, 8 * SIDE, seed=6))

    patched = host.sd.load_lora_for_models(model, None, block_lora(model), 0.8, 0)[0]
    assert_lean(put(patched), put(lean(patched)))


@pytest.mark.once
def test_over_steps(model, vae):
    """One layer ends in the first block, so that the host's patch begins each step afresh."""
    net = control_net(n_control_layers=1, refiner_control=True)
    stock, ours = (controlled(m, net, vae, image=HINT) for m in (model, lean(model)))
    assert_lean(stock, ours, steps=2)


def test_fit_to_vram_is_the_same(model, vae, nets):
    from pack.nodes.fit_to_vram import FitToVRAM

    def put(on: Any) -> Any:
        return controlled(on, nets["lite"], vae, image=HINT)

    def fitted(on: Any) -> Any:
        return FitToVRAM.execute(on, 12.0, "smallest").args[0]

    got = assert_lean(put(model), put(fitted(model)))
    assert torch.equal(sample(fitted(put(model)), noise=latent(1, 16, SIDE, SIDE)).latent, got)


@pytest.mark.parametrize("fault", ["cancelled", pytest.param("exception", marks=pytest.mark.once)])
def test_a_fault_in_mid_forward_spoils_no_later_prompt(host, model, vae, nets, fault):
    """Bug of the host: its patch keeps the control stream of a cancelled forward for the next."""
    management = host.model_management

    def cancel() -> None:
        management.interrupt_current_processing(True)

    def state() -> dict[str, Any]:
        (patch,) = patches_of(ours)
        tensors = {n: t.data_ptr() for n, t in net.model.state_dict(keep_vars=True).items()}
        modules = {n: (id(m), {*vars(m)}) for n, m in net.model.named_modules()}
        return {"patch": {n: id(v) for n, v in vars(patch).items()}, **modules, "values": tensors}

    net = nets["union 2.1"]
    ours = controlled(lean(model), net, vae, image=HINT)
    options = {"noise": latent(1, 16, SIDE, SIDE)}
    wanted, before = sample(ours, **options).latent, state()
    stop = cancel if fault == "cancelled" else fail
    expected = management.InterruptProcessingException if fault == "cancelled" else RuntimeError
    for at in (4, 14):  # attention of the image refiner and of a main block
        try:
            with pytest.raises(expected):
                sample(stopping(ours, stop, at=at), **options)
        finally:
            management.interrupt_current_processing(False)
        assert state() == before
        assert torch.equal(sample(ours, **options).latent, wanted)


@pytest.mark.once
def test_gradients_are_the_hosts(host, model, vae, nets):
    """Bug: they raised, as the control stream was written over."""
    from comfy import model_patcher, sampler_helpers

    def gradient(on: Any) -> torch.Tensor:
        patched = controlled(on, nets["lite"], vae, image=HINT)
        nets["lite"].model.requires_grad_(False)
        (patch,) = patches_of(patched)
        patch.encoded_image = patch.encoded_image.clone()  # one of inference mode has no gradient
        host.model_management.load_models_gpu([patched])
        given = latent(1, 16, SIDE, SIDE).requires_grad_()
        context = lean_models.prompt()[0][0]
        options = model_patcher.create_model_options_clone(patched.model_options)
        sampler_helpers.prepare_model_patcher(patched, {}, options)
        options = options["transformer_options"]
        out = patched.model.diffusion_model(
            given, torch.tensor([0.4]), context, context.shape[1], transformer_options=options
        )
        out.square().mean().backward()
        assert given.grad is not None
        return given.grad

    host.model_management.in_training = True
    try:
        wanted, got = gradient(model), gradient(lean(model))
    finally:
        host.model_management.in_training = False
    assert wanted.abs().max() > 0 and torch.equal(got, wanted)


@pytest.mark.once
def test_a_control_block_that_another_node_hooked_runs_as_it_is(model, vae):
    net = control_net(**UNIONS["lite"])
    calls: list[int] = []
    net.model.control_layers[0].register_forward_hook(lambda *_: calls.append(1))
    stock, ours = (controlled(m, net, vae, image=HINT) for m in (model, lean(model)))
    assert_same(stock, ours, noise=latent(1, 16, SIDE, SIDE))
    assert len(calls) == 2


@pytest.mark.parametrize("name", UNIONS)
def test_sizes_are_those_of_the_hosts_class(vae, name):
    from comfy.ldm.lumina.controlnet import ZImage_Control
    from pack.nodes.host.denoiser.controlnet import control_sizes

    full = ZImage_Control(**UNIONS[name], device="meta", operations=torch.nn)
    net = attention_models.patcher(full)
    model = attention_models.patcher(torch.nn.Linear(1, 1))
    patch = controlled(model, net, vae, image=picture(64, 64)).model_options["transformer_options"]
    (sizes,) = control_sizes(patch)
    assert sizes == net_sizes(name)
    assert sizes.parameters(Z_IMAGE) == sum(p.numel() for p in full.parameters())
    if name != "union 2.0":
        assert sizes == PUBLISHED[sizes.layers]


@pytest.fixture(scope="module")
def denoiser(host: Any) -> FakeDenoiser:
    return FakeDenoiser(replace(Z_IMAGE, layers=2))


def control_request(name: str, *shape: int) -> Request:
    return Request(*shape, has_patches=True, controls=(net_sizes(name),))


def measured_with(denoiser: Any, request: Request, name: str, prefer: Any) -> tuple[int, Any]:
    """The peak of our forward beside a ControlNet, and its plan."""
    patcher = lean(denoiser.patcher(), chunk_tokens=0, head_groups=0, prefer=prefer)
    with fake_controlled(denoiser, patcher, request, name) as patched:
        tracker = denoiser.measure(request, patcher=patched, attention="flash")
    return tracker.peak_bytes, denoiser_plan(request, DenoiserChoice(prefer))


FULL_SIZE = [
    ("union 2.1", (1024, 1024)),
    ("union", (512, 512, 4)),
    *(
        pytest.param(name, shape, marks=SAMPLED)
        for name, shape in [
            ("union", (1024, 1024)),
            ("union 2.0", (1024, 1024)),
            ("union 2.0", (248, 344, 3, 77)),
            ("union 2.1", (2048, 2048)),
        ]
    ),
]


@pytest.mark.parametrize(("name", "shape"), FULL_SIZE)
def test_the_hosts_peak_is_as_predicted(denoiser, name, shape):
    request = control_request(name, *shape)
    with fake_controlled(denoiser, denoiser.patcher(), request, name) as patcher:
        measured = denoiser.measure(request, patcher=patcher, attention="flash").peak_bytes
    assert stock_peak_bytes(request) == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize(("name", "shape"), FULL_SIZE)
def test_our_peak_is_as_predicted_and_small(denoiser, name, shape):
    """Bug: the ControlNet's own blocks had the host's peak, so that nothing was saved.

    Of Union 2.1 at 1024x1024 and with balance, in MiB: 214 in all, of which 60 are the ControlNet's
    two streams, and 30 the pictures' copy for the patch; 123 without it, 545 with the host.
    """
    request = control_request(name, *shape)
    measured, plan = measured_with(denoiser, request, name, "balance")
    assert lean_peak_bytes(request, plan) == pytest.approx(measured, rel=0.03)
    (net,) = request.controls
    own = max(2, net.refiner_streams) * 2 * request.batch * request.image_tokens * Z_IMAGE.dim
    alone = lean_peak_bytes(replace(request, has_patches=False, controls=()), plan)
    assert measured - own < 1.35 * alone


@pytest.mark.once
@pytest.mark.slow
def test_our_smallest_peak_is_as_predicted(denoiser):
    """What a ControlNet adds next is larger than a block of one sample."""
    request = control_request("lite", 256, 256, 4)
    measured, plan = measured_with(denoiser, request, "lite", "smallest")
    assert lean_peak_bytes(request, plan) == pytest.approx(measured, rel=0.03)


@pytest.mark.once
def test_a_hint_that_is_encoded_in_a_forward_comes_to_the_card(denoiser):
    """Bug: it stayed in RAM, as the host moves the hint of its own patch alone, and once a prompt.

    That is so where the picture has another size than the hint; a VAE's latent comes in RAM.
    """
    request = control_request("lite", 256, 256)
    with fake_controlled(denoiser, lean(denoiser.patcher()), request, "lite") as patched:
        (patch,) = patches_of(patched)
        encode, encoded = patch.vae.encode, []

        def to_ram(pixels: torch.Tensor) -> torch.Tensor:
            encoded.append(encode(pixels).cpu())
            return encoded[-1]

        patch.vae.encode = to_ram
        patch.encoded_image_size = None
        denoiser.measure(request, patcher=patched, attention="flash")
    assert encoded and patch.encoded_image_size == (256, 256)
