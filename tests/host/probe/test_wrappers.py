"""VRAM Probe on a MODEL while the host samples it: blocks, exact bytes, faults, other nodes."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from pack.testing import attention_models, lean_models, probe_prompts
from pack.testing.lean_models import fail, lean, sample, stopping
from pack.testing.probe_prompts import sampling, shelf
from pack.tests.host.denoiser.test_faults import state

pytestmark = pytest.mark.usefixtures("host")
MIB = 2**20
LAYERS = {"context_refiner.0", "noise_refiner.1", "layers.0", "layers.1"}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def watched(model: Any, detail: str = "blocks", **settings: Any) -> tuple[Any, dict[str, Any]]:
    """The model behind a probe, and the record that the probe keeps up to date."""
    from pack.nodes.vram_probe import VRAMProbe

    out = VRAMProbe.execute(model, detail=detail, **settings)
    return out.args[0], out.ui["z_image_vram_probe"][0]


def blocks(record: dict[str, Any]) -> set[str]:
    return {row[5] for row in record["timeline"]}


@pytest.mark.parametrize("detail", ["totals", "steps", "blocks", "allocations"])
def test_the_picture_is_the_same(loaded, detail):
    model, record = watched(loaded.model, detail)
    assert torch.equal(sample(model, steps=2).latent, sample(loaded.model, steps=2).latent)
    assert record["state"] == "done"
    assert record["peak_bytes"] == sum(record["parts_at_peak"].values())
    assert len(record["steps"]) == (0 if detail == "totals" else 2)
    assert (blocks(record) >= LAYERS) == (detail in ("blocks", "allocations"))
    assert len(record["largest"]) == (5 if detail == "allocations" else 0)


def test_exact_bytes_are_those_of_a_tracker_outside(loaded):
    from comfy.patcher_extension import WrappersMP
    from pack.nodes.probe.tracker import PeakTracker

    tracker = PeakTracker()
    outside = loaded.model.clone()

    def tracked(executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with tracker:
            return executor(*args, **kwargs)

    outside.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, "test", tracked)
    sample(outside, steps=2)
    model, record = watched(loaded.model)
    sample(model, steps=2)
    assert record["parts_at_peak"]["activations"] == tracker.peak_bytes
    assert record["parts_at_peak"]["weights"] == loaded.model.model_size()
    assert record["peak_at"]["operation"] == tracker.peak_op
    assert record["peak_at"]["block"] in LAYERS


def test_the_largest_tensors_have_shape_dtype_and_line(loaded):
    model, record = watched(loaded.model, "allocations")
    sample(model)
    for tensor in record["largest"]:
        size = getattr(torch, tensor["dtype"]).itemsize
        assert tensor["bytes"] == torch.Size(tensor["shape"]).numel() * size
        assert ".py:" in tensor["where"]
        assert "/" not in tensor["where"], "a code line names no folder"
    sizes = [tensor["bytes"] for tensor in record["largest"]]
    assert sizes == sorted(sizes, reverse=True)


def test_a_file_for_torchs_memory_viewer_tells_the_same_peak(prompts, loaded, output):
    from torch.cuda import _memory_viz

    record = prompts.record(sampling(loaded, detail="allocations"), "probe")
    (name,) = record["files"]
    seen = pickle.loads((output / name).read_bytes())
    current = peak = 0
    for event in seen["device_traces"][0]:
        current += {"alloc": 1, "free_completed": -1}.get(event["action"], 0) * event["size"]
        peak = max(peak, current)
    assert peak == record["parts_at_peak"]["activations"]
    assert current == sum(segment["allocated_size"] for segment in seen["segments"])
    files = {frame["filename"] for event in seen["device_traces"][0] for frame in event["frames"]}
    assert not any("/" in file for file in files), "a code line names no folder"
    # torch's own readers of such files.
    assert f"{len(seen['device_traces'][0])} entries" in _memory_viz.trace(seen)
    assert "active_allocated" in _memory_viz.memory(seen, format_flamegraph=str)
    assert "<script" in _memory_viz.trace_plot(seen)
    assert any("torch keeps no such history on cpu" in note for note in record["notes"])


class TestWithOurOtherNodes:
    @pytest.mark.parametrize("chosen", ["all", "main layers"])
    @pytest.mark.parametrize("is_first", [True, False])
    def test_lean_blocks_stay_lean_and_are_told_apart(self, loaded, chosen, is_first):
        lone = sample(lean(loaded.model, blocks=chosen))
        if is_first:
            model, record = watched(loaded.model)
            model = lean(model, blocks=chosen)
        else:
            model, record = watched(lean(loaded.model, blocks=chosen))
        run = sample(model)
        assert torch.equal(run.latent, lone.latent)
        assert run.queries == lone.queries, "the probe sent the blocks to the host's own forward"
        assert blocks(record) >= LAYERS

    def test_lora(self, loaded):
        import comfy.sd

        lora = lean_models.block_lora(loaded.model)
        before, record = watched(loaded.model)
        one = comfy.sd.load_lora_for_models(before, None, lora, 1.0, 0.0)[0]
        two, _ = watched(comfy.sd.load_lora_for_models(loaded.model, None, lora, 1.0, 0.0)[0])
        assert torch.equal(sample(one).latent, sample(two).latent)
        assert blocks(record) >= LAYERS

    def test_two_probes_on_one_model_see_the_same(self, loaded):
        inner, first = watched(loaded.model)
        outer, second = watched(inner, "steps")
        plain, third = watched(loaded.model)
        sample(outer)
        sample(plain)
        assert first["parts_at_peak"] == third["parts_at_peak"]
        assert second["state"] == "done"
        assert len(second["steps"]) == 1


def test_another_family_is_told_apart_by_its_own_blocks():
    """A UNet, whose host calls the parts of a block one by one."""
    stock = attention_models.stable_diffusion()
    model, record = watched(stock)
    assert torch.equal(attention_models.sample(model), attention_models.sample(stock))
    assert {name.split(".")[0] for name in blocks(record) if name and "." in name} >= {
        "input_blocks",
        "output_blocks",
    }


class TestFaults:
    @pytest.mark.parametrize("detail", ["steps", "allocations"])
    @pytest.mark.parametrize("fault", ["interrupted", "failed"])
    def test_the_record_goes_up_to_there_and_nothing_stays(self, host, prompts, loaded, output,
                                                           fault, detail):  # fmt: skip
        management = host.model_management

        def cancel() -> None:
            management.interrupt_current_processing(True)

        management.load_models_gpu([loaded.model])
        before = state(loaded.model)
        # Six attention calls a step: in the middle of the second of four.
        stop = cancel if fault == "interrupted" else fail
        faulty = stopping(loaded.model, stop, at=9)
        prompt = sampling(loaded, steps=4, detail=detail, history="append a row")
        shelf(model=faulty)
        try:
            record = prompts.record(prompt, "probe")
        finally:
            management.interrupt_current_processing(False)
        ended = "execution_interrupted" if fault == "interrupted" else "execution_error"
        assert ended in dict(prompts.executor.status_messages)
        assert record["state"] == fault
        assert len(record["steps"]) == 1
        assert record["timeline"][-1][0] > record["steps"][0]["seconds"]
        assert f"{fault}: the record ends there" in record["report"]
        assert prompts.sent()[-1][0]["record"]["state"] == fault
        rows = (output / "z_image_low_vram" / "vram_history.jsonl").read_text("utf-8")
        assert [json.loads(row)["state"] for row in rows.splitlines()] == ["done", fault]
        management.load_models_gpu([loaded.model])
        assert state(loaded.model) == before
        # The same watched model samples again, from the host's cache.
        prompt["sampler"]["inputs"]["seed"] = 5
        record = prompts.record(prompt, "probe")
        assert (record["state"], len(record["steps"])) == ("done", 4)

    def test_a_fault_keeps_no_tensor_alive(self, loaded):
        import gc

        model, _ = watched(stopping(loaded.model, fail, at=9), "allocations")
        with pytest.raises(RuntimeError, match="in the middle"):
            sample(model, steps=2)
        gc.collect()
        found = [o for o in gc.get_objects() if type(o) is torch.Tensor and 608 in o.shape]
        assert [t for t in found if t.shape[-1] == 384] == []


def test_two_samplers_of_one_prompt_are_one_record(prompts, loaded):
    prompt = sampling(loaded)
    prompt["second"] = probe_prompts.sampler(["probe", 0], seed=3)
    prompt["second"]["inputs"]["latent_image"] = ["sampler", 0]
    prompt["shown"]["inputs"]["source"] = ["second", 0]
    record = prompts.record(prompt, "probe")
    assert record["state"] == "done"
    assert [step["step"] for step in record["steps"]] == [1, 2, 3, 4]
    assert any("sampled 2 times" in note for note in record["notes"])
    # The next prompt takes the probe from the host's cache, and begins a record of its own.
    for name in ("sampler", "second"):
        prompt[name]["inputs"]["seed"] = 11
    outputs = prompts.run(prompt)
    (record,) = outputs["probe"]["z_image_vram_probe"]
    assert len(record["steps"]) == 4
    assert record["prompt_id"] == prompts.prompt_id


def test_at_most_ten_events_in_any_second(prompts, loaded, clock):
    record = prompts.record(sampling(loaded, detail="blocks", steps=20), "probe")
    clock.now += 1
    # The first event belongs to the node itself, in front of the sampling.
    records = [data["record"] for data, _ in prompts.sent()][1:]
    times = [0.0, *(r["timeline"][-1][0] for r in records if r["timeline"])]
    readings = [row[0] for row in record["timeline"]]
    assert readings[-1] > 1, "more than a second of the test's clock"
    assert len([t for t in readings if t < 1]) > 10, "sent unpaced, they would be more than ten"
    assert len(times) > 2
    for first in times:
        assert len([t for t in times if first <= t < first + 1]) <= 10
    assert len(record["timeline"]) <= 400
    assert records[-1] == record


def test_what_is_not_on_the_device_when_a_step_begins_is_streamed_in_it(loaded):
    from pack.nodes.host.probe.streaming import Streaming

    patcher = loaded.model.clone()
    whole, device = patcher.model_size(), patcher.load_device
    patcher.load(device, full_load=True)
    streaming = Streaming(patcher)
    streaming.begin_step()
    patcher.partially_unload(device, 2 * MIB)
    streaming.end_step()
    resident = patcher.loaded_size()
    for _ in range(2):
        streaming.begin_step()
        streaming.end_step()
    counts = [figure.bytes for figure in streaming.figures()]
    assert 2 * MIB <= whole - resident < whole
    assert counts == [0, whole - resident, whole - resident]
    loaded.model.load(device, full_load=True)


def test_a_later_probe_lists_the_sampling(prompts, loaded):
    """The sampling is the record of the probe on the model's wire, and no part of the later one."""
    prompt = sampling(loaded)
    prompt["after"] = probe_prompts.probe(["sampler", 0], label="latent")
    del prompt["shown"]
    outputs = prompts.run(prompt)
    after = outputs["after"]["z_image_vram_probe"][0]
    assert [row[5] for row in after["timeline"]].count("KSampler") <= 2
    summary = after["summary"]
    assert [line.split(":")[0] for line in summary] == ["1. sample", "2. latent"]
