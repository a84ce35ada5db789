"""The versions that the documents name are those that the pack asks for and is tested with.

What each rule refuses is shown at the end.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath

import pytest
from pack import run
from pack.runner.environment import HOSTS, TORCH
from pack.runner.setup import DEFAULT_HOST, OLDEST_HOST
from pack.tests.architecture_rules import documents, read
from pack.tests.benchmarks.figure_rules import without_tables

TEXTS = documents()
TORCH_VERSION = TORCH[0].removeprefix("torch==")
FIRST, LAST = (".".join(map(str, version)) for version in run.PYTHONS)
# What is said of a version, in both languages, and the version of which that is true.
SAID = {
    r"(\d+\.\d+\.\d+) (?:or newer|或更新)": OLDEST_HOST,
    r"(\d+\.\d+\.\d+) (?:in full|全部)": DEFAULT_HOST,
    r"(\d+\.\d+\.\d+) (?:in part|部分)": OLDEST_HOST,
    r"torch (\d+\.\d+\.\d+)": TORCH_VERSION,
    r"Python (\d+\.\d+)": FIRST,
    r"Python \d+\.\d+ (?:to|到) (\d+\.\d+)": LAST,
}
OTHERS = {"0.2.0": "an example of a release", "0.2.40": "comfy-kitchen"}


def wrong_versions(markdown: str) -> list[str]:
    """Versions that a text has and that are not the ones of which that is true."""
    text = without_tables(markdown)
    wrong = [
        found[0]
        for pattern, version in SAID.items()
        for found in re.finditer(pattern, text)
        if found[1] != version
    ]
    named = re.findall(r"(?<![\d.])\d+\.\d+\.\d+(?!\.?\d)", text)
    return wrong + [v for v in named if v not in {*HOSTS, *OTHERS, TORCH_VERSION}]


@pytest.mark.parametrize("name", TEXTS)
def test_versions_in_texts_are_true(name):
    assert wrong_versions(TEXTS[name]) == []


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_a_readme_says_which_versions_it_needs(name):
    assert [pattern for pattern in SAID if not re.search(pattern, TEXTS[name])] == []


def test_the_project_asks_for_the_python_that_run_py_asks_for():
    project = read(PurePosixPath("pyproject.toml"))
    assert f'requires-python = ">={FIRST}"' in project
    assert f'requires-comfyui = ">={OLDEST_HOST}"' in project


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("ComfyUI, 0.16.3 or newer. Python 3.10 to 3.14, torch 2.11.0", []),
        ("ComfyUI, 0.30.0 or newer.", ["0.30.0 or newer"]),
        ("需要 ComfyUI 0.30.0 或更新。", ["0.30.0 或更新"]),
        ("ComfyUI 0.17.1 is enough.", ["0.17.1"]),
        ("Python 3.9 to 3.14", ["Python 3.9"]),
        ("Python 3.10 到 3.13", ["Python 3.10 到 3.13"]),
        ("0.16.3 in full, 0.30.0 部分", ["0.16.3 in full", "0.30.0 部分"]),
        ("torch 2.12.0", ["torch 2.12.0", "2.12.0"]),
    ],
)
def test_a_wrong_version_is_seen(text, wrong):
    assert wrong_versions(text) == wrong
