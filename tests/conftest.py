"""Makes the repo importable as the package `pack`, without its entry point or sys.path.

The host has a top-level module named `nodes` of its own, so the repo root never goes on sys.path.
"""

import sys
import types
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent

if "pack" not in sys.modules:
    pack = types.ModuleType("pack")
    pack.__path__ = [str(REPO)]
    sys.modules["pack"] = pack
