"""The whole lean forward has the host's bits for what people add: references, patches, masks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from pack.testing import lean_models
from pack.testing.lean_models import TEXT_WIDTH

pytestmark = pytest.mark.usefixtures("host")

DTYPES = [torch.float32, torch.bfloat16]
SEEN_WIDTH = 40


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def denoisers(host: Any, request: pytest.FixtureRequest) -> dict[bool, Any]:
    """By whether the model knows features of pictures (SigLIP)."""
    made = {}
    for is_seeing in (False, True):
        more = {"siglip_feat_dim": SEEN_WIDTH} if is_seeing else {}
        built = lean_models.built("ZImage", {**lean_models.Z_IMAGE, **more})
        with torch.inference_mode():
            made[is_seeing] = copy.deepcopy(built.model.diffusion_model).to(request.param)
    return made


def _draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _latents(*sizes: tuple[int, int]) -> list[torch.Tensor]:
    return [_draw(1, 16, *size, seed=n) for n, size in enumerate(sizes)]


def _texts(*lengths: int) -> list[torch.Tensor]:
    return [_draw(1, length, TEXT_WIDTH, seed=length) for length in lengths]


REFERENCES: dict[str, dict[str, Any]] = {
    "none": {},
    "one": {"ref_latents": _latents((20, 14))},
    "one with a text": {"ref_latents": _latents((32, 38)), "ref_contexts": _texts(9)},
    "two and texts left over": {
        "ref_latents": _latents((20, 14), (32, 32)), "ref_contexts": _texts(9, 32, 3, 40),
    },
}  # fmt: skip
LONELY = {"ref_contexts": _texts(9)}
SEEN: dict[str, dict[str, Any]] = {
    "not seen": {"ref_latents": _latents((20, 14), (32, 32))},
    "seen": {
        "ref_latents": _latents((20, 14), (32, 32)), "ref_contexts": _texts(9, 33, 3),
        "siglip_feats": [_draw(1, 3, 5, SEEN_WIDTH, seed=7), _draw(1, 8, 8, SEEN_WIDTH, seed=8)],
    },
    "one of two is seen": {
        "ref_latents": _latents((32, 20), (10, 6)),
        "siglip_feats": [_draw(1, 4, 6, SEEN_WIDTH, seed=7)],
    },
}  # fmt: skip
EACH = [
    *(pytest.param(False, more, id=name) for name, more in REFERENCES.items()),
    *(pytest.param(True, more, id=f"siglip, {name}") for name, more in SEEN.items()),
]


def _in_place(args: dict[str, Any]) -> dict[str, Any]:
    args["img"][:, 3:] += 0.1 * args["img_input"][:, 3:]
    args["txt"].mul_(1.01)
    return {}


def _returning(args: dict[str, Any]) -> dict[str, Any]:
    return {**args, "img": args["img"] + 0.1 * args["img_input"], "txt": 0.9 * args["txt"]}


PATCHES: dict[str, dict[str, list[Any]]] = {
    "double_block": {"double_block": [_in_place]},
    "noise_refiner": {"noise_refiner": [_returning]},
    "two of each": {
        "double_block": [_returning, _in_place], "noise_refiner": [_in_place, _returning],
    },
}  # fmt: skip


def _noting(patch: Any, seen: list[dict[str, Any]]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The patch, which notes copies of all that it gets."""

    def noted(args: dict[str, Any]) -> dict[str, Any]:
        options = args["transformer_options"]
        held: dict[str, Any] = {
            key: value.clone() if torch.is_tensor(value) else value for key, value in args.items()
        }
        held["transformer_options"] = {key: options.get(key) for key in _SET_BY_THE_HOST}
        seen.append(held)
        return patch(args)

    return noted


_SET_BY_THE_HOST = ("total_blocks", "block_type", "block_index")


def _forwards(
    denoiser: Any,
    *,
    prefer: str | None = None,
    size: tuple[int, int] = (33, 50),
    batch: int = 1,
    patches: dict[str, list[Any]] | None = None,
    handovers: Sequence[str] = (),
    **more: Any,
) -> tuple[torch.Tensor, torch.Tensor, list[dict[str, Any]], list[dict[str, Any]]]:
    """The host's picture and ours, and what the patches of each got.

    Args:
        handovers: reasons for which ours may go to the host's own forward.
    """
    from comfy.patcher_extension import WrappersMP
    from pack.nodes.denoiser.plan import DenoiserChoice
    from pack.nodes.denoiser.sizes import Z_IMAGE
    from pack.nodes.host.denoiser.block import BlockSettings
    from pack.nodes.host.denoiser.forward import make_wrapper

    choice = DenoiserChoice("balance", 2, 256) if prefer is None else DenoiserChoice(prefer)
    reasons: list[str] = []
    wrapper = make_wrapper(BlockSettings(Z_IMAGE, choice), reasons.append)
    dtype = denoiser.x_pad_token.dtype

    def typed(value: Any) -> Any:
        return [v.to(dtype) for v in value] if isinstance(value, list) else value

    more = {key: typed(value) for key, value in more.items()}
    x, text = _draw(batch, 16, *size, seed=1).to(dtype), _texts(77)[0].to(dtype)
    found: list[Any] = []
    for wrappers in ({}, {WrappersMP.DIFFUSION_MODEL: {"test": [wrapper]}}):
        seen: list[dict[str, Any]] = []
        noting = {n: [_noting(p, seen) for p in ps] for n, ps in (patches or {}).items()}
        options: dict[str, Any] = {"wrappers": wrappers, "patches": noting}
        out = denoiser(
            x, torch.linspace(0.7, 0.3, batch), text, 77, transformer_options=options, **more
        )
        assert out.isfinite().all() and out.std() > 0
        found += [out, seen]
    assert reasons == list(handovers)
    wanted, seen_wanted, got, seen_got = found
    assert got.shape == wanted.shape == x.shape and got.dtype == wanted.dtype
    return wanted, got, seen_wanted, seen_got


