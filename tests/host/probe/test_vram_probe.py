"""VRAM Probe on the host's own executor: what passes, what is measured, caches and files."""

from __future__ import annotations

import gc
import json
import threading
from typing import Any

import pytest
import torch
from pack.testing.probe_prompts import (
    CLIENT,
    can_reset,
    is_nan,
    probe,
    resident,
    sampling,
    shelf,
    source,
    three_probes,
)

pytestmark = pytest.mark.usefixtures("host")
MIB = 2**20
RESET_ONLY = "reset only"


def execute(value: Any = None, **settings: Any) -> Any:
    from pack.nodes.vram_probe import VRAMProbe

    return VRAMProbe.execute(value, **settings)


@pytest.mark.parametrize("mode", ["measure", "measure and reset peak", RESET_ONLY])
def test_everything_but_a_model_comes_out_as_the_same_object(loaded, mode):
    for value in (None, 3, "text", [1, 2], {"samples": torch.zeros(1)}, loaded.clip, loaded.vae):
        assert execute(value, mode=mode).args[0] is value


def test_a_model_comes_out_as_a_copy_and_with_reset_only_as_itself(loaded):
    model = loaded.model
    before = repr(model.model_options)
    watched = execute(model, detail="blocks").args[0]
    assert type(watched) is type(model)
    assert watched is not model
    assert watched.model is model.model
    assert repr(model.model_options) == before
    assert not model.wrappers
    assert execute(model, mode=RESET_ONLY).args[0] is model


def test_the_outputs(loaded):
    _, report, peak_gib, chart = execute(loaded.vae, label="here").args
    assert report.startswith("here: peak ")
    assert peak_gib * 2**30 > 100 * MIB, "this process alone takes more"
    assert chart.dtype == torch.float32
    assert chart.shape[0] == 1
    assert chart.shape[-1] == 3
    assert 0 <= chart.min() < chart.max() <= 1
    assert "not available: torch keeps no such count on cpu" in report
    assert is_nan(execute(loaded.vae, mode=RESET_ONLY).args[2])


class TestInterval:
    @pytest.fixture(autouse=True)
    def _calm(self) -> None:
        """What other tests have left behind must not go while an interval is measured."""
        gc.collect()

    def test_two_probes_measure_what_is_between_them(self, prompts):
        """300 MiB that come and go in front of the first one are not the second one's."""
        if not can_reset():
            pytest.skip("this system does not let a process set its peak back")
        shelf(large=lambda: resident(300), small=lambda: resident(100))
        prompt = {"large": source("large"), "1": probe(["large", 0], label="large")}
        prompt["small"] = {**source("small"), "inputs": {"name": "small", "turn": ["1", 0]}}
        prompt["2"] = probe(["small", 0], label="small")
        first, second = _two(prompts.run(prompt))
        assert prompts.error is None
        rises = [r["parts_at_peak"]["activations"] / MIB for r in (first, second)]
        assert 95 < rises[1] < 200
        assert second["peak_at"]["block"] == "ProbeTestSource"
        assert first["peak_bytes"] - second["peak_bytes"] > 100 * MIB
        assert first["notes"] and not second["notes"]

    def test_without_setting_back_a_lower_peak_is_said_to_be_a_reading(self, prompts):
        shelf(large=lambda: resident(300), small=lambda: resident(100))
        prompt = {"large": source("large"), "1": probe(["large", 0], mode="measure")}
        prompt["small"] = {**source("small"), "inputs": {"name": "small", "turn": ["1", 0]}}
        prompt["2"] = probe(["small", 0], mode="measure")
        _, second = _two(prompts.run(prompt))
        assert any("at least" in note for note in second["notes"])
        assert second["parts_at_peak"]["activations"] < 95 * MIB

    def test_three_probes_of_a_workflow(self, prompts, loaded):
        outputs = prompts.run(three_probes(loaded))
        assert prompts.error is None
        records = [outputs[node]["z_image_vram_probe"][0] for node in ("1", "2", "3")]
        assert [r["state"] for r in records] == ["done"] * 3
        assert all(r["peak_bytes"] == sum(r["parts_at_peak"].values()) for r in records)
        blocks = [{row[5] for row in r["timeline"]} for r in records]
        assert "KSampler" in blocks[1]
        assert "VAEDecode" in blocks[2]
        names = [line.split(":")[0] for line in records[2]["summary"]]
        assert names == ["1. text encode", "2. sample", "3. decode"]

    def test_what_came_from_the_cache_is_not_measured(self, prompts, loaded):
        prompts.run(three_probes(loaded))
        outputs = prompts.run(three_probes(loaded, seed=9))
        last = outputs["3"]["z_image_vram_probe"][0]
        assert last["summary"][0] == "1. text encode: cached, not measured"
        assert last["summary"][1].startswith("2. sample: peak ")
        # Another label: the probe runs, what stands before it does not.
        prompt = three_probes(loaded, seed=9)
        prompt["3"]["inputs"]["label"] = "again"
        record = prompts.record(prompt, "3")
        assert record["state"] == "cached"
        assert record["peak_bytes"] is None
        assert record["report"].startswith("again: cached, not measured")

    def test_reset_only_begins_an_interval(self, prompts):
        if not can_reset():
            pytest.skip("this system does not let a process set its peak back")
        shelf(large=lambda: resident(300), small=lambda: 1)
        prompt = {"large": source("large"), "1": probe(["large", 0], mode=RESET_ONLY)}
        prompt["small"] = {**source("small"), "inputs": {"name": "small", "turn": ["1", 0]}}
        prompt["2"] = probe(["small", 0])
        first, second = _two(prompts.run(prompt))
        assert first["peak_bytes"] is None
        assert first["notes"] == ["the peak was reset; nothing was measured"]
        assert second["parts_at_peak"]["activations"] < 50 * MIB
        assert len(second["summary"]) == 1


