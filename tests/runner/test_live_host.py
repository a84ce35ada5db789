"""How a live host starts, ends and fails, over a small server in ComfyUI's place."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
from pack.runner.live_host import HostError, LiveHost

MAIN = """
import argparse, http.server
parser = argparse.ArgumentParser()
parser.add_argument("--port", type=int)
for name in ("listen", "base-directory", "database-url"):
    parser.add_argument(f"--{name}")
for name in ("disable-auto-launch", "disable-api-nodes", "dont-print-server", "cpu"):
    parser.add_argument(f"--{name}", action="store_true")
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{}")
http.server.HTTPServer(("127.0.0.1", parser.parse_args().port), Handler).serve_forever()
"""


@pytest.fixture
def host_dir(tmp_path) -> Path:
    folder = tmp_path / "host"
    folder.mkdir()
    (folder / "main.py").write_text(MAIN)
    return folder


def test_a_server_that_dies_shows_its_last_lines(host_dir, tmp_path):
    live = LiveHost(host_dir, tmp_path / "base", pack_dir=None, args=["--no-such-option"])
    with pytest.raises(HostError, match=r"exit code 2.*\n[\s\S]*unrecognized arguments"):
        live.start()
    with pytest.raises(HostError, match="has not been started"):
        _ = live.pid


def test_a_failure_inside_ends_the_server(host_dir, tmp_path):
    with (
        pytest.raises(ZeroDivisionError),
        LiveHost(host_dir, tmp_path / "base", pack_dir=None) as live,
    ):
        process = psutil.Process(live.pid)
        raise ZeroDivisionError
    assert not process.is_running()
    with pytest.raises(HostError, match="not running"):
        live.get_json("/system_stats")


def test_a_folder_without_a_host_is_named(tmp_path):
    with pytest.raises(HostError, match=r"main\.py is missing there"):
        LiveHost(tmp_path, tmp_path / "base").start()
