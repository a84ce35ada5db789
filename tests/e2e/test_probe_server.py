"""VRAM Probe on a real server: what two pages get over their websockets, and what is kept."""

from __future__ import annotations

import asyncio
import time
import uuid
from pathlib import Path
from typing import Any

import aiohttp
from pack.runner.graphs import Picture, example_prompt
from pack.runner.live_host import LiveHost
from pack.runner.model_files import Models

EVENT = "z_image_low_vram.probe"
ROUTE = "/z_image_low_vram/probes/"
FILES = ("z_image_turbo_bf16.safetensors", "qwen_3_4b.safetensors", "ae.safetensors")
TIMEOUT_S = 120


def prompt_with_probes(*, steps: int, label: str = "") -> dict[str, Any]:
    """The example with a probe on the model's wire and one behind the decode."""
    picture = Picture(64, 64, steps=steps, seed=uuid.uuid4().int % 2**32)
    prompt = example_prompt(Models(*FILES, Path()), picture)
    settings = {"mode": "measure and reset peak", "history": "off"}
    prompt["1:8"] = {
        "class_type": "ZImageVRAMProbe",
        "inputs": {"value": ["1", 0], "label": f"sample{label}", "detail": "blocks", **settings},
    }
    prompt["9"] = {
        "class_type": "ZImageVRAMProbe",
        "inputs": {"value": ["6", 0], "label": f"decode{label}", "detail": "totals", **settings},
    }
    prompt["5"]["inputs"]["model"] = ["1:8", 0]
    prompt["7"]["inputs"]["images"] = ["9", 0]
    return prompt


def run(server: LiveHost, prompt: dict[str, Any], *, cancels: bool = False) -> Any:
    """Runs a prompt for one of two open pages.

    Returns:
        The prompt's id, and what each page got: (name, data) of every message.
    """

    async def both() -> Any:
        mine, other = uuid.uuid4().hex, uuid.uuid4().hex
        got: dict[str, list[Any]] = {mine: [], other: []}
        sampling, ended = asyncio.Event(), asyncio.Event()

        async def listen(session: aiohttp.ClientSession, client: str) -> None:
            async with session.ws_connect(f"{server.url}/ws?clientId={client}") as socket:
                ready[client].set()
                async for message in socket:
                    if message.type is not aiohttp.WSMsgType.TEXT:
                        continue
                    data = message.json()
                    got[client].append((data["type"], data["data"]))
                    if client == mine and (step_of(got[client][-1]) or 0) >= 2:
                        sampling.set()
                    if client == mine and data["type"] in (
                        "execution_success",
                        "execution_interrupted",
                        "execution_error",
                    ):
                        ended.set()

        ready = {client: asyncio.Event() for client in got}
        async with aiohttp.ClientSession() as session:
            listeners = [asyncio.create_task(listen(session, client)) for client in got]
            for event in ready.values():
                await asyncio.wait_for(event.wait(), 30)
            prompt_id = await asyncio.to_thread(server.queue, prompt, mine)
            if cancels:
                # Steps may be shorter than the time between two events, which then skip some.
                await asyncio.wait_for(sampling.wait(), TIMEOUT_S)
                await asyncio.to_thread(server.post_json, "/interrupt", {})
            await asyncio.wait_for(ended.wait(), TIMEOUT_S)
            while not is_over(got[mine]):  # what is still on its way; until the test's own limit
                await asyncio.sleep(0.05)
            for listener in listeners:
                listener.cancel()
        return prompt_id, got[mine], got[other]

    return asyncio.run(both())


def is_over(messages: list[Any]) -> bool:
    """Whether the last record of every probe says that it ended."""
    states = {m[1]["node_id"]: m[1]["record"]["state"] for m in messages if m[0] == EVENT}
    return "running" not in states.values()


def step_of(message: Any) -> int | None:
    """The step in which the newest point of a probe's event stands."""
    name, data = message
    if name != EVENT or not data["record"]["timeline"]:
        return None
    return data["record"]["timeline"][-1][4]


