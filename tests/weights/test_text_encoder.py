"""The sizes of a Qwen3, read from its tensors."""

from __future__ import annotations

import pytest
import torch
from pack.nodes.weights.header import WeightsError
from pack.nodes.weights.text_encoder import key_prefix, qwen3_config, size_name
from pack.testing.fake_files import component, qwen3_shapes
from transformers import Qwen3Config, Qwen3ForCausalLM

PREFIXES = ["model.", "", "language_model.model."]


def refusal(found) -> str:
    with pytest.raises(WeightsError) as caught:
        qwen3_config(found)
    message = str(caught.value)
    assert message.isprintable()
    return message


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("layers", [3, 36])
def test_sizes(prefix, layers):
    found = component(qwen3_shapes(width=8, layers=layers, prefix=prefix))
    assert key_prefix(found.tensors) == prefix
    assert qwen3_config(found) == {
        "vocab_size": 11,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }


def test_sizes_of_what_transformers_builds():
    """An oracle: transformers names the tensors and knows the configuration they come from."""
    config = Qwen3Config(
        vocab_size=50,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=128,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 12345.0},
    )
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    told = qwen3_config(component(shapes, config=config.to_dict()))
    assert told.pop("rope_theta") == 12345.0
    assert told == {key: getattr(config, key) for key in told}
    assert told.keys() >= {"num_hidden_layers", "rms_norm_eps", "num_key_value_heads"}


def test_constants_of_an_older_config():
    """transformers 4 wrote rope_theta beside the sizes."""
    found = component(
        qwen3_shapes(), config={"rope_theta": 5e5, "rms_norm_eps": 1e-6, "hidden_size": 8}
    )
    told = qwen3_config(found)
    assert (told["rope_theta"], told["rms_norm_eps"]) == (5e5, 1e-6)


@pytest.mark.parametrize(
    "config",
    [{"rope_theta": None}, {"rope_theta": "big"}, {"rope_parameters": {}}, {"rms_norm_eps": []}],
    ids=repr,
)
def test_a_constant_that_is_no_number_is_left_to_the_host(config):
    assert (
        not {"rope_theta", "rms_norm_eps"}
        & qwen3_config(component(qwen3_shapes(), config=config)).keys()
    )


def without(name: str) -> dict:
    return {n: s for n, s in qwen3_shapes().items() if n != name}


@pytest.mark.parametrize(
    "lacking", ["self_attn.q_norm", "self_attn.k_norm", "post_attention_layernorm"]
)
def test_llama_and_others_are_no_qwen3(lacking):
    found = component(without(f"model.layers.0.{lacking}.weight"))
    assert key_prefix(found.tensors) is None
    assert refusal(found) == (
        "x.safetensors is not a Qwen3 text encoder: choose qwen_3_4b.safetensors"
    )


def test_gemma_3_is_no_qwen3():
    shapes = {**qwen3_shapes(), "model.layers.0.post_feedforward_layernorm.weight": (8,)}
    assert key_prefix(component(shapes).tensors) is None


@pytest.mark.parametrize("layers", [1, 2])
def test_too_few_layers(layers):
    assert refusal(component(qwen3_shapes(layers=layers))) == (
        f"x.safetensors has {layers} layers, at least 3 are needed (Z-Image reads the last but "
        "one): choose another text encoder"
    )


def test_another_head_size():
    assert refusal(component(qwen3_shapes(head_dim=64))) == (
        "x.safetensors has heads of size 64, Qwen3-4B for Z-Image has 128: "
        "choose another text encoder"
    )


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.1.self_attn.q_norm.weight",
        "model.layers.2.self_attn.k_proj.weight",
    ],
)
def test_a_missing_tensor(name):
    assert refusal(component(without(name))) == (
        f"x.safetensors lacks the tensor {name}: download it again"
    )


@pytest.mark.parametrize(
    ("key", "told", "found"), [("num_hidden_layers", 36, 3), ("hidden_size", 2560, 8)]
)
def test_a_config_that_contradicts_the_tensors(key, told, found):
    assert refusal(component(qwen3_shapes(), config={key: told})) == (
        f"x.safetensors contradicts its config.json: {key} is {told} there and {found} in the "
        "tensors: download it again"
    )


def test_size_names():
    assert size_name(2560) == "Qwen3-4B"
    assert size_name(4096) == "Qwen3-8B"
    assert size_name(64) == "a Qwen3 of width 64"
