"""What requests ask of other families' blocks: patches, masks, references, and times."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import pytest
import torch
from pack.testing.family_calls import (
    Heard,
    attention_patch,
    drawn,
    forward,
)
from pack.testing.family_models import (
    FLUX,
    MAIN,
    NAMES,
    SMALL,
    WAN,
    built,
)

pytestmark = pytest.mark.usefixtures("host", "_one_thread")
PICTURE_TOKENS = 900
ONCE = pytest.mark.once
KINDS = ("attn1_patch", "attn1_output_patch", "attn2_patch")


@pytest.mark.parametrize("name", [*FLUX, "Qwen-Image"])
@torch.inference_mode()
def test_a_mask_goes_to_the_hosts_block(name: str) -> None:
    model, text = built(name), SMALL[name].text
    if name in FLUX:
        mask = torch.zeros(1, 1, text + PICTURE_TOKENS, text + PICTURE_TOKENS)
        mask[..., 5:9] = -torch.inf
    else:
        mask = torch.ones(1, text, dtype=torch.long)
        mask[:, 60:] = 0
    heard = Heard(model)
    wanted = forward(model, name, attention_mask=mask)
    assert torch.equal(forward(heard.model, name, attention_mask=mask), wanted)
    asked = "attn_mask" if name in FLUX else "encoder_hidden_states_mask"
    assert set(heard.reasons) == {f"the request has {asked}"}
    assert not torch.equal(wanted, forward(model, name))


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_patches_of_the_attention_go_to_the_hosts_block(name: str) -> None:
    model = built(name)
    block = getattr(model.model.diffusion_model, SMALL[name].stacks[0])[0]
    source = inspect.getsource(sys.modules[type(block).__module__])
    plain = forward(model, name)
    for kind in KINDS:
        options = {"transformer_options": {"patches": {kind: [attention_patch(name, 1.1, kind)]}}}
        heard, wanted = Heard(model), forward(model, name, **options)
        assert torch.equal(forward(heard.model, name, **options), wanted)
        assert all(kind in reason for reason in heard.reasons)
        # Older hosts have fewer patches.
        is_called = kind in source and (kind != "attn2_patch" or name in WAN)
        assert is_called != torch.equal(wanted, plain)
        # Only Wan attends to the text apart.
        assert bool(heard.reasons) == (kind != "attn2_patch" or name in WAN)


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_patches_around_blocks_get_what_the_host_gives_and_may_keep_it(name: str) -> None:
    """Controls, patches before and between the blocks, and replaced blocks, all at once."""
    model = built(name)
    heard = Heard(model)
    kept: list[torch.Tensor] = []
    add = drawn(1, PICTURE_TOKENS, 256, seed=6)

    def louder(args: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
        out = more["original_block"](args)
        kept.append(args["img"])
        return {**out, "img": 1.1 * out["img"] + 0.1 * args["img"]}

    def between(args: dict[str, Any]) -> dict[str, Any]:
        kept.append(args["img"])
        return {**args, "img": args["img"] + 0.1}

    def writing(args: dict[str, Any]) -> dict[str, Any]:
        args["img"][:, :9] += 0.1
        return args

    def given() -> dict[str, Any]:
        replaced = {("double_block", 1): louder, ("single_block", 1): louder}
        patches = {"post_input": [between], "double_block": [between, writing]}
        options = {"patches_replace": {"dit": replaced}, "patches": patches}
        more = {"input": [add.clone(), None], "output": [0.5 * add]}
        return {"transformer_options": options, **({} if name in WAN else {"control": more})}

    wanted = forward(model, name, **given())
    count = len(kept)
    assert torch.equal(forward(heard.model, name, **given()), wanted) and heard.reasons == []
    assert count and len(kept) == 2 * count
    assert all(map(torch.equal, kept[:count], kept[count:]))
    assert not torch.equal(wanted, forward(model, name))


REFERENCES = [
    *(("Qwen-Image", method) for method in ("index", "negative_index", "offset")),
    ("FLUX.2", None), ("FLUX.1", "offset"), pytest.param("klein", "offset", marks=ONCE),
    *((name, "index_timestep_zero") for name in ("FLUX.2", "Qwen-Image")),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "method"), REFERENCES)
@torch.inference_mode()
def test_reference_pictures(name: str, method: str | None, dtype: torch.dtype) -> None:
    """ "index_timestep_zero" gives references a time of their own: Qwen-Image's newer edit models.

    FLUX's blocks then modulate the references apart, and run as the host's.
    """
    model = built(name, dtype)
    heard = Heard(model)
    sides = (12, 16) if SMALL[name].cell == 1 else (24, 32)
    frames = () if SMALL[name].frames is None else (1,)
    given: dict[str, Any] = {
        "ref_latents": [drawn(1, SMALL[name].channels, *frames, *sides, dtype=dtype, seed=5)] * 2,
    }
    if method is not None:  # else the model's own
        given["ref_latents_method"] = method
    wanted = forward(model, name, **given)
    assert torch.equal(forward(heard.model, name, **given), wanted)
    assert not torch.equal(wanted, forward(model, name))
    source = inspect.getsource(type(model.model.diffusion_model))
    # Hosts before 0.18.0 have one time for all of FLUX.
    has_times = method == "index_timestep_zero" and method in source
    if has_times and name in FLUX:
        assert set(heard.reasons) == {"each token has its own modulation"}
    else:
        assert heard.reasons == []
        given["ref_latents"] = [torch.cat([ref, 0.9 * ref]) for ref in given["ref_latents"]]
        wanted = forward(model, name, batch=2, **given)
        got = forward(heard.model, name, batch=2, **given)
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        assert (got - wanted).norm() / wanted.norm() < tolerance and heard.reasons == []


@pytest.mark.parametrize("name", MAIN)
@torch.inference_mode()
def test_samples_that_share_a_time(name: str) -> None:
    """Names the bug: the second sample's time was looked for, and not found."""
    model = built(name)
    heard, times = Heard(model), torch.full((1,), 0.7)
    wanted = forward(model, name, batch=2, times=times)
    got = forward(heard.model, name, batch=2, times=times)
    if name in FLUX:  # whose blocks look for one time first
        assert (got - wanted).norm() / wanted.norm() < 1e-5 and heard.reasons == []
    else:
        assert torch.equal(got, wanted)
        assert set(heard.reasons) == {"several samples share one timestep"}
