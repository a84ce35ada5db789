"""The suite's own count and exit code, over real runs of pytest on small folders of tests."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from pack import run
from pack.runner import browser, environment, setup, suite

PASSES = "def test_passes(): pass\n"
FAILS = "def test_fails(): assert 0\n"


def test_counts_are_those_of_a_real_pytest_run(tmp_path):
    (tmp_path / "test_all.py").write_text(
        "import pytest\n"
        "def test_passes(): pass\n"
        "def test_fails(): assert 0\n"
        "@pytest.mark.skip\n"
        "def test_skipped(): pass\n"
        "@pytest.fixture\n"
        "def broken(): raise OSError\n"
        "def test_error_before(broken): pass\n"
        "@pytest.fixture\n"
        "def breaks():\n    yield\n    raise OSError\n"
        "def test_error_after(breaks): pass\n"
    )
    (tmp_path / "test_unreadable.py").write_text("import no_such_module\n")
    report = tmp_path / "junit.xml"
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}"]
    command += ["--continue-on-collection-errors", "."]
    subprocess.run(command, cwd=tmp_path, capture_output=True)
    assert suite.count_tests(report) == {"passed": 1, "failed": 4, "skipped": 1}


def test_a_missing_or_broken_report_counts_nothing(tmp_path):
    nothing = {"passed": 0, "failed": 0, "skipped": 0}
    assert suite.count_tests(tmp_path / "none.xml") == nothing
    (tmp_path / "half.xml").write_text("<testsuites><testsuite>")
    assert suite.count_tests(tmp_path / "half.xml") == nothing


def test_the_seconds_of_a_file_are_those_of_its_tests_and_classes(tmp_path):
    (tmp_path / "junit.xml").write_text(
        '<testsuites><testsuite><testcase classname="tests.fit.test_a" name="x" time="1.5"/>'
        '<testcase classname="tests.fit.test_a.TestB" name="y" time="2"/>'
        '<testcase classname="tests.test_c" name="z" time="0.5"/></testsuite></testsuites>'
    )
    seconds = suite.seconds_of(tmp_path / "junit.xml")
    assert seconds == {"tests/fit/test_a.py": 3.5, "tests/test_c.py": 0.5}


class Folder(NamedTuple):
    """A folder of tests that run.py is told to run in place of its own."""

    path: Path
    host_dir: Path

    def write(self, **texts: str) -> None:
        for name, text in texts.items():
            (self.path / f"{name}.py").write_text(text)

    def run(self, *hosts: str, workers: int = 0) -> int:
        named = [option for host in hosts for option in ("--host", host)]
        pytest_options = ["-p", "no:cacheprovider", f"-n{workers}"]
        return run.main(["test", *named, "--", str(self.path), *pytest_options])


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Folder:
    """Nothing is downloaded or installed, and the checks are quick; the rest is as it is."""
    host_dir = tmp_path / "host"
    host_dir.mkdir()
    for name in ("main.py", "requirements.txt"):
        (host_dir / name).touch()
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setattr(environment, "make_venv", lambda env: Path(sys.executable))
    monkeypatch.setattr(environment, "python_of", lambda env: Path(sys.executable))
    monkeypatch.setattr(environment, "fetch_host", lambda python, version: host_dir)
    monkeypatch.setattr(environment, "install", lambda *args, **options: False)
    monkeypatch.setattr(browser, "find_chromium", lambda python: None)
    monkeypatch.setattr(suite, "CHECKS", (["py_compile", "host/main.py"],))
    (tmp_path / "suite").mkdir()
    return Folder(tmp_path / "suite", host_dir)


@pytest.mark.parametrize(
    ("tests", "code", "counted"),
    [
        ({"test_a": PASSES}, 0, "2 passed, 0 failed, 0 skipped"),
        ({"test_a": PASSES + FAILS}, 1, "2 passed, 1 failed, 0 skipped"),
        ({"test_a": PASSES, "test_b": "import nowhere"}, 1, "1 passed, 1 failed, 0 skipped"),
        ({"conftest": "import os; os._exit(3)"}, 1, "1 passed, 1 failed, 0 skipped"),
        (
            {"test_a": "def test_dies():\n import os; os.abort()"},
            1,
            "1 passed, 1 failed, 0 skipped",
        ),
        ({}, 1, "1 passed, 1 failed, 0 skipped"),
    ],
    ids=["passes", "fails", "no import", "ends early", "crash", "no test at all"],
)
def test_the_exit_code_says_whether_a_test_failed(folder, capfd, tests, code, counted):
    folder.write(**tests)
    assert folder.run("0.30.0") == code
    assert capfd.readouterr().out.splitlines()[-1] == counted


@pytest.mark.slow
def test_a_failure_on_one_host_or_in_a_check_is_a_failure_of_all(folder, capfd):
    folder.write(test_a="import os\ndef test_once(): os.mkdir('once')\n")
    assert folder.run("0.30.0", "0.16.3") == 1, "the second host's fails"
    printed = capfd.readouterr().out
    assert printed.splitlines()[-1] == "2 passed, 1 failed, 0 skipped"
    assert re.search(r"^ +\d+ s  Tests on ComfyUI 0\.16\.3$", printed, re.M)
    assert re.search(r"^ +\d+ s  \S*test_a\.py on 0\.30\.0$", printed, re.M)

    folder.write(test_a=PASSES)
    (folder.host_dir / "main.py").write_text("def")
    assert folder.run("0.30.0") == 1
    assert capfd.readouterr().out.splitlines()[-1] == "1 passed, 1 failed, 0 skipped"


def test_a_comfyui_of_ones_own_comes_first_or_alone(folder, capfd, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    command = ["test", "--comfyui", str(own), "--", str(folder.path), "-n0"]
    asked = f"os.environ['ZIMAGE_HOST_DIR'] == {str(own)!r}"
    folder.write(test_a=f"import os\ndef test_host(): assert {asked}\n")
    assert run.main(command) == 1
    printed = capfd.readouterr()
    assert printed.err == f"run.py: {own} is not a ComfyUI folder: it has no main.py\n"
    assert printed.out == "", "before anything is made"
    for name in ("main.py", "requirements.txt"):
        (own / name).touch()
    assert run.main(command) == 0
    printed = capfd.readouterr().out
    assert printed.splitlines()[-1] == "2 passed, 0 failed, 0 skipped"
    assert re.findall(r"Tests on ComfyUI (\S+) \(", printed) == [str(own)]


@pytest.mark.slow
def test_several_workers_count_as_one_does_and_one_that_dies_has_failed(folder, capfd):
    dies = "import os\ndef test_dies(): os._exit(0)\n"
    skips = "import pytest\n@pytest.mark.skip\ndef test_skipped(): pass\n"
    folder.write(test_a=PASSES + FAILS, test_b=skips + dies + PASSES)
    assert folder.run("0.30.0", workers=2) == 1
    assert capfd.readouterr().out.splitlines()[-1] == "2 passed, 3 failed, 1 skipped"


@pytest.mark.parametrize(
    ("cores", "pages", "wanted"), [(2, 6, 2), (8, 6, 4), (8, 4, 2), (1, 6, 1), (8, 0.5, 1)]
)
def test_as_many_workers_as_cores_and_memory_allow(monkeypatch, cores, pages, wanted):
    sizes = {"SC_PAGE_SIZE": 4 * 2**30, "SC_PHYS_PAGES": pages}
    monkeypatch.setattr(suite.os, "sched_getaffinity", lambda pid: range(cores), raising=False)
    monkeypatch.setattr(suite.os, "sysconf", sizes.__getitem__, raising=False)
    assert suite.workers() == wanted


@pytest.mark.slow
def test_quick_leaves_out_servers_and_slow_tests_and_takes_the_newest_host(folder, capfd):
    slow = "import pytest\n@pytest.mark.slow\ndef test_slow(): assert 0\n"
    for name, text in (("host/test_a", slow + PASSES), ("e2e/test_b", FAILS)):
        path = environment.ROOT / "tests" / f"{name}.py"
        path.parent.mkdir(parents=True)
        path.write_text(text)
    assert run.main(["test", "--quick", "--", "-n0", "-p", "no:cacheprovider"]) == 0
    printed = capfd.readouterr().out
    assert printed.splitlines()[-1] == "2 passed, 0 failed, 0 skipped"
    assert re.findall(r"Tests on ComfyUI (\S+) \(", printed) == [setup.DEFAULT_HOST]
    assert run.main(["test", "--", "-n0", "-p", "no:cacheprovider"]) == 1, "the slow ones fail"
