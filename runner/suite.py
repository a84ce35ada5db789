"""`run.py test`: the checks, pytest on each host, the counts. Standard library only."""

from __future__ import annotations

import argparse
import contextlib
import os
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

from . import browser, environment
from .setup import DEFAULT_HOST, OLDEST_HOST, Steps, choose_host, own_host, prepare

# Each counts as one test.
CHECKS = (["ruff", "check", "."], ["ruff", "format", "--check", "."], ["pyright"])
# The first host runs every test, the others a choice of those that need a host.
ALL_TESTS, HOST_TESTS = ["tests"], ["tests/host", "tests/e2e", "-m", "not once"]
# No server, no browser: what a change to one file needs before it is committed.
QUICK = ["tests", "--ignore=tests/e2e", "-m", "not slow"]
# pytest without the repository's root on sys.path: the host has a module `nodes` of its own.
PYTEST = "import sys; sys.path.remove(''); import pytest; sys.exit(pytest.main(sys.argv[1:]))"
WORKER_GIB = 6  # of RAM: a worker's own host, and a server that it may have started
MOST_WORKERS = 4  # more would only start more servers: a file is tested by one worker
SLOW_FILES_SHOWN = 8


def check(options: argparse.Namespace, rest: list[str]) -> int:
    """Runs the checks alone; 1 if any of them failed."""
    steps = Steps(4)
    python = prepare(steps, with_tools=True)
    steps("ruff check, ruff format, pyright")
    return 1 if count_failed_checks(python) else 0


def count_failed_checks(python: Path) -> int:
    return sum(environment.call([python, "-m", *check]) != 0 for check in CHECKS)


def run(options: argparse.Namespace, rest: list[str]) -> int:
    """Runs the checks and the tests; 1 if any of them failed.

    Args:
        options: host: the versions to test on, None for the newest and the oldest.
            comfyui: a ComfyUI folder of the user's own, which then comes first, or alone.
            quick: on the newest host alone, without server, browser and slow tests.
        rest: arguments for pytest; files or folders among them replace the whole suite.
    """
    own = [own_host(options.comfyui)] if options.comfyui else []
    ours = [DEFAULT_HOST] if options.quick else [DEFAULT_HOST, OLDEST_HOST]
    hosts: list[str | Path] = [*own, *dict.fromkeys(options.host or ([] if own else ours))]
    steps = Steps(4 + len(hosts) + (not options.quick))
    python = prepare(steps, with_tools=True)
    chromium = None
    if not options.quick:
        steps("Chromium for the browser tests")
        chromium = browser.find_chromium(python)
    steps("ruff check, ruff format, pyright: each counts as one test")
    failed = count_failed_checks(python)
    counts = Counter(passed=len(CHECKS) - failed, failed=failed, skipped=0)
    seconds: Counter[str] = Counter()
    for index, host in enumerate(hosts):
        steps(f"Tests on ComfyUI {host}")
        folders = QUICK if options.quick else HOST_TESTS if index else ALL_TESTS
        report = run_pytest(host, folders, rest, chromium, counts)
        seconds.update({f"{file} on {host}": took for file, took in seconds_of(report).items()})
    print_times(steps, seconds)
    print(", ".join(f"{count} {word}" for word, count in counts.items()))
    return 1 if counts["failed"] else 0


def run_pytest(
    host: str | Path,
    folders: list[str],
    rest: list[str],
    chromium: str | None,
    counts: Counter[str],
) -> Path:
    """Runs pytest on one host and adds to the counts; returns its report in JUnit's format.

    Args:
        host: a version, or the folder of the user's own.
    """
    own = host if isinstance(host, Path) else None
    python, host_dir = choose_host(DEFAULT_HOST if own else str(host), own)
    report = environment.ROOT / ".tests" / f"junit-{'own' if own else host}.xml"
    report.parent.mkdir(exist_ok=True)
    report.unlink(missing_ok=True)
    if any((environment.ROOT / arg.split("::")[0]).exists() for arg in rest):
        folders = []
    # By file, in the order that tests/conftest.py gives them: a file's server is started once.
    spread = [f"-n{workers()}", "--dist=loadfile", "--no-loadscope-reorder"]
    spread += ["--max-worker-restart=1"]  # a test that ends its process ends it again
    command = [python, "-c", PYTEST, *folders, *spread, *rest, f"--junitxml={report}"]
    settings = {"OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    settings |= {"ZIMAGE_HOST_DIR": str(host_dir)}
    settings |= {"ZIMAGE_CHROMIUM": chromium} if chromium else {}
    code = environment.call(command, **settings)
    found = count_tests(report)
    if code != 0 and found["failed"] == 0:
        end = f"signal {-code}" if code < 0 else f"exit code {code}"
        print(f"pytest ended with {end} on ComfyUI {host}: counted as one failure")
        found["failed"] = 1
    counts.update(found)
    return report


def workers() -> int:
    """How many processes test at a time: as many as there are cores, and RAM for them."""
    if hasattr(os, "sched_getaffinity"):  # the cores that this process may use
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    ram_gib = 4 * WORKER_GIB  # where the system does not say
    with contextlib.suppress(AttributeError, ValueError, OSError):
        ram_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return max(1, min(cores, int(ram_gib / WORKER_GIB), MOST_WORKERS))


def cases_of(report: Path) -> list[ElementTree.Element]:
    """The test cases of a JUnit file; none when it is missing or broken."""
    try:
        return list(ElementTree.parse(report).getroot().iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return []


def count_tests(report: Path) -> dict[str, int]:
    """Counts the test cases of a JUnit file; an error in a test's set-up or end is a failure."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    for case in cases_of(report):
        kinds = {child.tag for child in case}
        is_bad = kinds & {"failure", "error"}
        counts["failed" if is_bad else "skipped" if "skipped" in kinds else "passed"] += 1
    return counts


def seconds_of(report: Path) -> Counter[str]:
    """The seconds that the tests of each file took, those of its classes included."""
    seconds: Counter[str] = Counter()
    for case in cases_of(report):
        modules = [part for part in case.get("classname", "").split(".") if part[:1].islower()]
        seconds["/".join(modules) + ".py"] += float(case.get("time", 0))
    return seconds


def print_times(steps: Steps, seconds: Counter[str]) -> None:
    """Prints the seconds of each step, and the files whose tests took longest."""
    print("\nWhere the time went:")
    for text, took in steps.durations():
        print(f"{took:6.0f} s  {text}")
    print("Longest files, in seconds of their tests:")
    for file, took in seconds.most_common(SLOW_FILES_SHOWN):
        print(f"{took:6.0f} s  {file}")
