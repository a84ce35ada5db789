"""Scripts that print the tables: `python run.py bench NAME`."""

import sys

if "pack" not in sys.modules:  # a script that runs by itself, from the repo's root
    import runner  # noqa: F401