class TestHistory:
    def test_a_row_is_appended_for_an_interval_and_for_a_sampling(self, prompts, loaded, output):
        prompt = sampling(loaded, history="append a row")
        prompt["text"]["inputs"]["text"] = "a secret prompt"
        record = prompts.record(prompt, "probe")
        file = output / "z_image_low_vram" / "vram_history.jsonl"
        text = file.read_text(encoding="utf-8")
        before, during = [json.loads(line) for line in text.splitlines()]
        assert before["steps"] == 0
        assert during["steps"] == 2
        assert during["seconds_per_step"] > 0
        assert during["peak_bytes"] == record["peak_bytes"]
        expected = {"model": "Lumina2", "size": "128x128", "batch": 1, "label": "sample"}
        assert expected.items() <= during.items()
        assert {"ComfyUI", "torch"} <= set(during["versions"])
        assert during["workflow"] == before["workflow"]
        assert "secret" not in text
        assert str(output) not in text
        assert record["files"] == ["z_image_low_vram/vram_history.jsonl"]

    def test_a_folder_that_cannot_be_written_ends_no_run(self, prompts, loaded, output):
        output.write_text("a file where the folder should be", encoding="utf-8")
        prompt = sampling(loaded, history="append a row", detail="allocations")
        record = prompts.record(prompt, "probe")
        assert prompts.error is None
        assert record["state"] == "done"
        assert record["files"] == []
        for told in ("the history was not written: ", "no file for torch's memory viewer: "):
            assert [n for n in record["notes"] if n.startswith(told)]
        assert "the history was not written" in record["report"]
        assert str(output) not in json.dumps(record)


def test_events_reach_the_page_that_asked_and_no_other(prompts, loaded):
    prompts.run(sampling(loaded))
    sent = prompts.sent()
    assert {receiver for _, receiver in sent} == {CLIENT}
    assert {data["prompt_id"] for data, _ in sent} == {prompts.prompt_id}
    assert {data["node_id"] for data, _ in sent} == {"probe"}
    assert [data["record"]["state"] for data, _ in sent][-1] == "done"
    # Over HTTP without a page: the host would send a message without a receiver to every page.
    prompts.run(sampling(loaded, seed=2), client=None)
    assert prompts.sent() == []


def test_a_probe_in_a_subgraph_goes_by_the_id_that_the_page_knows(prompts, loaded):
    prompt = sampling(loaded)
    prompt["7:2"] = prompt.pop("probe")
    prompt["sampler"]["inputs"]["model"] = ["7:2", 0]
    prompts.run(prompt)
    assert {data["node_id"] for data, _ in prompts.sent()} == {"7:2"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows a machine without CUDA")
def test_a_cuda_device_that_is_not_there_has_reasons_and_no_zeros_for_the_driver():
    from pack.nodes.host.probe import device as probe_device

    card = torch.device("cuda", 0)
    gauge = probe_device.gauge_of(card)
    assert gauge.measured_with == "torch's cuda allocator"
    assert gauge.read() == (0, 0, ()), "the allocator has given out nothing"
    figures = {figure.name: figure for figure in probe_device.figures(card)}
    driver = figures["driver used on the device"]
    assert driver.bytes is None
    assert "the driver does not answer" in (driver.reason or "")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mib", [3, 40, 700])
def test_the_counter_is_torchs_own_on_cuda(mib):
    from pack.nodes.host.probe import device as probe_device
    from pack.nodes.probe.counter import PeakCounter

    card = torch.device("cuda", torch.cuda.current_device())
    gauge = probe_device.gauge_of(card)
    interval = PeakCounter(gauge.read, gauge.reset).open(reset=True)
    x = torch.ones(mib * MIB, dtype=torch.uint8, device=card)
    y = x + x
    del x, y
    expected = torch.cuda.max_memory_allocated(card)
    assert interval.take(reset=True) == (expected, True, 0)


def test_no_thread_is_started(prompts, loaded):
    before = set(threading.enumerate())
    prompts.run(sampling(loaded, detail="allocations"))
    assert set(threading.enumerate()) - before == set()


def test_a_bypassed_probe_is_no_part_of_the_prompt(prompts, loaded):
    """The page leaves it out, so nothing of ours is asked: no watch, no event, no wrapper."""
    from comfy_execution.progress import get_progress_state

    prompt = sampling(loaded)
    del prompt["probe"]
    prompt["sampler"]["inputs"]["model"] = ["model", 0]
    prompts.run(prompt)
    assert list(get_progress_state().handlers) == ["webui"]
    assert prompts.sent() == []
    assert not loaded.model.wrappers


def _two(outputs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    first, second = (outputs[node]["z_image_vram_probe"][0] for node in ("1", "2"))
    return first, second
