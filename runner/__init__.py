"""What run.py is made of: environment, ComfyUI versions, model files, live server, demo.

Makes the repo importable as the package `pack`, as tests/conftest.py does. The repo's root does not
lead on sys.path there, because ComfyUI has a top-level module `nodes` of its own.
"""

import sys
import types
from pathlib import Path

if "pack" not in sys.modules:
    pack = types.ModuleType("pack")
    pack.__path__ = [str(Path(__file__).resolve().parent.parent)]
    sys.modules["pack"] = pack
