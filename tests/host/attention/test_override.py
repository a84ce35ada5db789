"""Attention Slice among other overrides, odd calls and failures, and what the lean block reads."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from pack.testing import attention_models as models
from pack.testing.attention_models import BATCH, CHANNELS, HEADS, QUERIES

pytestmark = pytest.mark.usefixtures("host")


@pytest.fixture(autouse=True)
def _one_thread_without_gradients():
    # With several threads a product of one matrix is split otherwise than one of several: the last
    # bit of attention_basic, _split and _sub_quad then depends on the number of heads.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(host: Any) -> Any:
    return models.patcher(torch.nn.Linear(1, 1))


def test_scale_and_unknown_arguments_go_on(model: Any) -> None:
    seen: list[dict[str, Any]] = []

    def override(function: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs)
        return function(*args, **kwargs)

    sliced = models.sliced(models.with_override(model, override), "heads", 3)
    args = models.inputs(skip_reshape=True)
    options = {"scale": 0.5, "low_precision_attention": False, "of_another_pack": 7}
    got = models.function("attention_pytorch")(
        *args, HEADS, None, None, True, **options, transformer_options=models.options(sliced)
    )
    whole = models.function("attention_pytorch")(*args, HEADS, None, None, True, **options)
    assert torch.equal(got, whole)
    assert len(seen) == 2
    for kwargs in seen:
        assert {name: kwargs[name] for name in options} == options
        assert kwargs["transformer_options"] is models.options(sliced)
        assert kwargs["_inside_attn_wrapper"]


@pytest.mark.parametrize("name", ["attention_pytorch", "attention_sub_quad"])
@pytest.mark.parametrize("positional", range(9))
def test_arguments_by_position_or_by_name(model: Any, name: str, positional: int) -> None:
    q, k, v = models.inputs(skip_reshape=True)
    mask = models.draw(1, 1, QUERIES, models.KEYS, seed=3)
    tensors = ("query", "key", "value") if name == "attention_sub_quad" else ("q", "k", "v")
    names = (*tensors, "heads", "mask", "attn_precision", "skip_reshape", "skip_output_reshape")
    values = (q, k, v, HEADS, mask, None, True, True)
    args = values[:positional]
    kwargs = dict(zip(names[positional:], values[positional:], strict=True))
    whole = models.function(name)(*args, **kwargs)
    recorder = models.Recorder()
    options = models.options(models.sliced(models.with_override(model, recorder), "max"))
    assert torch.equal(models.function(name)(*args, **kwargs, transformer_options=options), whole)
    assert recorder.seen == [(name, (BATCH, 1, QUERIES, CHANNELS), 1)] * HEADS


def test_the_override_before_ours_is_called_once_for_each_slice(model: Any) -> None:
    recorder = models.Recorder()
    sliced = models.sliced(models.with_override(model, recorder), "heads", 4)
    args = models.inputs(skip_reshape=False)
    models.function("attention_pytorch")(*args, HEADS, transformer_options=models.options(sliced))
    assert recorder.seen == [
        ("attention_pytorch", (BATCH, QUERIES, 4 * CHANNELS), 4),
        ("attention_pytorch", (BATCH, QUERIES, 2 * CHANNELS), 2),
    ]


def test_an_override_after_ours_sees_the_whole_call_and_may_call_ours(model: Any) -> None:
    inner, outer = models.Recorder(), models.Recorder()
    sliced = models.sliced(models.with_override(model, inner), "max")
    ours = models.options(sliced)["optimized_attention_override"]

    def after(function: Any, *args: Any, **kwargs: Any) -> Any:
        outer(function, *args, **kwargs)
        return ours(function, *args, **kwargs)

    args = models.inputs(skip_reshape=False)
    options = models.options(models.with_override(sliced, after))
    got = models.function("attention_basic")(*args, HEADS, transformer_options=options)
    assert torch.equal(got, models.function("attention_basic")(*args, HEADS))
    assert [heads for _, _, heads in outer.seen] == [HEADS]
    assert [heads for _, _, heads in inner.seen] == [1] * HEADS


def test_the_same_node_twice_slices_each_slice_again(model: Any) -> None:
    recorder = models.Recorder()
    twice = models.sliced(
        models.sliced(models.with_override(model, recorder), "queries", 128), "heads", 3
    )
    args = models.inputs(skip_reshape=True)
    call = functools.partial(models.function("attention_pytorch"), *args, HEADS, skip_reshape=True)
    assert torch.equal(call(transformer_options=models.options(twice)), call())
    assert [(shape[2], heads) for _, shape, heads in recorder.seen] == [(128, 3), (32, 3)] * 2


@pytest.mark.parametrize("times", [1, 2])
def test_the_hosts_own_choice_of_a_backend_is_sliced(
    host: Any, model: Any, times: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Core's Model Attention Backend is an override, but not one of another pack."""
    if not hasattr(model, "set_model_optimized_attention"):
        pytest.skip(f"ComfyUI {host.version} has no Model Attention Backend")
    caplog.set_level("INFO")
    patched = model.clone()
    patched.set_model_optimized_attention(models.function("attention_split"))
    for _ in range(times):
        patched = models.sliced(patched)
    assert caplog.text.count("auto: attention_split on cpu holds scores, sliced where") == times
    q, k, v = (torch.zeros(1, 8, tokens, 16) for tokens in (4096, 1024, 1024))
    options = {"skip_reshape": True, "transformer_options": models.options(patched)}
    got = models.function("attention_pytorch")(q, k, v, 8, **options)
    assert "attention_split: 3 of 8 heads at a time" in caplog.text
    assert torch.equal(got, models.function("attention_split")(q, k, v, 8, skip_reshape=True))


