"""`python run.py check`: real ruff on a made-up folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from pack import run
from pack.runner import environment, suite


@pytest.mark.parametrize(("source", "code"), [("X = 1\n", 0), ("import os\n", 1), ("X  =  1\n", 1)])
def test_check_fails_where_one_of_its_tools_finds_something(source, code, tmp_path, monkeypatch):
    (tmp_path / "x.py").write_text(source)
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setattr(suite, "prepare", lambda steps, with_tools: Path(sys.executable))
    # pyright, the last, needs seconds for each folder; the tests run it on the whole project.
    monkeypatch.setattr(suite, "CHECKS", suite.CHECKS[:2])
    options, rest = run.parse(["check"])
    assert options.run(options, rest) == code
