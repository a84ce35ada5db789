"""Makes the repo importable as the package `pack`, and puts the longest tests first.

Without its entry point or sys.path: the host has a top-level module named `nodes` of its own, so
the repo root never goes on sys.path.
"""

import sys
import types
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent

if "pack" not in sys.modules:
    pack = types.ModuleType("pack")
    pack.__path__ = [str(REPO)]
    sys.modules["pack"] = pack

# With several workers the files that take longest begin first, else all wait for the last one.
LONGEST = ("tests/benchmarks/test_card_rehearsal", "tests/e2e/", "tests/benchmarks/", "tests/host/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: [not item.nodeid.startswith(place) for place in LONGEST])