def test_what_is_no_attention_call_goes_on_whole(
    model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    recorder = models.Recorder()
    sliced = models.sliced(models.with_override(model, recorder), "max")
    q, k, v = models.inputs(skip_reshape=True)
    # Heads that are not the tensors' own: the host's functions would reshape, so nothing is cut.
    options = {"skip_reshape": True, "transformer_options": models.options(sliced)}
    for _ in range(2):
        models.function("attention_basic")(q[:, :1], k[:, :1], v[:, :1], 1, **options)
        models.function("attention_basic")(q, k[:, :1], v[:, :1], 1, mask=None, **options)
    assert len([m for m in caplog.messages if "not sliced: query, key and value" in m]) == 1
    assert recorder.seen[-1] == ("attention_basic", tuple(q.shape), 1)


@pytest.mark.parametrize("has_previous", [False, True])
def test_a_call_that_cannot_be_read_goes_on_as_it_came(
    model: Any, has_previous: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """To the override of another pack, where there is one."""
    caplog.set_level("INFO")

    def previous(function: Any, *args: Any, **kwargs: Any) -> Any:
        return "of another pack", function(*args, **kwargs)

    def function(*args: Any, **kwargs: Any) -> Any:
        return args, kwargs

    before = models.with_override(model, previous) if has_previous else model
    override = models.options(models.sliced(before, "max"))["optimized_attention_override"]
    for args, kwargs in (((), {}), ((1, 2), {"heads": 3}), (tuple(torch.ones(3)), {"heads": 1})):
        wanted = ("of another pack", (args, kwargs)) if has_previous else (args, kwargs)
        assert override(function, *args, **kwargs) == wanted
    assert caplog.text.count("not sliced: a call has unknown arguments") == 1


def test_an_exception_in_a_slice_leaves_nothing_behind(model: Any) -> None:
    count = 0

    def fails(function: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == 2:
            raise RuntimeError("in the second slice")
        return function(*args, **kwargs)

    sliced = models.sliced(models.with_override(model, fails), "max")
    args = models.inputs(skip_reshape=False)
    call = functools.partial(models.function("attention_pytorch"), *args, HEADS)
    whole = call()
    with pytest.raises(RuntimeError, match="in the second slice"):
        call(transformer_options=models.options(sliced))
    assert count == 2
    assert torch.equal(call(), whole)
    assert torch.equal(call(transformer_options=models.options(sliced)), whole)
    assert "optimized_attention_override" not in models.options(model)


def test_the_model_that_came_in_is_left_as_it_was(model: Any) -> None:
    from pack.nodes.host.base.options import OPTIONS_KEY

    before = dict(models.options(model))
    first = models.sliced(model, "heads", 3)
    second = models.sliced(first, "max")
    assert models.options(model) == before
    assert models.options(first)[OPTIONS_KEY] == {"attention_slice": 3}
    assert models.options(second)[OPTIONS_KEY] == {"attention_slice": 1}


@pytest.mark.parametrize(
    ("mode", "size", "wanted"),
    [("auto", 0, 3), ("auto", 9, 3), ("max", 0, 30), ("heads", 0, 2), ("heads", 4, 8),
     ("heads", 99, 1), ("queries", 64, 1)],
)  # fmt: skip
def test_groups_for_the_lean_block(model: Any, mode: str, size: int, wanted: int) -> None:
    from pack.nodes.host.base import options

    assert options.asked_groups(models.options(models.sliced(model, mode, size)), 30) == wanted
    assert options.asked_groups(models.options(model), 30) == 1
    assert options.asked_groups({}, 30) == 1
    assert options.asked_groups(models.options(models.sliced(model, mode, size)), 1) == 1


@pytest.mark.parametrize(
    ("mode", "size", "heads", "slices"),
    [
        ("heads", 0, 3, [(3, QUERIES)]),
        ("queries", 0, 3, [(3, QUERIES)]),
        ("heads", 2, 2, [(2, QUERIES)]),
        ("heads", 2, 3, [(2, QUERIES), (1, QUERIES)]),  # fewer groups than asked for
        ("max", 0, 1, [(1, QUERIES)]),
        ("queries", 128, 3, [(3, 128), (3, 32)]),
    ],
)
def test_groups_are_not_halved_again(
    model: Any, mode: str, size: int, heads: int, slices: list[tuple[int, int]]
) -> None:
    from pack.nodes.host.base import options

    recorder = models.Recorder()
    patched = models.sliced(models.with_override(model, recorder), mode, size)
    before = dict(models.options(patched))
    inside = options.within_groups(models.options(patched))
    group = [t[:, :heads] for t in models.inputs(skip_reshape=True)]
    call = functools.partial(models.function("attention_basic"), *group, heads, skip_reshape=True)
    assert torch.equal(call(transformer_options=inside), call())
    assert [(count, shape[2]) for _, shape, count in recorder.seen] == slices
    assert models.options(patched) == before  # the mark is on the copy alone


def test_no_mark_without_the_node(model: Any) -> None:
    from pack.nodes.host.base import options

    assert options.within_groups(models.options(model)) == models.options(model)
    assert options.within_groups({}) == {}
