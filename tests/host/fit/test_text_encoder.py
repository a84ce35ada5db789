"""The text encoder within the budget: same embeddings, never more weights, nothing left behind."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pack.nodes.denoiser.sizes import Request
from pack.nodes.fit.stages import published_models, text_stage
from pack.nodes.fit.text_encoder import text_encoder_peak_bytes
from pack.nodes.fit.what_fits import fit
from pack.nodes.units import GIB, MIB, PAGE_BYTES
from pack.testing import lean_models
from pack.testing.fake_card import FakeCard, Pages, on_fake_card

pytestmark = pytest.mark.usefixtures("host")
WORDS = "a lighthouse at dusk, oil on canvas"
LONG = "a cat " * 1250
LORA = "qwen3_4b.transformer.model.layers.0.mlp.up_proj.weight"
TABLE = "qwen3_4b.transformer.model.embed_tokens.weight"


@pytest.fixture(scope="module")
def loaded(host: Any, small_folder: Path) -> Any:
    return lean_models.from_loader(host, small_folder)


def planned(loaded: Any, *, clip: Any = None, gib: float = 0.75, **options: Any) -> Any:
    """The CLIP of Fit to VRAM. The tiny encoder is planned with weights of the published size."""
    from pack.nodes.fit_to_vram import FitToVRAM

    options = {"width": 64, "height": 64, "prefer": "smallest", **options}
    made = FitToVRAM.execute(loaded.model, gib, clip=clip or loaded.clip, **options)
    return made.args[3]


def limited(loaded: Any, *, clip: Any = None) -> Any:
    """A CLIP with the smallest budget for `LONG` with its table on the card, and a LoRA on that."""
    from pack.nodes.host.fit.inputs import planner_for
    from pack.nodes.host.fit.text_encoder import token_count, with_limit

    clip = clip or loaded.clip
    planner = planner_for(
        loaded.model, Request(64, 64), named_bytes=0, prefer="smallest", vae=None, clip=clip,
        latent=None, conditioning=None,
    )  # fmt: skip
    weights = 2 * loaded.clip.patcher.model_size()
    models = replace(planner.models, text_table_bytes=0, text_weight_bytes=weights)
    stage = text_stage(models, token_count(clip.tokenize(LONG)), is_limited=True)
    planner = replace(planner, named_bytes=stage.hard_least_bytes)
    return with_limit(clip, planner, clip.patcher.load_device, None, name="test")


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> int:
    """The tiny text encoder and transformer are planned as if each had a GiB."""
    from pack.nodes.host.fit import budget

    def weight_bytes(patcher: Any) -> int:
        return GIB

    monkeypatch.setattr(budget, "weight_bytes", weight_bytes)
    return GIB


def encoded(clip: Any, words: str = WORDS) -> torch.Tensor:
    with torch.inference_mode():
        (entry,) = clip.encode_from_tokens_scheduled(clip.tokenize(words))
    return entry[0]


def table_of(clip: Any) -> Any:
    return clip.cond_stage_model.qwen3_4b.transformer.get_input_embeddings()


def is_patched(clip: Any) -> bool:
    return any(name.endswith("embed_tokens") for name in clip.patcher.object_patches)


def test_the_same_embeddings_with_the_table_in_ram(loaded: Any, published: int) -> None:
    """Bug: 0.72 GiB of table went to the card for the few rows of a prompt."""
    from pack.nodes.host.fit.text_encoder import RowsInRam

    stock, tables = encoded(loaded.clip), []
    clip = planned(loaded)
    handle = clip.cond_stage_model.qwen3_4b.transformer.register_forward_pre_hook(
        lambda *_: tables.append(type(table_of(clip)))
    )
    try:
        for _ in range(2):
            assert torch.equal(encoded(clip), stock)
    finally:
        handle.remove()
    assert tables == 2 * [RowsInRam]
    assert torch.equal(encoded(loaded.clip), stock)
    assert type(table_of(loaded.clip)) is not RowsInRam
    assert not is_patched(loaded.clip)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_those_of_the_hosts_table(host: Any, dtype: torch.dtype) -> None:
    import comfy.ops
    from pack.nodes.host.fit.text_encoder import RowsInRam

    table = comfy.ops.manual_cast.Embedding(50, 8, dtype=dtype)
    table.weight = torch.nn.Parameter(torch.randn(50, 8).to(dtype), requires_grad=False)
    tokens = torch.tensor([[3, 49, 0, 3]])
    rows = RowsInRam(table)
    assert torch.equal(
        rows(tokens, out_dtype=torch.float32), table(tokens, out_dtype=torch.float32)
    )
    assert not list(rows.parameters())
    assert rows.state_dict().keys() == table.state_dict().keys()


def test_a_large_budget_leaves_the_table_to_the_host(loaded: Any) -> None:
    clip = planned(loaded, gib=64.0)
    assert torch.equal(encoded(clip), encoded(loaded.clip))
    assert not is_patched(clip)


def test_lora_before_and_after_the_node(loaded: Any, published: int) -> None:
    patch = {LORA: (torch.full_like(loaded.clip.patcher.model_state_dict()[LORA], 0.01),)}
    with_lora = loaded.clip.clone()
    assert with_lora.add_patches(patch)
    expected = encoded(with_lora)
    assert not torch.equal(expected, encoded(loaded.clip))
    assert torch.equal(encoded(planned(loaded, clip=with_lora)), expected)
    after = planned(loaded).clone()
    assert after.add_patches(patch)
    assert type(after) is type(planned(loaded))
    assert torch.equal(encoded(after), expected)


def test_a_lora_on_the_table_is_applied(loaded: Any) -> None:
    """A table in RAM would have ignored it."""
    patch = {TABLE: (torch.full_like(table_of(loaded.clip).weight, 0.5),)}
    with_lora = loaded.clip.clone()
    with_lora.add_patches(patch)
    expected = encoded(with_lora, LONG)
    assert torch.equal(encoded(limited(loaded, clip=with_lora), LONG), expected)
    before = limited(loaded)
    assert torch.equal(encoded(before, LONG), encoded(loaded.clip, LONG)) and is_patched(before)
    after = before.clone()
    assert after.add_patches(patch)
    assert torch.equal(encoded(after, LONG), expected)


def test_where_the_table_is_is_decided_at_each_encode(loaded: Any, caplog: Any) -> None:
    """Bug: it was decided for the assumed length, and plans counted on a table in RAM that was not.

    A short prompt fits whole, a long one does not. With a LoRA on the table it needs the host's.
    """
    clip = limited(loaded)
    with_lora = clip.clone()
    with_lora.add_patches({TABLE: (torch.zeros_like(table_of(loaded.clip).weight),)})
    for one, words, in_ram in (
        (clip, WORDS, False),
        (clip, LONG, True),
        (clip, WORDS, False),
        (with_lora, LONG, False),
    ):
        caplog.clear()
        with caplog.at_level(logging.INFO), one._encoding():
            one.load_model(one.tokenize(words))
        assert is_patched(one) == ("embedding table in RAM" in caplog.text) == in_ram, words[:20]


def test_a_text_encoder_on_another_device_is_left_alone(loaded: Any, caplog: Any) -> None:
    """It takes nothing of the card: a long prompt must not be refused for the card's budget."""
    from pack.nodes.fit_to_vram import FitToVRAM

    elsewhere = loaded.clip.clone()
    elsewhere.patcher.load_device = torch.device("meta")
    with caplog.at_level(logging.INFO):
        made = FitToVRAM.execute(loaded.model, 0.75, width=64, height=64, clip=elsewhere).args
    assert made[3] is elsewhere and "text encode" not in made[2]
    assert "the text encoder is not in the budget: it computes on meta" in caplog.text