def _assert_same_calls(wanted: list[dict[str, Any]], got: list[dict[str, Any]]) -> None:
    assert len(wanted) == len(got)
    for number, (one, two) in enumerate(zip(wanted, got, strict=True)):
        assert one.keys() == two.keys()
        for key, value in one.items():
            same = torch.equal(value, two[key]) if torch.is_tensor(value) else value == two[key]
            assert same, (number, key)


@pytest.mark.parametrize(("is_seeing", "more"), EACH)
def test_references_have_the_hosts_bits(
    denoisers: dict[bool, Any], is_seeing: bool, more: dict[str, Any]
) -> None:
    """Bug: they sent the request to the host's own forward."""
    wanted, got, _, _ = _forwards(denoisers[is_seeing], **more)
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("kind", PATCHES)
@pytest.mark.parametrize(
    ("is_seeing", "more"),
    [EACH[0], EACH[-4], pytest.param(*EACH[-2].values, id=EACH[-2].id, marks=pytest.mark.once)],
)
def test_patches_have_the_hosts_bits(
    denoisers: dict[bool, Any], is_seeing: bool, more: dict[str, Any], kind: str
) -> None:
    """And get what the host gives them, in its order. Bug: they sent it to the host's forward."""
    prefer = "smallest" if kind == "two of each" else None  # gathers the table piece by piece
    wanted, got, seen_wanted, seen_got = _forwards(
        denoisers[is_seeing], prefer=prefer, patches=PATCHES[kind], **more
    )
    assert torch.equal(got, wanted)
    assert len(seen_got) == 2 * sum(map(len, PATCHES[kind].values()))  # two blocks of each kind
    _assert_same_calls(seen_wanted, seen_got)


@pytest.mark.parametrize("kind", ["double_block", "noise_refiner"])
def test_what_a_patch_keeps_stays_as_the_host_leaves_it(
    denoisers: dict[bool, Any], kind: str
) -> None:
    """Bug: later blocks wrote over what a patch had kept of an earlier one."""
    runs: list[list[torch.Tensor]] = []

    def keep(args: dict[str, Any]) -> dict[str, Any]:
        if args["block_index"] == 0:
            runs.append([])
        kept = runs[-1]
        kept.extend((args["img"], args["img"][:, 3:], args["txt"], args["img_input"]))
        return {"img": args["img"] + 0.1 * kept[0] - 0.1 * kept[3]}

    def write(args: dict[str, Any]) -> dict[str, Any]:
        args["img"].mul_(1.01)
        return {}

    patches = {kind: [keep, write]}
    wanted, got, _, _ = _forwards(denoisers[False], patches=patches, **REFERENCES["one"])
    assert torch.equal(got, wanted)
    assert len(runs[0]) == len(runs[1]) == 8
    for number, (one, two) in enumerate(zip(*runs, strict=True)):
        assert torch.equal(one, two), number


@pytest.mark.once
@pytest.mark.parametrize(("is_seeing", "more"), [EACH[0], EACH[2], EACH[-1]])
def test_a_batch_is_equal_up_to_rounding(
    denoisers: dict[bool, Any], is_seeing: bool, more: dict[str, Any]
) -> None:
    wanted, got, _, _ = _forwards(
        denoisers[is_seeing], batch=2, patches=PATCHES["two of each"], **more
    )
    error = ((got - wanted).double().norm() / wanted.double().norm()).item()
    assert error < (1e-6 if got.dtype == torch.float32 else 2e-2)


def test_what_the_host_ignores(denoisers: dict[bool, Any]) -> None:
    """Masks, and texts of pictures that are not there."""
    mask = torch.ones(1, 77)
    mask[:, 40:] = 0
    plain = _forwards(denoisers[False])[0]
    for more in ({"attention_mask": mask}, LONELY):
        wanted, got, _, _ = _forwards(denoisers[False], **more)
        assert torch.equal(got, wanted) and torch.equal(got, plain)


@pytest.mark.once
def test_a_changed_refiner_of_features_is_not_passed_over(denoisers: dict[bool, Any]) -> None:
    """Bug: only the blocks of the other stacks were looked at."""
    calls: list[Any] = []
    block = denoisers[True].siglip_refiner[1]
    hook = block.register_forward_hook(lambda *args: calls.append(args))
    handovers = ["another node changed a block"]
    try:
        wanted, got, _, _ = _forwards(denoisers[True], handovers=handovers, **SEEN["seen"])
    finally:
        hook.remove()
    assert torch.equal(got, wanted) and len(calls) == 2
