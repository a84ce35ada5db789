"""One command from a bare machine to a picture, or to the tests. Standard library only.

    python run.py demo     a real ComfyUI with this pack runs the example workflow to a picture
    python run.py test     everything this machine can test; the last line counts
    python run.py check    ruff and pyright alone, as before a commit
    python run.py host     ComfyUI with this pack in the foreground, for trying things by hand
    python run.py bench    the named script of benchmarks/ with its own options, or all: hours;
                           `bench card` measures everything that needs a card
    python run.py plan     what a picture needs on a card of so many GiB: no host, GPU or weights

The environment lies in .venv, ComfyUI in .host, the demo in .demo. An interrupted command goes on
where it stopped, and a second run starts at once.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

if not __package__:  # started as a script
    import runner  # noqa: F401 (makes the repo importable as `pack`)

from pack.runner import browser, environment, live_host, model_files, plan

PYTHONS = ((3, 10), (3, 14))  # torch 2.11.0 is published for these
DEFAULT_HOST = "0.30.0"
OLDEST_HOST = "0.16.3"  # equals requires-comfyui in pyproject.toml
# The first host runs every test, the others those that need a host.
ALL_TESTS, HOST_TESTS = ["tests"], ["tests/host", "tests/e2e"]
NO_BENCHMARKS = ("__init__.py", "rows.py")
CHECKS = (["ruff", "check", "."], ["ruff", "format", "--check", "."], ["pyright"])
FIND_ACCELERATOR = "import torch; print(torch.accelerator.is_available())"
# pytest without the repository's root on sys.path: the host has a module `nodes` of its own.
PYTEST = "import sys; sys.path.remove(''); import pytest; sys.exit(pytest.main(sys.argv[1:]))"


class Steps:
    """Numbered one-line statements with the seconds since the start."""

    def __init__(self, count: int):
        self.count, self.done, self.start = count, 0, time.monotonic()

    def __call__(self, text: str) -> None:
        self.done += 1
        seconds = time.monotonic() - self.start
        print(f"[{self.done}/{self.count}] {text} ({seconds:.0f} s)", flush=True)


def prepare(steps: Steps) -> Path:
    """The Python of .venv with the default host's requirements: three steps."""
    steps("Python environment in .venv")
    python = environment.make_venv(environment.VENV)
    steps(f"ComfyUI {DEFAULT_HOST} in .host")
    default_host = environment.fetch_host(python, DEFAULT_HOST)
    steps("Packages: torch 2.11.0 (6 GB on disk) and what ComfyUI asks for")
    wanted = environment.base_requirements(default_host)
    environment.install(environment.VENV, "base", wanted, "installing the packages")
    return python


def install_tools(steps: Steps) -> None:
    """What tests and benchmarks need besides: one step."""
    steps("Tools for the tests and benchmarks")
    base = environment.base_requirements(environment.HOSTS_DIR / DEFAULT_HOST / "ComfyUI")
    wanted = [*base, "-r", environment.TEST_REQUIREMENTS]
    environment.install(environment.VENV, "tests", wanted, "installing the tools for the tests")


def choose_host(version: str, folder: Path | None) -> tuple[Path, Path]:
    """The Python and the folder of one host: a version of ours, or a user's own, left untouched."""
    base_python = environment.python_of(environment.VENV)
    default_host = environment.fetch_host(base_python, DEFAULT_HOST)
    if folder is None:
        host_dir, key = environment.fetch_host(base_python, version), version
    else:
        host_dir = folder.expanduser().resolve()
        key = "own-" + hashlib.sha256(str(host_dir).encode()).hexdigest()[:8]
    for name in ("main.py", "requirements.txt"):
        if not (host_dir / name).is_file():
            raise environment.SetupError(f"{host_dir} is no ComfyUI: it has no {name}")
    texts = [(path / "requirements.txt").read_text().split() for path in (host_dir, default_host)]
    python = base_python if texts[0] == texts[1] else environment.overlay(host_dir, key)
    return python, host_dir


def needs_cpu(python: Path, asked: bool) -> bool:
    """Whether the host must be told to use the CPU: asked for, or torch sees nothing else."""
    if asked:
        return True
    answer = subprocess.run([str(python), "-c", FIND_ACCELERATOR], capture_output=True, text=True)
    return answer.stdout.strip() != "True"


