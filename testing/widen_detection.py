"""Test-only: lets the host recognise Z-Image models and Qwen3 text encoders of small widths.

The host recognises both by their published widths alone. `install()` makes it answer for a smaller
one what it answers for the published one, the widths aside: every other setting still comes from
the host. One width the host derives from the model's, while the published layout fixes it (the
hidden width of the timestep MLP, 1024): that one is put right too. Nothing else is touched.

Two ways in: `install()` and `uninstall()` in a process that has the host on its path, or this one
file in a server's `custom_nodes`, where it installs itself.
"""

import comfy.ldm.lumina.model as lumina_model
import comfy.model_detection as model_detection
import comfy.sd
import torch

NODE_CLASS_MAPPINGS = {}

_PUBLISHED_DIM = 3840
_TIMESTEP_HIDDEN = 1024
_originals = {}


def is_small_z_image(dim):
    """True where host and diffusers round the feed-forward width alike, Lumina 2's 2304 aside."""
    return dim % 384 == 0 and dim < _PUBLISHED_DIM and dim != 2304


def install():
    """Widens the detection; a second call changes nothing."""
    if _originals:
        return
    for module, name, wrapped in (
        (model_detection, "detect_unet_config", _detect_unet_config),
        (model_detection, "model_config_from_unet_config", _model_config_from_unet_config),
        (comfy.sd, "detect_te_model", _detect_te_model),
        (lumina_model, "TimestepEmbedder", _timestep_embedder),
    ):
        _originals[name] = (module, getattr(module, name))
        setattr(module, name, wrapped)


def uninstall():
    """Puts the host's own functions back."""
    while _originals:
        name, (module, original) = _originals.popitem()
        setattr(module, name, original)


def _host(name):
    return _originals[name][1]


def _detect_unet_config(state_dict, key_prefix, *args, **kwargs):
    key = f"{key_prefix}cap_embedder.1.weight"
    dim = state_dict[key].shape[0] if key in state_dict else 0
    if dim and is_small_z_image(dim):
        published = torch.empty(_PUBLISHED_DIM, state_dict[key].shape[1], device="meta")
        state_dict = {**state_dict, key: published}
    config = _host("detect_unet_config")(state_dict, key_prefix, *args, **kwargs)
    if dim and is_small_z_image(dim) and config is not None:
        config.update(dim=dim, n_heads=dim // 128, n_kv_heads=dim // 128)
    return config


def _model_config_from_unet_config(unet_config, *args, **kwargs):
    original = _host("model_config_from_unet_config")
    dim = unet_config.get("dim", 0)
    if not unet_config.get("z_image_modulation") or not is_small_z_image(dim):
        return original(unet_config, *args, **kwargs)
    model_config = original({**unet_config, "dim": _PUBLISHED_DIM}, *args, **kwargs)
    if model_config is not None:
        model_config.unet_config["dim"] = dim
    return model_config


def _detect_te_model(sd):
    found = _host("detect_te_model")(sd)
    norm = sd.get("model.layers.0.post_attention_layernorm.weight")
    if found == comfy.sd.TEModel.LLAMA3_8 and "model.layers.0.self_attn.q_norm.weight" in sd:
        # The host's answer for a Qwen3 of a width that it does not know.
        return comfy.sd.TEModel.QWEN3_4B if norm.shape[0] < 1024 else found
    return found


def _timestep_embedder(hidden_size, *args, output_size=None, **kwargs):
    if output_size == 256:  # Z-Image's modulation
        hidden_size = _TIMESTEP_HIDDEN
    return _host("TimestepEmbedder")(hidden_size, *args, output_size=output_size, **kwargs)


if __name__ not in ("widen_detection", "pack.testing.widen_detection"):
    install()  # the host imports a custom node under a name made from its path
