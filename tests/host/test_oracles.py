"""What the loader node loads computes what diffusers and transformers compute from the same folder.

Float32 on the CPU, random weights, small widths. The oracles read the folder with their own code;
the host's model comes from the node alone.

Conventions. The host's model takes the noise level sigma (1 = noise) as its timestep and answers
with the velocity v from picture to noise, denoised = x - sigma * v. diffusers' model takes
t = 1 - sigma (0 = noise) and answers with the opposite direction. So host(t) = -diffusers(1 - t).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    ZImagePipeline,
    ZImageTransformer2DModel,
)

FOLDER_NAME = "Z-Image-Turbo/"
SAME_FOLDER = "from the same folder"
SHORT = "a red fox"
LONG = (
    "a wide photograph of a harbour at dawn, fishing boats tied to wooden piers, gulls above the "
    "masts, warm light on wet cobblestones, thin fog over the water"
)
# No weights in brackets for this model, on either side. (Only a backslash before a bracket differs:
# the host takes it away.)
UNUSUAL = "(sharp:1.3) [fog] {a|b}\n一只在雪地里的红狐狸 🦊 "


class Loaded(NamedTuple):
    model: Any
    clip: Any
    vae: Any


def _load(*choices: str) -> Loaded:
    from pack.nodes.load_model import LoadZImageTurbo

    with torch.inference_mode():  # as the host runs nodes
        return Loaded(*LoadZImageTurbo.execute(*choices).args)


@pytest.fixture(scope="module")
def from_folder(small_folder: Path) -> Loaded:
    return _load(FOLDER_NAME, SAME_FOLDER, SAME_FOLDER)


@pytest.fixture(scope="module")
def from_files(small_files: dict[str, Path]) -> Loaded:
    return _load(*(path.name for path in small_files.values()))


@pytest.fixture(scope="module")
def pipeline(small_folder: Path) -> ZImagePipeline:
    pipeline = ZImagePipeline.from_pretrained(small_folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.inference_mode():
        yield


def _noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    assert got.shape == wanted.shape
    assert got.dtype == wanted.dtype == torch.float32
    return ((got - wanted).norm() / wanted.norm()).item()


def _host_velocity(model: Any, x: torch.Tensor, sigma: float, text: torch.Tensor) -> torch.Tensor:
    """The velocity behind the denoised latent that the host's samplers see."""
    base = model.model
    conds = base.extra_conds(cross_attn=text, noise=x, device=x.device)
    prepared = {
        key: cond.process_cond(batch_size=1, device=x.device).cond for key, cond in conds.items()
    }
    denoised = base.apply_model(x, torch.tensor([sigma]), **prepared)
    return (x - denoised) / sigma


# 16x16 latents are 64 tokens; 22x36 are 198, which the model fills up with 26 pad tokens.
@pytest.mark.parametrize("size", [(16, 16), (22, 36)], ids=str)
# 9 and 48 text tokens: filled up to 32 and to 64.
@pytest.mark.parametrize("text_tokens", [9, 48])
def test_transformer_equals_diffusers(host, from_folder, small_folder, size, text_tokens):
    oracle = ZImageTransformer2DModel.from_pretrained(small_folder / "transformer")
    host.model_management.load_models_gpu([from_folder.model])
    x = _noise(1, 16, *size, seed=1)
    text = _noise(1, text_tokens, oracle.config.cap_feat_dim, seed=2)
    for sigma in (0.9, 0.3):
        wanted = oracle([x[0][:, None]], torch.tensor([1 - sigma]), [text[0]]).sample[0][:, 0]
        got = _host_velocity(from_folder.model, x, sigma, text)[0]
        assert _relative_error(got, -wanted) < 1e-4


def test_transformer_oracle_sees_every_input(small_folder):
    """The comparison above would notice another timestep, another prompt or another seed."""
    oracle = ZImageTransformer2DModel.from_pretrained(small_folder / "transformer")
    width = oracle.config.cap_feat_dim

    def answer(t: float = 0.1, text_seed: int = 2, seed: int = 1) -> torch.Tensor:
        x, text = _noise(16, 1, 16, 16, seed=seed), _noise(9, width, seed=text_seed)
        return oracle([x], torch.tensor([t]), [text]).sample[0]

    for change in ({"t": 0.9}, {"text_seed": 3}, {"seed": 4}):
        assert _relative_error(answer(**change), answer()) > 1e-2, change