def test_an_unchanged_prompt_is_not_encoded_again(loaded: Any, published: int, host: Any) -> None:
    """The node's CLIP stays in the host's cache: the next picture costs a sampling and a decode."""
    from pack.testing import probe_prompts

    probe_prompts.shelf(model=loaded.model, clip=loaded.clip)
    sides = {"width": 64, "height": 64, "batch_size": 1}
    fit = {"model": ["model", 0], "clip": ["clip", 0], "budget_gib": 0.75, "prefer": "smallest"}
    prompt = {
        "model": probe_prompts.source("model"),
        "clip": probe_prompts.source("clip"),
        "fit": {"class_type": "ZImageFitToVRAM", "inputs": {**fit, **sides}},
        "text": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["fit", 3], "text": WORDS}},
        "latent": {"class_type": "EmptyLatentImage", "inputs": sides},
    }
    encodes: list[Any] = []
    transformer = loaded.clip.cond_stage_model.qwen3_4b.transformer
    handle = transformer.register_forward_pre_hook(lambda *_: encodes.append(1))
    with probe_prompts.bench(host) as bench:
        for seed, words, count in ((1, WORDS, 1), (2, WORDS, 1), (2, "another", 2)):
            prompt["text"]["inputs"]["text"] = words
            prompt["sampler"] = probe_prompts.sampler(["fit", 0], steps=1, seed=seed)
            prompt["shown"] = {"class_type": "PreviewAny", "inputs": {"source": ["sampler", 0]}}
            bench.run(prompt)
            assert bench.error is None
            assert len(encodes) == count
    handle.remove()