def run_demo(options: argparse.Namespace, rest: list[str]) -> int:
    steps = Steps(5)
    prepare(steps)
    steps(f"ComfyUI to run: {options.comfyui or options.version}")
    python, host_dir = choose_host(options.version, options.comfyui)
    steps("Demo")
    command = [python, "-m", "runner.demo", "--host-dir", host_dir, *rest]
    if options.models:
        command += ["--models", options.models.expanduser().resolve()]
    if needs_cpu(python, options.cpu):
        command.append("--cpu")
    return environment.call(command, PYTHONDONTWRITEBYTECODE="1", PYTHONUTF8="1")


def run_host(options: argparse.Namespace, rest: list[str]) -> int:
    steps = Steps(5)
    prepare(steps)
    steps(f"ComfyUI to run: {options.comfyui or options.version}")
    python, host_dir = choose_host(options.version, options.comfyui)
    steps("Starting the server")
    base_dir = environment.ROOT / ".demo" / "base"
    models = model_files.offer_models(options.models, base_dir) if options.models else None
    server = live_host.LiveHost(
        host_dir,
        base_dir,
        python=str(python),
        args=rest,
        extra_model_paths=models.paths_file if models else None,
        cpu=needs_cpu(python, options.cpu),
        port=options.port,
    )
    try:
        with server, server.log_path.open(encoding="utf-8", errors="replace") as log:
            print(f"ComfyUI with this pack: {server.url} (Ctrl-C ends it)", flush=True)
            while True:
                print(log.read(), end="", flush=True)
                server.check_alive()
                time.sleep(0.5)
    except live_host.HostError as error:
        raise environment.SetupError(str(error)) from None
    except KeyboardInterrupt:
        print("\nComfyUI has ended.")
        return 0


def benchmark_names() -> list[str]:
    """The scripts that `bench` runs, by name, and the folders that are one."""
    folder = environment.ROOT / "benchmarks"
    scripts = [path.stem for path in folder.glob("*.py") if path.name not in NO_BENCHMARKS]
    return sorted([*scripts, *(path.parent.name for path in folder.glob("*/__main__.py"))])


def run_bench(options: argparse.Namespace, rest: list[str]) -> int:
    scripts = benchmark_names()
    if options.name:
        if options.name not in scripts:
            raise environment.SetupError(f"no benchmark {options.name}; there are: {scripts}")
        scripts = [options.name]
    steps = Steps(4 + len(scripts))
    prepare(steps)
    install_tools(steps)
    python, host_dir = choose_host(DEFAULT_HOST, None)
    failed = 0
    for script in scripts:
        steps(f"bench {script}")
        command = [python, "-m", f"benchmarks.{script}", *options.args, *rest]
        told = {"ZIMAGE_HOST_DIR": str(host_dir), "ZIMAGE_CALLED_FROM": os.getcwd()}
        failed += environment.call(command, **told) != 0
    if not options.name:
        print(f"{len(scripts) - failed} of {len(scripts)} benchmarks ran")
    return 1 if failed else 0


def count_failed_checks(python: Path) -> int:
    return sum(environment.call([python, "-m", *check]) != 0 for check in CHECKS)


def run_checks(options: argparse.Namespace, rest: list[str]) -> int:
    steps = Steps(5)
    python = prepare(steps)
    install_tools(steps)
    steps("ruff check, ruff format, pyright")
    return 1 if count_failed_checks(python) else 0