@pytest.mark.parametrize(
    "prompt", [SHORT, LONG, UNUSUAL, ""], ids=["short", "long", "unusual", "empty"]
)
def test_text_encoder_equals_transformers(from_folder, pipeline, prompt):
    wanted = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False, device="cpu")[0][0]
    got = from_folder.clip.encode_from_tokens_scheduled(from_folder.clip.tokenize(prompt))[0][0]
    assert _relative_error(got[0], wanted) < 1e-5


def test_vae_equals_diffusers(from_folder, small_folder):
    """Both take and give latents unscaled; the host's pictures are [B, H, W, C] in 0..1."""
    oracle = AutoencoderKL.from_pretrained(small_folder / "vae", dtype=torch.float32)
    latent = _noise(2, 16, 8, 12, seed=3)
    wanted = (oracle.decode(latent).sample / 2 + 0.5).clamp(0, 1).movedim(1, -1)
    got = from_folder.vae.decode(latent)
    assert got.shape == (2, 64, 96, 3)
    assert _relative_error(got, wanted) < 1e-5

    picture = torch.rand(1, 64, 96, 3, generator=torch.Generator().manual_seed(4))
    wanted = oracle.encode(picture.movedim(-1, 1) * 2 - 1).latent_dist.mode()
    assert _relative_error(from_folder.vae.encode(picture), wanted) < 1e-5


def test_latent_scale_equals_the_folders(from_folder, small_folder):
    """The host knows the latent's scale and shift by itself; the folder's VAE states them."""
    config = AutoencoderKL.load_config(small_folder / "vae")
    latent = _noise(1, 16, 8, 8, seed=5)
    wanted = (latent - config["shift_factor"]) * config["scaling_factor"]
    assert _relative_error(from_folder.model.model.process_latent_in(latent), wanted) < 1e-6


def test_single_files_and_folder_give_the_same_bits(from_folder, from_files):
    for part, modules in {
        "model": (from_folder.model.model, from_files.model.model),
        "clip": (from_folder.clip.cond_stage_model, from_files.clip.cond_stage_model),
        "vae": (from_folder.vae.first_stage_model, from_files.vae.first_stage_model),
    }.items():
        ours, theirs = (module.state_dict() for module in modules)
        assert ours.keys() == theirs.keys()
        differing = [key for key in ours if not torch.equal(ours[key], theirs[key])]
        assert not differing, part


@pytest.mark.parametrize(
    "shift", [3.0, pytest.param(1.5, marks=[pytest.mark.slow, pytest.mark.once])]
)
def test_sampling_equals_the_pipeline(host, small_folder, shift):
    """Four steps of the host's KSampler and a decode are the diffusers pipeline's picture.

    Neither side is told the shift: the node and the pipeline read it in the folder.
    """
    import comfy.sample

    folder = _with_shift(small_folder, shift)
    pipeline = ZImagePipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    model, clip, vae = _load(f"{folder.name}/", SAME_FOLDER, SAME_FOLDER)

    seed = 7
    empty = torch.zeros(1, 16, 8, 12)
    noise = comfy.sample.prepare_noise(empty, seed)
    wanted = pipeline(
        LONG,
        height=64,
        width=96,
        num_inference_steps=4,
        guidance_scale=0.0,
        latents=noise.clone(),
        output_type="pt",
    ).images
    positive = clip.encode_from_tokens_scheduled(clip.tokenize(LONG))
    (latent,) = host.nodes.common_ksampler(
        model, seed, 4, 1.0, "euler", "simple", positive, positive, {"samples": empty}
    )
    got = vae.decode(latent["samples"])
    assert _relative_error(got, wanted.movedim(1, -1)) < 1e-4


def _with_shift(folder: Path, shift: float) -> Path:
    """A folder beside the given one, with the same weights and another schedule."""
    other = folder.with_name(f"shift-{shift}")
    (other / "scheduler").mkdir(parents=True)
    for name in ("transformer", "text_encoder", "tokenizer", "vae", "model_index.json"):
        (other / name).symlink_to(folder / name)
    FlowMatchEulerDiscreteScheduler(shift=shift).save_pretrained(other / "scheduler")
    return other