def test_a_lora_on_the_table_counts_also_for_nodes_that_encode_by_themselves(
    loaded: Any, published: int
) -> None:
    """Bug: they load the CLIP and call its model, which still had the table of the last encode."""

    def by_itself(clip: Any) -> torch.Tensor:
        with torch.inference_mode():
            clip.load_model()
            return clip.cond_stage_model.encode_token_weights(clip.tokenize(WORDS))[0]

    key = "qwen3_4b.transformer.model.embed_tokens.weight"
    patch = {key: (torch.full_like(table_of(loaded.clip).weight, 0.5),)}
    clip = planned(loaded)
    encoded(clip)
    with_lora, stock = clip.clone(), loaded.clip.clone()
    for one in (with_lora, stock):
        assert one.add_patches(patch)
    assert torch.equal(by_itself(with_lora), by_itself(stock))


def test_another_packs_clip_stays_as_it_is(loaded: Any, published: int, caplog: Any) -> None:
    """Bug: it was cloned as the host's, without what it does otherwise."""
    import comfy.sd

    class Louder(comfy.sd.CLIP):
        pass

    other = Louder(no_init=True)
    other.__dict__.update(loaded.clip.__dict__)
    with caplog.at_level(logging.WARNING):
        assert planned(loaded, clip=other) is other
    assert "not in the budget: it is a Louder of another node" in caplog.text


def test_the_last_of_two_nodes_counts(loaded: Any, published: int) -> None:
    twice = planned(loaded, clip=planned(loaded), gib=64.0)
    assert not is_patched(twice)
    twice = planned(loaded, clip=planned(loaded, gib=64.0))
    assert torch.equal(encoded(twice), encoded(loaded.clip))
    assert is_patched(twice)


def test_text_that_is_generated_is_the_hosts_own(loaded: Any, published: int, caplog: Any) -> None:
    if not hasattr(type(loaded.clip), "generate"):
        pytest.skip("this host generates no text")
    made = []
    for clip in (loaded.clip, planned(loaded)):
        with torch.inference_mode(), caplog.at_level(logging.INFO):
            tokens = clip.tokenize(WORDS)
            made.append(clip.generate(tokens, do_sample=False, max_length=3))
    assert made[0] == made[1]
    assert caplog.text.count("text is generated without the budget") == 1


def test_the_clip_of_another_model_is_refused(loaded: Any) -> None:
    class Other:
        cond_stage_model = torch.nn.Linear(1, 1)

    with pytest.raises(ValueError, match=r"clip must be Z-Image's .*, got Linear: connect that"):
        planned(loaded, clip=Other())