def run_tests(options: argparse.Namespace, rest: list[str]) -> int:
    versions = list(dict.fromkeys(options.host or [DEFAULT_HOST, OLDEST_HOST]))
    steps = Steps(6 + len(versions))
    python = prepare(steps)
    install_tools(steps)
    steps("Chromium for the browser tests")
    chromium = browser.find_chromium(python)
    steps("ruff check, ruff format, pyright: each counts as one test")
    failed = count_failed_checks(python)
    counts = {"passed": len(CHECKS) - failed, "failed": failed, "skipped": 0}
    for index, version in enumerate(versions):
        steps(f"Tests on ComfyUI {version}")
        host_python, host_dir = choose_host(version, None)
        report = environment.ROOT / ".tests" / f"junit-{version}.xml"
        report.parent.mkdir(exist_ok=True)
        report.unlink(missing_ok=True)
        named = [arg for arg in rest if (environment.ROOT / arg.split("::")[0]).exists()]
        folders = [] if named else HOST_TESTS if index else ALL_TESTS
        command = [host_python, "-c", PYTEST, *folders, *rest, f"--junitxml={report}"]
        settings = {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUTF8": "1"}
        settings |= {"ZIMAGE_HOST_DIR": str(host_dir)}
        settings |= {"ZIMAGE_CHROMIUM": chromium} if chromium else {}
        code = environment.call(command, **settings)
        found = count_tests(report)
        if code != 0 and found["failed"] == 0:
            end = f"signal {-code}" if code < 0 else f"exit code {code}"
            print(f"pytest ended with {end} on ComfyUI {version}: counted as one failure")
            found["failed"] = 1
        counts = {word: counts[word] + found[word] for word in counts}
    print(", ".join(f"{count} {word}" for word, count in counts.items()))
    return 1 if counts["failed"] else 0


def run_plan(options: argparse.Namespace, rest: list[str]) -> int:
    try:
        text, is_possible = plan.report(options)
    except ValueError as error:
        raise environment.SetupError(str(error)) from None
    print(text)
    return 0 if is_possible else 1


def count_tests(report: Path) -> dict[str, int]:
    """Counts the test cases of a JUnit file; an error in a test's set-up or end is a failure."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    try:
        cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return counts
    for case in cases:
        kinds = {child.tag for child in case}
        is_bad = kinds & {"failure", "error"}
        counts["failed" if is_bad else "skipped" if "skipped" in kinds else "passed"] += 1
    return counts


def size(text: str) -> tuple[int, int]:
    """ "512" or "512x768" as width and height in pixels."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    sides = [int(side) for side in (match[1], match[2] or match[1])] if match else []
    if not sides or any(side % 16 or not 64 <= side <= 8192 for side in sides):
        raise argparse.ArgumentTypeError(
            f"must be like 512 or 512x768, in multiples of 16 from 64 to 8192, got {text}"
        )
    return sides[0], sides[1]


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of a command, and what follows `--`."""
    own, rest = (
        (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    )
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    names = ("demo", "test", "check", "host", "bench", "plan")
    demo, test, check, host, bench, planned = (commands.add_parser(name) for name in names)
    versions = list(environment.HOSTS)
    for command in (demo, host):
        command.add_argument("--comfyui", type=Path, metavar="DIR", help="your ComfyUI, untouched")
        command.add_argument("--models", type=Path, metavar="DIR", help="real weights")
        command.add_argument("--version", choices=versions, default=DEFAULT_HOST)
        command.add_argument("--cpu", action="store_true", help="use no GPU")
    demo.add_argument("--size", type=size, help="512 or 512x768: width x height in pixels")
    demo.add_argument("--steps", type=int)
    demo.add_argument("--prompt")
    demo.add_argument("--seed", type=int)
    demo.add_argument("--keep-open", action="store_true", help="leave the server running")
    bench.description = "Without a name all run, which takes hours and rewrites benchmarks/results."
    bench.add_argument("name", nargs="?", help=f"one script of: {', '.join(benchmark_names())}")
    bench.add_argument("args", nargs=argparse.REMAINDER, help="its options")
    host.add_argument("--port", type=int, default=8188)
    test.add_argument("--host", action="append", choices=versions, help="repeat for more")
    plan.add_options(planned)
    planned.set_defaults(run=run_plan)
    demo.set_defaults(run=run_demo)
    test.set_defaults(run=run_tests)
    check.set_defaults(run=run_checks)
    host.set_defaults(run=run_host)
    bench.set_defaults(run=run_bench)
    options = parser.parse_args(own)
    if options.command == "demo":
        chosen = {name: getattr(options, name) for name in ("steps", "prompt", "seed")}
        chosen["width"], chosen["height"] = options.size or (None, None)
        rest += [f"--{name}={value}" for name, value in chosen.items() if value is not None]
        rest += ["--keep-open"] if options.keep_open else []
    return options, rest


def main(argv: list[str]) -> int:
    if not PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]:
        here = "{}.{}".format(*sys.version_info[:2])
        print(f"run.py needs Python 3.10 to 3.14, this is {here}: start it with another one.")
        return 1
    options, rest = parse(argv)
    try:
        return options.run(options, rest)
    except environment.SetupError as error:
        print(f"run.py: {error}", file=sys.stderr)
    except OSError as error:
        print(f"run.py: {error.strerror}: {error.filename}", file=sys.stderr)
    except KeyboardInterrupt:
        print("\nInterrupted; the same command goes on from here.", file=sys.stderr)
        return 130
    return 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main(sys.argv[1:]))
