"""What the tests of the probe share: the models, an executor with our nodes, and a clock."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pack.testing import probe_prompts
from pack.testing.probe_prompts import Bench, Clock, bench


@pytest.fixture(scope="session")
def loaded(host: Any, small_folder: Path) -> Any:
    return probe_prompts.models(host)


@pytest.fixture
def prompts(host: Any) -> Iterator[Bench]:
    with bench(host) as made:
        yield made


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return probe_prompts.clocked(monkeypatch)