def test_a_budget_below_one_layer_is_refused(loaded: Any, published: int) -> None:
    """By the node for the assumed length, and by the encode for a longer prompt."""
    with pytest.raises(ValueError, match=r"does not fit: .* short"):
        planned(loaded, gib=0.01)
    clip = planned(loaded, gib=0.75)
    with pytest.raises(
        ValueError, match=r"text encode, \d{4} tokens: .* at least .*, got 768.0 MiB"
    ):
        encoded(clip, "a cat " * 3000)
    assert encoded(clip).shape[1] < 100


def test_the_encode_says_what_it_may_take(loaded: Any, published: int, caplog: Any) -> None:
    with caplog.at_level(logging.INFO):
        encoded(planned(loaded))
    said = [r.getMessage() for r in caplog.records if "text encode, " in r.getMessage()]
    assert len(said) == 1
    assert "embedding table in RAM" in said[0]


def test_ram_that_is_too_small_is_asked_for_first(
    loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the maps of Lean VAE, and for weights that would leave the card."""
    import comfy.model_management as management
    from pack.nodes.host.fit import budget

    free = management.get_free_memory
    monkeypatch.setattr(
        management, "get_free_memory",
        lambda device=None, *args: MIB if device.type == "cpu" else free(device, *args),
    )  # fmt: skip
    planned(loaded)
    decoded = fit(published_models(), Request(4096, 4096), 4 * GIB, prefer="smallest")
    with pytest.raises(ValueError, match=r"RAM must have .* free for .*, got 1.0 MiB: close"):
        budget.check_ram(decoded, loaded.model, None)
    # What dynamic VRAM pins for streaming is no less free: it is unpinned for the maps.
    monkeypatch.setattr(management, "TOTAL_PINNED_MEMORY", 16 * GIB)
    with monkeypatch.context() as dynamic:
        dynamic.setattr(budget, "is_dynamic", lambda patcher: True)
        budget.check_ram(decoded, loaded.model, None)
    with pytest.raises(ValueError, match=r"got 1\.0 MiB"):
        budget.check_ram(decoded, loaded.model, None)
    monkeypatch.setattr(budget, "is_card", lambda device: True)
    monkeypatch.setattr(budget, "room_bytes", lambda device: 24 * GIB)
    monkeypatch.setattr(budget, "card_bytes", lambda device: 24 * GIB)
    monkeypatch.setattr(loaded.clip.patcher, "loaded_size", lambda: 64 * GIB)
    with pytest.raises(ValueError, match=r"RAM must have 6\d\.\d\d GiB free"):
        planned(loaded)


@pytest.mark.once
@pytest.mark.parametrize("error", [None, RuntimeError, InterruptedError])
@on_fake_card
def test_pages_keep_to_the_limit_until_the_encode_ends(
    loaded: Any, published: int, monkeypatch: pytest.MonkeyPatch, error: Any
) -> None:
    """Bug: the text encoder filled the card up to its last page, whatever the budget."""
    from pack.nodes.host.fit import budget, inputs

    for module, name in ((budget, "is_card"), (budget, "is_dynamic"), (inputs, "is_dynamic")):
        monkeypatch.setattr(module, name, lambda _: True)
    for name in ("room_bytes", "card_bytes"):
        monkeypatch.setattr(budget, name, lambda device: 24 * GIB)
    FakeCard(24 * GIB)
    clip = planned(loaded)
    pages = Pages(clip.patcher, [100 * MIB] * 12)
    seen: list[int] = []

    def during(*_: Any) -> None:
        seen.append(pages.forward())
        if error is not None:
            raise error("in the middle")

    transformer = clip.cond_stage_model.qwen3_4b.transformer
    handle = transformer.register_forward_pre_hook(during)
    for _ in range(2):
        if error is None:
            encoded(clip)
        else:
            with pytest.raises(error, match="in the middle"):
                encoded(clip)
    handle.remove()
    live = text_encoder_peak_bytes(20, clip._limiter.planner.models.text)
    assert all(0 < count <= 0.75 * GIB - live for count in seen)
    assert len(seen) == 2 and seen[0] % PAGE_BYTES == 0
    assert pages.load() >= 12 * 100 * MIB, "no limit is left"
