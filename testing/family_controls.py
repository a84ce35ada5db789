"""Small ControlNets and model patches of other families, of the host's own classes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from . import attention_models
from .control_models import model_patch_nodes, picture
from .family_calls import drawn, given
from .family_models import SMALL

WIDTH = 256  # of the streams of family_models.py
PIXELS = 384  # of a picture's side, as `given` has it


def _filled(net: Any, *, std: float = 0.05) -> Any:
    generator = torch.Generator().manual_seed(4)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=std, generator=generator)
    return net.eval()


def _applied(name: str, control: Any, vae: Any = None) -> dict[str, Any]:
    """The prompts behind the host's Apply ControlNet, for `sample`."""
    import nodes

    made, hint = given(name), picture(PIXELS, PIXELS)
    prompts = nodes.ControlNetApplyAdvanced().apply_controlnet(
        made["positive"], made["negative"], control, hint, 0.8, 0.0, 1.0, vae=vae
    )
    return {**made, "positive": prompts[0], "negative": prompts[1]}


def flux(vae: Any) -> dict[str, Any]:
    """FLUX.1's, in the layout of XLabs, by the host's loader."""
    import comfy.controlnet
    import comfy.ops
    from comfy.ldm.flux.controlnet import ControlNetFlux

    net = _filled(ControlNetFlux(operations=comfy.ops.manual_cast, **SMALL["FLUX.1"].config))
    state = {
        key.replace("_norm.weight", "_norm.scale"): w.clone() for key, w in net.state_dict().items()
    }
    with torch.inference_mode():
        return _applied("FLUX.1", comfy.controlnet.load_controlnet_state_dict(state))


def qwen_instantx(vae: Any) -> dict[str, Any]:
    """Qwen-Image's of InstantX, as the host's loader makes it; that takes no narrow files."""
    import comfy.controlnet
    import comfy.latent_formats
    import comfy.ops
    from comfy.ldm.qwen_image.controlnet import QwenImageControlNetModel

    config = {**SMALL["Qwen-Image"].config, "num_layers": 1}
    net = QwenImageControlNetModel(
        operations=comfy.ops.manual_cast, dtype=torch.float32, device="cpu", **config
    )
    return _applied("Qwen-Image", _control(comfy.controlnet.ControlNet, net), vae)


def qwen_fun(vae: Any) -> dict[str, Any]:
    """Qwen-Image's Fun ControlNet, which computes with the model's own embedders."""
    import comfy.controlnet
    import comfy.ops
    from comfy.ldm.qwen_image.controlnet import QwenImageFunControlNetModel

    net = QwenImageFunControlNetModel(
        inner_dim=WIDTH, num_attention_heads=2, num_control_blocks=2, main_model_double=2,
        injection_layers=(0, 1), operations=comfy.ops.manual_cast, dtype=torch.float32,
        device="cpu",
    )  # fmt: skip
    return _applied("Qwen-Image", _control(comfy.controlnet.QwenFunControlNet, net), vae)


def _control(kind: Any, net: Any) -> Any:
    import comfy.latent_formats

    return kind(
        _filled(net),
        compression_ratio=1,
        latent_format=comfy.latent_formats.Wan21(),
        load_device=torch.device("cpu"),
        extra_conds=[],
    )


def diffsynth(model: Any, vae: Any) -> Any:
    """Qwen-Image's model patch of DiffSynth."""
    import comfy.ops

    nodes = model_patch_nodes()
    net = nodes.QwenImageBlockWiseControlNet(
        num_layers=2, dim=WIDTH, operations=comfy.ops.manual_cast
    )
    patch = attention_models.patcher(_filled(net))
    node = nodes.QwenImageDiffsynthControlnet()
    with torch.inference_mode():
        return node.diffsynth_controlnet(model, patch, vae, picture(PIXELS, PIXELS), 0.7)[0]


def uni3c(model: Any, vae: Any) -> Any:
    """Wan's Uni3C, whose own blocks run between the model's."""
    import comfy.ops
    from comfy.ldm.wan.uni3c import WanUni3CControlnet

    net = WanUni3CControlnet(
        conv_out_dim=64, dim=32, ffn_dim=64, num_heads=2, num_layers=2, time_embed_dim=WIDTH,
        out_proj_dim=WIDTH, mid_channels=32, operations=comfy.ops.manual_cast,
    )  # fmt: skip
    patch = attention_models.patcher(_filled(net))
    node = model_patch_nodes().WanUni3CControlnetApply()
    with torch.inference_mode():
        return node.apply_patch(model, patch, vae, picture(288, 288, batch=9), 0.8, 0.0, 1.0)[0]


def uso(model: Any, vae: Any) -> Any:
    """FLUX.1's USO, which puts a picture's style before the text."""
    import comfy.ops

    nodes = model_patch_nodes()
    net = nodes.SigLIPMultiFeatProjModel(
        siglip_token_nums=9, style_token_nums=4, siglip_token_dims=8, hidden_size=WIDTH,
        operations=comfy.ops.manual_cast,
    )  # fmt: skip
    seen = SimpleNamespace(
        all_hidden_states=drawn(1, 21, 9, 8, seed=5),
        penultimate_hidden_states=drawn(1, 9, 8, seed=6),
    )
    patch = attention_models.patcher(_filled(net))
    return nodes.USOStyleReference().apply_patch(model, patch, seen)[0]
