"""The process of one leg: `python -m benchmarks.card.child JOB`, with the job as JSON."""

from __future__ import annotations

import importlib
import sys
import traceback

from .job import from_json
from .rows import Recorder, error_text


def main(text: str) -> int:
    job = from_json(text)
    rows = Recorder(job)
    try:
        part = importlib.import_module(job.leg.module or f"benchmarks.card.parts.{job.leg.part}")
        part.run(job, rows)
    except Exception as error:
        traceback.print_exc()
        rows.write(job.leg.part, "error", error=error_text(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
