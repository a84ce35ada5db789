"""A real ComfyUI server in a child process, for the demo, the benchmarks and the tests.

Standard library only, so that `run.py` can use it before any package is installed. The host runs
unmodified from its own folder and writes only below `base_dir`.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .folder_links import install_pack

REPO = Path(__file__).resolve().parent.parent

# Without these the page greets a new user with dialogs that cover the graph.
PAGE_SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasInfo": False,
    "Comfy.Workflow.Persist": False,
}
LOG_LINES_SHOWN = 30
POLL_S = 0.1
# Requests go to 127.0.0.1 only; a proxy that the user has set must not see them.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


class HostError(RuntimeError):
    """The host refused, failed or died; the message is its own sentence or its last log lines.

    Attributes:
        history: the prompt's history entry, where the host wrote one, else None.
    """

    def __init__(self, message: str, history: dict[str, Any] | None = None):
        super().__init__(message)
        self.history = history


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class LiveHost:
    """Starts a host server on enter and ends it on exit, whatever happened between.

    Args:
        host_dir: an unpacked ComfyUI, the folder with main.py; it is never written to.
        base_dir: where the server keeps everything: models, custom_nodes, output, user, temp.
        python: the interpreter with the host's requirements.
        pack_dir: the pack to install; None runs the host without it.
        args: more command-line arguments for the host.
        extra_model_paths: a file in the host's extra_model_paths.yaml format.
        cpu: run on the CPU even where there is a GPU.
        port: 0 picks a free one.
    """

    def __init__(
        self,
        host_dir: Path,
        base_dir: Path,
        *,
        python: str = sys.executable,
        pack_dir: Path | None = REPO,
        args: Sequence[str] = (),
        extra_model_paths: Path | None = None,
        cpu: bool = True,
        port: int = 0,
        start_timeout_s: float = 300.0,
    ):
        self.host_dir = Path(host_dir).resolve()
        self.base_dir = Path(base_dir).resolve()
        self.python = python
        self.pack_dir = pack_dir
        self.args = list(args)
        self.extra_model_paths = extra_model_paths
        self.cpu = cpu
        self.port = port
        self.start_timeout_s = start_timeout_s
        self.log_path = self.base_dir / "server.log"
        self._wanted_port = port
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        if self._process is None:
            raise HostError("ComfyUI has not been started")
        return self._process.pid

    def __enter__(self) -> LiveHost:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Starts the server and returns when it answers; HostError with its last words if not."""
        if not (self.host_dir / "main.py").is_file():
            raise HostError(f"no ComfyUI in {self.host_dir}: main.py is missing there")
        self._prepare_base_dir()
        self.port = self._wanted_port or free_port()
        # OMP_NUM_THREADS: spinning threads of torch make a busy machine many times slower.
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
        environment |= {"PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1"}
        atexit.register(self.stop)
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                self._command(),
                cwd=self.base_dir,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=DIE_WITH_PARENT,
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Asks the server to end, and ends it after ten seconds; safe to call twice."""
        process, self._process = self._process, None
        atexit.unregister(self.stop)
        if process is None:
            return
        try:
            if process.poll() is None:
                process.send_signal(getattr(signal, "CTRL_BREAK_EVENT", signal.SIGINT))
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
        finally:  # also after a second Ctrl-C during the wait
            if process.poll() is None:
                process.kill()
                process.wait()

    def get_bytes(self, path: str) -> bytes:
        return self._request(path, None)

    def get_json(self, path: str) -> Any:
        return json.loads(self.get_bytes(path))

    def post_json(self, path: str, body: Any) -> Any:
        answer = self._request(path, json.dumps(body).encode())
        return json.loads(answer) if answer.strip() else None

    def queue(self, prompt: dict[str, Any], client_id: str | None = None) -> str:
        """Queues a graph in the API format; returns its id. HostError when the host refuses it."""
        body: dict[str, Any] = {"prompt": prompt}
        if client_id is not None:
            body["client_id"] = client_id
        return self.post_json("/prompt", body)["prompt_id"]

    def wait(self, prompt_id: str, timeout_s: float) -> dict[str, Any]:
        """The history entry of a prompt that ran to its end; HostError when a node failed."""
        deadline = time.monotonic() + timeout_s
        while True:
            entry = self.get_json(f"/history/{prompt_id}").get(prompt_id)
            if entry is not None:
                break
            if time.monotonic() > deadline:
                raise HostError(f"prompt {prompt_id} did not end within {timeout_s:g} s")
            time.sleep(POLL_S)
        if entry["status"]["status_str"] != "success":
            raise HostError(_execution_error(entry), entry)
        return entry

    def images(self, history_entry: dict[str, Any]) -> list[bytes]:
        """The files of all pictures that the prompt saved, in the order of its nodes."""
        outputs = [output for _, output in sorted(history_entry["outputs"].items())]
        pictures = [picture for output in outputs for picture in output.get("images", [])]
        return [self.get_bytes("/view?" + urllib.parse.urlencode(picture)) for picture in pictures]

    def log(self) -> str:
        """What the server wrote, without colours."""
        text = self.log_path.read_text(encoding="utf-8", errors="replace")
        return re.sub(r"\x1b\[\d*m", "", text)

    def log_tail(self) -> str:
        """The last lines that the server wrote."""
        return "\n".join(self.log().splitlines()[-LOG_LINES_SHOWN:])

    def check_alive(self) -> None:
        """Raises HostError with the last log lines when the server is gone."""
        if self._process is None:
            raise HostError("ComfyUI is not running")
        if self._process.poll() is not None:
            code = self._process.returncode
            raise HostError(f"ComfyUI ended with exit code {code}; its log:\n{self.log_tail()}")

    def _prepare_base_dir(self) -> None:
        for name in ("models", "custom_nodes", "input", "output", "user/default"):
            (self.base_dir / name).mkdir(parents=True, exist_ok=True)
        settings = self.base_dir / "user/default/comfy.settings.json"
        if not settings.exists():
            settings.write_text(json.dumps(PAGE_SETTINGS), encoding="utf-8")
        if self.pack_dir is not None:
            install_pack(Path(self.pack_dir).resolve(), self.base_dir)

    def _command(self) -> list[str]:
        command = [self.python, str(self.host_dir / "main.py")]
        command += ["--listen", "127.0.0.1", "--port", str(self.port)]
        command += ["--base-directory", str(self.base_dir), "--database-url", "sqlite:///:memory:"]
        command += ["--disable-auto-launch", "--disable-api-nodes", "--dont-print-server"]
        if self.cpu:
            command.append("--cpu")
        if self.extra_model_paths is not None:
            command += ["--extra-model-paths-config", str(self.extra_model_paths)]
        return command + self.args

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self.start_timeout_s
        while time.monotonic() < deadline:
            self.check_alive()
            try:
                self.get_json("/system_stats")
                return
            except HostError:
                time.sleep(POLL_S)
        seconds = f"{self.start_timeout_s:g}"
        raise HostError(f"ComfyUI did not answer within {seconds} s; its log:\n{self.log_tail()}")

    def _request(self, path: str, body: bytes | None) -> bytes:
        headers = {"Content-Type": "application/json"} if body is not None else {}
        request = urllib.request.Request(self.url + path, data=body, headers=headers)
        try:
            with _opener.open(request, timeout=60) as response:
                return response.read()
        except urllib.error.HTTPError as error:
            with error:
                message = _refusal(error.read())
            raise HostError(f"HTTP {error.code} from {path}: {message}") from None
        except OSError as error:
            self.check_alive()
            raise HostError(f"no answer from {self.url}{path}: {error}") from None


def _die_with_parent() -> None:
    # A shell's background job ignores SIGINT and hands that down; stop() would wait in vain.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # Even a killed parent leaves no server behind: 1 is PR_SET_PDEATHSIG of linux/prctl.h.
    if _libc is not None:
        _libc.prctl(1, signal.SIGKILL)


# For Popen's preexec_fn: even a killed parent leaves no such child; None where Linux is not.
DIE_WITH_PARENT = _die_with_parent if _libc else None


def _refusal(answer: bytes) -> str:
    """The sentence in a refusal of /prompt: the error's message, then what each node said."""
    try:
        body = json.loads(answer)
        sentences = [body["error"]["message"]]
        for node in (body.get("node_errors") or {}).values():
            sentences += [f"{e['message']} ({e['details']})" for e in node["errors"]]
        return "; ".join(sentences)
    except (ValueError, KeyError, TypeError):
        return answer.decode("utf-8", errors="replace").strip()


def _execution_error(entry: dict[str, Any]) -> str:
    for kind, details in entry["status"].get("messages", []):
        if kind == "execution_error":
            return f"{details['node_type']}: {details['exception_message'].strip()}"
    return "ComfyUI stopped the prompt without a reason (was it interrupted?)"