def test_one_page_sees_the_run_live_and_the_history_keeps_it(server):
    steps, sampling = 12, []
    while len(sampling) < 5:  # on a fast machine more steps go between two events
        steps *= 2
        assert steps <= 768
        start = time.monotonic()
        prompt_id, mine, other = run(server, prompt_with_probes(steps=steps))
        seconds = time.monotonic() - start
        sent = [data for name, data in mine if name == EVENT]
        sampling = [data["record"] for data in sent if data["node_id"] == "1:8"]
    assert [name for name, _ in other if name == EVENT] == []
    assert {data["prompt_id"] for data in sent} == {prompt_id}
    assert {data["node_id"] for data in sent} == {"1:8", "9"}

    states = [record["state"] for record in sampling]
    assert states[-1] == "done"
    assert states.count("running") >= 3
    running = [record for record in sampling if record["state"] == "running"]
    assert len(running[1]["timeline"]) < len(running[-1]["timeline"])
    # Eight a second, the first of them at once, and that of the node itself. How many arrive in any
    # one second depends on the machine.
    assert len(sampling) <= 8 * seconds + 2

    outputs = server.wait(prompt_id, TIMEOUT_S)["outputs"]
    (kept,) = outputs["1:8"]["z_image_vram_probe"]
    assert kept == sampling[-1]
    assert len(kept["steps"]) == steps
    assert kept["peak_at"]["block"].split(".")[0] in ("layers", "noise_refiner", "context_refiner")
    # Its own peak, and the sampling's in the summary.
    (decode,) = outputs["9"]["z_image_vram_probe"]
    assert decode["peak_bytes"] == sum(decode["parts_at_peak"].values())
    assert [line.split(":")[0] for line in decode["summary"]] == ["1. sample", "2. decode"]
    named = [row[5] for row in decode["timeline"]]
    assert "VAEDecode" in named
    # The sampling is the other probe's; what the sampler's node does after it is not.
    assert named.count("KSampler") <= 2


def test_an_interval_is_followed_step_by_step_without_a_wrapper(server):
    """Through the host's own progress."""
    steps, seen = 10, 0
    while seen < 4:  # the host leaves out a step that comes too soon after another
        steps *= 2
        assert steps <= 640
        prompt = prompt_with_probes(steps=steps)
        prompt["1:8"]["inputs"]["value"] = ["2", 0]
        prompt["5"]["inputs"] |= {"model": ["1", 0], "positive": ["1:8", 0]}
        outputs = server.wait(server.queue(prompt), TIMEOUT_S)["outputs"]
        (record,) = outputs["9"]["z_image_vram_probe"]
        seen = len([row for row in record["timeline"] if row[5] == "KSampler"])


def test_a_cancelled_run_ends_with_a_record_that_says_so(server):
    prompt_id, mine, _ = run(server, prompt_with_probes(steps=200, label=" long"), cancels=True)
    assert "execution_interrupted" in {name for name, _ in mine}
    record = [data["record"] for name, data in mine if name == EVENT][-1]
    assert record["state"] == "interrupted"
    assert 1 <= len(record["steps"]) < 200
    deadline = time.monotonic() + 30
    while not (entry := server.get_json(f"/history/{prompt_id}")) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert entry[prompt_id]["outputs"]["1:8"]["z_image_vram_probe"] == [record]


def test_without_a_page_the_prompt_runs_all_the_same_and_may_be_asked_about(server):
    prompt_id = server.queue(prompt_with_probes(steps=60))
    states, deadline = set(), time.monotonic() + TIMEOUT_S
    while server.get_json("/queue")["queue_running"] or not states:
        assert time.monotonic() < deadline
        live = server.get_json(f"{ROUTE}{prompt_id}")
        states.update(record["state"] for record in live.values())
        time.sleep(0.01)
    assert "running" in states
    outputs = server.wait(prompt_id, TIMEOUT_S)["outputs"]
    live = server.get_json(f"{ROUTE}{prompt_id}")
    (record,) = outputs["1:8"]["z_image_vram_probe"]
    assert record["state"] == "done"
    assert len(record["steps"]) == 60
    assert live.keys() == {"1:8", "9"}
    assert live["1:8"] == record
    assert server.get_json(f"{ROUTE}another") == {}


def test_object_info(server):
    info = server.get_json("/object_info/ZImageVRAMProbe")["ZImageVRAMProbe"]
    assert (info["display_name"], info["category"]) == ("VRAM Probe", "utilities")
    assert info["output_node"]
    assert info["output_name"] == ["value", "report", "peak_gib", "chart"]
    inputs = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
    assert list(info["input"]["optional"]) == ["value"]
    assert all(len(options["tooltip"].split()) > 5 for _, options in inputs.values())
    assert all(len(tooltip.split()) > 3 for tooltip in info["output_tooltips"])
