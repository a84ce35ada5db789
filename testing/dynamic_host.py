"""The host with dynamic VRAM on a card that is not there: models of full width, exact bytes.

Weights are fake tensors in RAM with the true shapes; their pages and the buffers that they are
streamed through are the real comfy-aimdo's over the fake driver; activations are fake tensors that
a Tracker counts. What is stood for: streams and the tensors that pages and buffers are seen through
(see streamed.py), and what torch's allocator reports.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from pack.nodes.denoiser.sizes import Z_IMAGE, Request
from pack.testing.card_tracker import CardTracker
from pack.testing.fake_card import FakeCard
from pack.testing.stock_forward import FakeDenoiser, sdpa_options
from pack.testing.streamed import Order, installed
from pack.testing.vae_models import ddconfig

CARD = torch.device("cuda:0")
CPU = torch.device("cpu")
TEXT = 256
LAYERS = 6  # of the transformer: 3.5 GiB with its refiners


class Held(NamedTuple):
    """The most that a stage held, in bytes.

    live: of tensors that torch's allocator would hold.
    weights: of pages and buffers.
    together: of both at one moment.
    """

    live: int
    weights: int
    together: int


class DynamicHost:
    """Z-Image's three models under dynamic VRAM, on a fake card of that size; in a fork.

    Args:
        size_bytes: of the card.
        patch: the test's monkeypatch.
    """

    def __init__(self, size_bytes: int, patch: pytest.MonkeyPatch) -> None:
        import comfy.memory_management as memory
        import comfy.model_management as management
        import comfy.model_patcher as model_patcher

        sizes = dataclasses.replace(Z_IMAGE, layers=LAYERS)
        self.denoiser = FakeDenoiser(sizes, weights="streamed")
        self.mode: Any = self.denoiser.mode
        self.order = Order(self.mode)
        self.order.on_fetch = self._note
        self.card = FakeCard(size_bytes)
        self._management, self._patchers = management, model_patcher
        self._tracker: CardTracker | None = None
        self._used, self._most = 0, Held(0, 0, 0)
        patch.setattr(model_patcher, "CoreModelPatcher", model_patcher.ModelPatcherDynamic)
        # A card has a fused kernel for the VAE's attention; a host started without one has not.
        patch.setattr(management, "pytorch_attention_enabled_vae", lambda: True)
        self.vae = _vae(self.mode)
        with self.mode:
            self.clip = _clip()
            self.model = model_patcher.ModelPatcherDynamic(self.denoiser.model, CARD, CPU)
        patch.setattr(memory, "aimdo_enabled", True)
        patch.setattr(management, "cuda_device_context", lambda device: contextlib.nullcontext())
        self._report(patch, size_bytes)

    def _report(self, patch: pytest.MonkeyPatch, size_bytes: int) -> None:
        from pack.nodes.host.fit import budget

        none = {"active_bytes.all.current": 0, "reserved_bytes.all.current": 0}
        free = lambda device=None: (size_bytes - self.card.used_bytes, size_bytes)  # noqa: E731
        patch.setattr(torch.cuda, "mem_get_info", free)
        patch.setattr(torch.cuda, "memory_stats", lambda device=None: none)
        patch.setattr(torch.cuda, "synchronize", lambda device=None: None)
        patch.setattr(budget, "copy_bytes_per_s", lambda device: None)

    def _note(self) -> None:
        """Adds up what was held since the last page or buffer was asked for."""
        if self._tracker is not None:
            live = self._tracker.peak_bytes
            now = live, self._used, live + self._used
            self._most = Held(*map(max, self._most, now))
            self._tracker.restart_peak()
        self._used = self.card.used_bytes

    def run(self, stage: Callable[[], Any], *watched: torch.Tensor) -> Held:
        """What a node held that does this, from the first page that it asks for.

        Before that, weights of the stage before leave. At its end the host frees its buffers.
        """
        self._used, self._most = 0, Held(0, 0, 0)
        with torch.inference_mode(), self.mode, installed(self.order):
            with CardTracker(attention="flash") as self._tracker:
                self._tracker.watch(*watched)
                with self.order:
                    stage()
                self._note()
            self._tracker = None
            self._management.reset_cast_buffers()  # as its executor does after each node
            self.order.compute.synchronize()
        return self._most

    def encode(self, clip: Any, words: str) -> Held:
        return self.run(lambda: clip.encode_from_tokens_scheduled(clip.tokenize(words)))

    def sample(self, model: Any, request: Request, *, steps: int = 1) -> Held:
        """The host's preparation of a sampling, and calls of the model as a sampler makes them."""
        import comfy.sampler_helpers as helpers

        with self.mode:
            x = torch.empty(request.latent_shape, device=CARD)
            sigma = torch.empty(request.batch, device=CARD)
            text = torch.empty(request.batch, TEXT, 2560, dtype=torch.bfloat16, device=CARD)

        def sampled() -> None:
            options = self._patchers.create_model_options_clone(model.model_options)
            conds = {"positive": helpers.convert_cond([[text, {}]])}
            helpers.prepare_model_patcher(model, conds, options)
            helpers.prepare_sampling(model, x.shape, conds, model_options=options)
            model.model.current_patcher = model
            model.pre_run()
            asked = {**options["transformer_options"], **sdpa_options(CARD)}
            asked |= {"cond_or_uncond": [0], "sigmas": sigma}
            for _ in range(steps):
                model.model.apply_model(
                    x, sigma, c_crossattn=text, num_tokens=TEXT, transformer_options=asked
                )

        return self.run(sampled, x, sigma, text)

    def decode(self, vae: Any, request: Request) -> Held:
        with self.mode:
            latent = torch.empty(request.latent_shape)
        return self.run(lambda: vae.decode(latent))


def _clip() -> Any:
    import comfy.sd
    from comfy.text_encoders import z_image

    class Target:
        params: ClassVar[dict[str, Any]] = {}
        clip = z_image.te(dtype_llama=torch.bfloat16)
        tokenizer = z_image.ZImageTokenizer

    devices = {"load_device": CARD, "offload_device": CPU, "initial_device": CPU}
    return comfy.sd.CLIP(Target, model_options={**devices, "dtype": torch.bfloat16})


def _vae(mode: Any) -> Any:
    """Made with real weights, since the host converts them, which fake ones refuse."""
    import comfy.sd
    from comfy.ldm.models.autoencoder import AutoencodingEngine

    kl = "comfy.ldm.modules.diffusionmodules.model."
    parts = {
        f"{part.lower()}_config": {"target": f"{kl}{part}", "params": ddconfig(128, 16)}
        for part in ("Encoder", "Decoder")
    }
    regularizer = {"target": "comfy.ldm.models.autoencoder.DiagonalGaussianRegularizer"}
    state = AutoencodingEngine(regularizer_config=regularizer, **parts).state_dict()
    vae = comfy.sd.VAE(sd=state, dtype=torch.bfloat16, device=CARD)
    for layer in vae.first_stage_model.modules():
        for name, weight in layer.named_parameters(recurse=False):
            fake = torch.nn.Parameter(mode.from_tensor(weight), requires_grad=False)
            layer._parameters[name] = fake
    return vae
