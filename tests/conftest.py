"""Makes the repo importable as the package `pack`, and spreads the tests over the workers.

Without its entry point or sys.path: the host has a top-level module named `nodes` of its own, so
the repo root never goes on sys.path.
"""

import gc
import sys
import types
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).resolve().parent.parent

if "pack" not in sys.modules:
    pack = types.ModuleType("pack")
    pack.__path__ = [str(REPO)]
    sys.modules["pack"] = pack

# By default Python looks for garbage so often that tests beside a host take a sixth longer.
gc.set_threshold(100_000)

E2E = "tests/e2e/"
# With several workers the files that take longest begin first, else all wait for the last one.
LONGEST = ("tests/benchmarks/test_card_rehearsal", E2E, "tests/benchmarks/", "tests/host/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: [not item.nodeid.startswith(place) for place in LONGEST])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """By file, and all of e2e by one worker: a second one would start the same server again."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return E2E if nodeid.startswith(E2E) else super()._split_scope(nodeid)

    return Scheduling(config, log)
