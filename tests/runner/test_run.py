"""The commands of run.py: options, counts, interruption. Nothing is downloaded."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pack import run
from pack.runner import browser, environment, setup

REPO = Path(run.__file__).resolve().parent
posix_only = pytest.mark.skipif(os.name == "nt", reason="POSIX signals and scripts")


@pytest.fixture(autouse=True)
def _no_downloads(tmp_path, monkeypatch):
    """Whatever a command asks pip for is not to be had, and nothing of this checkout is touched."""
    monkeypatch.setattr(environment, "VENV", tmp_path / "env")
    monkeypatch.setattr(environment, "HOSTS_DIR", tmp_path / "hosts")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)


def test_oldest_host_is_the_one_that_the_pack_requires():
    text = (REPO / "pyproject.toml").read_text()
    assert re.findall(r'^requires-comfyui = ">=(.*)"$', text, re.M) == [setup.OLDEST_HOST]


def test_hosts_are_listed_from_oldest_to_newest_and_the_default_is_among_them():
    versions = [tuple(map(int, version.split("."))) for version in environment.HOSTS]
    assert versions == sorted(versions)
    assert {setup.OLDEST_HOST, setup.DEFAULT_HOST} <= set(environment.HOSTS)


def test_installing_the_pack_asks_pip_for_nothing():
    text = (REPO / "pyproject.toml").read_text()
    assert "\ndependencies = []\n" in text


class TestCommandLine:
    def test_options_of_the_demo_reach_it(self):
        argv = ["demo", "--size", "512x768", "--seed", "3", "--prompt=--a fox", "--keep-open"]
        options, rest = run.parse(argv)
        assert options.size == (512, 768)
        wanted = {"--seed=3", "--prompt=--a fox", "--width=512", "--height=768", "--keep-open"}
        assert set(rest) == wanted

    def test_what_follows_two_dashes_is_for_pytest(self):
        options, rest = run.parse(["test", "--host", "0.30.0", "--", "-k", "loader", "--", "x"])
        assert (options.host, rest) == (["0.30.0"], ["-k", "loader", "--", "x"])

    @pytest.mark.parametrize("text", ["500", "512x", "x", "32", "512x8208", "-64"])
    def test_a_wrong_size_is_refused_before_anything_is_made(self, text, capsys):
        with pytest.raises(SystemExit):
            run.parse(["demo", f"--size={text}"])
        assert f"multiples of 16 from 64 to 8192, got {text}" in capsys.readouterr().err

    def test_an_unknown_host_is_refused_with_the_known_ones(self, capsys):
        with pytest.raises(SystemExit):
            run.parse(["test", "--host", "0.1.0"])
        assert "0.16.3" in capsys.readouterr().err

    def test_help_of_bench_lists_the_scripts_and_says_what_all_of_them_cost(self, capsys):
        with pytest.raises(SystemExit):
            run.parse(["bench", "--help"])
        told = capsys.readouterr().out
        scripts = {path.stem for path in (REPO / "benchmarks").glob("*.py")}
        listed = scripts - {"__init__", "documents", "rows", "vae_measures", "vae_ways"}
        assert {"vae_peak", "denoiser_peak"} <= listed
        assert set(re.findall(r"\w+", told.split("one script of:")[1])) >= listed
        assert "hours" in told and "__init__" not in told

    def test_an_unfit_python_gets_one_sentence(self, monkeypatch, capsys):
        monkeypatch.setattr(run, "PYTHONS", ((3, 98), (3, 99)))
        assert run.main(["test"]) == 1
        assert re.fullmatch(
            r"run\.py needs Python .* this is 3\.\d+: .*\n", capsys.readouterr().out
        )

    @pytest.mark.slow
    def test_expected_failures_end_with_one_line_and_no_traceback(self, tmp_path, capfd):
        # No ComfyUI in that folder, and before that no index to fetch the default host from.
        assert run.main(["demo", "--comfyui", str(tmp_path)]) == 1
        assert capfd.readouterr().err.startswith("run.py: ")


def test_a_comfyui_folder_that_is_none_is_named(tmp_path):
    (tmp_path / "hosts" / setup.DEFAULT_HOST / "ComfyUI").mkdir(parents=True)
    with pytest.raises(
        environment.SetupError, match=r"is not a ComfyUI folder: it has no main\.py"
    ):
        setup.choose_host(setup.DEFAULT_HOST, tmp_path)


@posix_only
def test_ctrl_c_ends_the_child_before_the_command(tmp_path):
    """The child ignores the first request, as a server does that is still starting."""
    child = "import os, signal, sys, time; signal.signal(2, signal.SIG_IGN)\n"
    child += f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    parent = (
        "import signal, sys; from runner import environment as e\n"
        # A shell's background job, as CI may be, inherits an ignored SIGINT.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"e.STOP_S = 1\nsys.exit(e.call([sys.executable, '-c', {child!r}]))"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=REPO, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) != 0
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@posix_only
def test_a_browser_that_does_not_start_is_passed_over(tmp_path, monkeypatch):
    for name, code in (("chromium", 1), ("google-chrome", 0)):
        (tmp_path / name).write_text(f"#!/bin/sh\nexit {code}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(browser, "CHROMIUM_PLACES", ())
    assert browser.installed_chromium() == str(tmp_path / "google-chrome")


@posix_only
def test_the_ci_script_finds_a_python_and_runs_the_tests_of_run_py():
    result = subprocess.run([REPO / ".ci" / "run", "--help"], capture_output=True, text=True)
    assert result.returncode == 0
    assert result.stdout.startswith("usage: run.py test")


def _plan(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-S", str(REPO / "run.py"), "plan", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_plan_needs_nothing_but_the_standard_library():
    made = _plan("--width", "2048", "--height", "2048", "--batch", "2", "--vram", "8")
    assert made.returncode == 0, made.stderr
    assert made.stdout.startswith(
        "2048x2048, batch 2, 256 text tokens, prefer balance; budget 8.00"
    )
    rows = re.findall(r"^\| (text encode|denoise|VAE \w+) ", made.stdout, re.M)
    assert rows == ["text encode", "denoise", "VAE decode"]
    encode = _plan("--img2img", "--prefer", "speed", "--weights", "fp8", "--copy-gbs", "12")
    assert "VAE encode" in encode.stdout and "Lean VAE speed" in encode.stdout


def test_plan_counts_reference_pictures():
    """Two as large as the picture: three times its tokens, and they are encoded first."""
    made, alone = (_plan("--vram=24", *options) for options in (["--references=2"], []))
    assert made.returncode == 0, made.stderr
    assert made.stdout.startswith("1024x1024, batch 1, 8192 reference tokens, 256 text tokens")
    rows = re.findall(r"^\| (text encode|denoise|VAE \w+) ", made.stdout, re.M)
    assert rows == ["text encode", "VAE encode", "denoise", "VAE decode"]
    needed = r"^\| denoise (?:[^|]*\|){4} ([\d.]+) MiB"  # activations
    many, few = (float(re.findall(needed, plan.stdout, re.M)[0]) for plan in (made, alone))
    assert 2.7 * few < many < 3 * few


@pytest.mark.parametrize(("layers", "gib"), [("3", "1.88"), ("6", "2.89"), ("15", "6.25")])
def test_plan_counts_a_controlnet(layers, gib):
    """Published sizes: 1.9, 3.1 and 6.71 GB."""
    made = _plan("--vram=24", "--controlnet", layers)
    assert made.returncode == 0, made.stderr
    assert f"ControlNet with {layers} control layers, bf16: {gib} GiB of the w" in made.stdout
    assert "prefer balance; with a ControlNet" in made.stdout
    weights = re.search(r"^\| denoise [^|]*\|[^|]*\| ([\d.]+) GiB", made.stdout, re.M)
    assert weights and float(weights[1]) == pytest.approx(11.46 + float(gib), abs=0.02)


def test_plan_says_what_would_fit_and_refuses_what_is_no_size():
    made = _plan("--width", "8192", "--height", "8192", "--vram", "2")
    assert made.returncode == 1 and "does not fit: " in made.stdout
    assert re.search(r"What would fit: \d+x\d+", made.stdout)
    for option, told in (
        ("--width=0", "whole number >= 1"),
        ("--vram=-1", "a number above 0"),
        ("--vram=1e300", "must be from 1e-09 to 1e+09, got 1e300"),
        ("--copy-gbs=1e300", "must be from 1e-09 to 1e+09, got 1e300"),
    ):
        bad = _plan(option)
        assert bad.returncode == 2 and told in bad.stderr and "Traceback" not in bad.stderr
    huge = _plan(f"--batch=1{400 * '0'}")
    assert huge.returncode == 1 and huge.stderr == "run.py: a number is too large to plan with\n"
    tiny = _plan("--width", "4")
    assert tiny.returncode == 1 and tiny.stderr == "run.py: width_px must be >= 8, got 4\n"


@posix_only
def test_plan_ends_quietly_when_its_reader_does():
    """`run.py plan | head -1` once ended with "run.py: Broken pipe: None"."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-S", str(REPO / "run.py"), "plan"]
    made = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, timeout=60)
    os.close(writer)
    assert (made.returncode, made.stderr) == (0, b"")


def test_plan_prints_the_denoise_row_of_another_family():
    made = _plan("--family", "wan", "--width=1280", "--height=720", "--frames=81")
    assert made.returncode == 0, made.stderr
    rows = re.findall(r"^\| (ComfyUI alone|speed|\*\*balance\*\*|smallest) \| ([\d.]+) GiB",
                      made.stdout, re.M)  # fmt: skip
    peaks = [float(gib) for _, gib in rows]
    assert len(peaks) == 4 and peaks == sorted(peaks, reverse=True)
    assert "Wan 2.1 14B, 1280x720, batch 1, 81 frames" in made.stdout
    for options, message in (
        (["--frames=9"], "frames must be 1 for Z-Image, got 9: name a --family"),
        (["--family", "flux1", "--frames=9"], "frames must be 1 for FLUX.1 dev, got 9"),
        *(
            (["--family", "flux1", option], "are planned for Z-Image alone: leave them out")
            for option in (
                "--img2img",
                "--controlnet",
                "--vram=8",
                "--weights=bf16",
                "--copy-gbs=25",
            )
        ),
    ):
        refused = _plan(*options)
        assert refused.returncode and message in refused.stderr + refused.stdout
