"""The host's Qwen3 text encoder at full width on fake tensors of a card: exact bytes."""

from __future__ import annotations

from typing import Literal

import torch
from pack.testing.tracker import Tracker
from torch._subclasses.fake_tensor import FakeTensorMode


class FakeTextEncoder:
    """Qwen3-4B as Z-Image has it, bfloat16 weights, float32 arithmetic.

    Args:
        layers: of the model; fewer give the same peak sooner, the last but one is tapped.
    """

    def __init__(self, layers: int = 4) -> None:
        import comfy.text_encoders.z_image as z_image

        self.mode = FakeTensorMode()
        options = {
            "model_name": "qwen3_4b",
            "qwen3_4b_model_config": {"num_hidden_layers": layers},
        }
        with self.mode:
            self.model = z_image.Qwen3_4BModel(
                device="cuda", dtype=torch.bfloat16, model_options=options
            )

    def measure(self, tokens: int, *, attention: Literal["math", "efficient"] = "math") -> Tracker:
        """One prompt, as SDClipModel.forward has it; with math, its attention keeps scores."""
        transformer = self.model.transformer
        with torch.inference_mode(), self.mode, Tracker(attention=attention) as tracker:
            prompt = torch.zeros(1, tokens, dtype=torch.long, device="cuda")
            embeds = transformer.get_input_embeddings()(prompt, out_dtype=torch.float32)
            del prompt
            out = transformer(
                None,
                torch.ones(1, tokens, dtype=torch.long, device="cuda"),
                embeds=embeds,
                num_tokens=[tokens],
                intermediate_output=self.model.layer_idx,
                final_layer_norm_intermediate=self.model.layer_norm_hidden_state,
                dtype=torch.float32,
                embeds_info=[],
            )
            out[1].float()
        return tracker

    @property
    def parameters(self) -> int:
        """Elements of all weights."""
        return sum(p.numel() for p in self.model.transformer.parameters())
