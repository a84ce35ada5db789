"""Whole runs on a card, without one: how a server ends and what it says, graphs, no driver."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from pack.benchmarks.card import driver, graphs, server
from pack.benchmarks.card.job import Job, Leg
from pack.benchmarks.card.parts import budget
from pack.runner.graphs import PROBE, with_fit, with_probes
from pack.runner.graphs import Picture as Drawn
from pack.runner.live_host import HostError, LiveHost
from pack.runner.model_files import Models

# Says what ComfyUI 0.30.0 says, and takes a second to end.
MAIN = r"""
import http.server, json, os, signal, sys, time
signal.signal(signal.SIGINT, lambda *_: (time.sleep(1), os._exit(0)))
for level, line in [
    ("\x1b[32m[INFO]", "Device: cuda:0 NVIDIA H100 80GB HBM3 : cudaMallocAsync"),
    ("\x1b[32m[INFO]", "Using pytorch attention"),
    ("\x1b[32m[INFO]", "DynamicVRAM support detected and enabled"),
    ("\x1b[32m[INFO]", "model weight dtype torch.float8_e4m3fn, manual cast: torch.bfloat16"),
    ("\x1b[1m\x1b[31m[ERROR]", "Got an OOM, unloading all loaded models."),
]:
    print(level + "\x1b[0m " + line)
print("\r 12%|#2        | 1/8 [00:02<00:14,  2.03s/it]", end="")
packages = [{"name": "comfy-aimdo", "installed": "0.4.13", "required": "0.4.13"}]
stats = {"system": {"comfyui_version": "0.30.0", "comfy_package_versions": packages}}
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(stats).encode())
Handler.log_message = lambda *_: None
address = "127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(address, Handler).serve_forever()
"""


@pytest.fixture
def live(tmp_path):
    (tmp_path / "main.py").write_text(MAIN)
    with LiveHost(tmp_path, tmp_path / "base", pack_dir=None) as host:
        yield host


@pytest.mark.slow
def test_the_server_is_gone_after_the_time_limit(live):
    """Once, the next server was measured while the old one still held its memory."""
    pid, said = live.pid, "^not measured: the run took longer than 1 s$"
    with pytest.raises(server.RunLimitError, match=said), server.time_limit(live, 1):
        while True:
            live.check_alive()
    assert not psutil.pid_exists(pid)


def test_facts_and_last_words_of_a_server(live):
    with server.time_limit(live, 60):  # leaves it alone
        facts = server.server_facts(live)
    assert facts == {
        "allocator": "cudaMallocAsync", "mode": "dynamic VRAM", "attention": "attention_pytorch",
        "comfyui": "0.30.0", "comfy_aimdo": "0.4.13", "comfy_kitchen": None,
    }  # fmt: skip
    assert server.dtype_of(live.log()) == "bfloat16"
    psutil.Process(live.pid).kill()
    with pytest.raises(HostError, match="its log:") as ended, server.time_limit(live, 60):
        while True:
            live.check_alive()
    last = "[ERROR] Got an OOM, unloading all loaded models."
    assert server.sentence(ended.value) == f"ComfyUI ended with exit code -9: {last}"
    oom = {"node_type": "KSampler", "exception_type": "torch.OutOfMemoryError"}
    history = {"status": {"messages": [["execution_error", oom]]}}
    assert server.sentence(HostError("x", history)) == "out of memory in KSampler"


def test_the_graphs():
    models = Models("z.safetensors", "qwen.safetensors", "ae.safetensors", Path())
    assert graphs.loader_of(models, is_small=False) == graphs.OFFICIAL
    official = graphs.template(models, Drawn(64, 64), loader=graphs.OFFICIAL)
    to_loader = ["ModelSamplingAuraFlow", "UNETLoader"]
    assert upstream(official, "7") == ["SaveImage", "VAEDecode", "KSampler", *to_loader]
    assert official[official["6"]["inputs"]["vae"][0]]["class_type"] == "VAELoader"
    assert official[official["2"]["inputs"]["clip"][0]]["class_type"] == "CLIPLoader"
    fitted = with_fit(official, "smallest")
    vaes = [fitted[node]["inputs"]["vae"] for node in ("6", "9")]
    assert vaes == [["9", 1], official["6"]["inputs"]["vae"]]
    clips = [fitted[node]["inputs"]["clip"] for node in ("2", "9")]
    assert clips == [["9", 3], official["2"]["inputs"]["clip"]]
    expected = ["SaveImage", PROBE, "VAEDecode", "KSampler", PROBE, graphs.FIT, *to_loader]
    assert upstream(with_probes(fitted), "7") == expected


def upstream(graph: graphs.Graph, node: str) -> list[str]:
    """The classes of the nodes from here to the loader of the denoiser."""
    inputs = graph[node]["inputs"]
    links = [inputs[name] for name in ("images", "samples", "model", "value") if name in inputs]
    return [graph[node]["class_type"], *(upstream(graph, links[0][0]) if links else ())]


def test_prefer_smallest_draws_the_first_size_alone():
    job = Job(Leg("budget", "4 GiB", card_gib=4.0), Path(), Path())
    sizes = [len({take.picture for take in budget.planned(job, v)}) for v in budget.variants(job)]
    assert sizes == [2, 2, 1]


@pytest.mark.parametrize("has_driver", [False, True])
def test_the_driver_is_asked_by_an_old_package_or_none(monkeypatch, has_driver):
    memory = SimpleNamespace(total=8, free=3, used=5)
    old = SimpleNamespace(
        nvmlInit=lambda: None, nvmlDeviceGetHandleByIndex=int,
        nvmlDeviceGetName=lambda _: b"NVIDIA H100", nvmlDeviceGetMemoryInfo=lambda _: memory,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", old if has_driver else None)
    monkeypatch.setattr(driver, "_card", driver._card.__wrapped__)  # without its cache
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with driver.DriverPeak(1) as peak:
        told = [driver.device_name(), driver.total_bytes(), driver.free_bytes(), peak.bytes]
    assert told == (["NVIDIA H100", 8, 3, 4] if has_driver else [None] * 4)
