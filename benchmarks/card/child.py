"""The process of one leg: `python -m benchmarks.card.child JOB`, with the job as JSON."""

from __future__ import annotations

import faulthandler
import importlib
import math
import sys
import traceback

from .job import from_json
from .rows import Recorder, error_text

DUMP_S = 2.0  # before the process is ended


def main(text: str) -> int:
    job = from_json(text)
    rows = Recorder(job)
    faulthandler.enable()
    if math.isfinite(job.deadline):  # the log then says where it hung
        faulthandler.dump_traceback_later(max(1.0, job.seconds_left - DUMP_S))
    try:
        part = importlib.import_module(job.leg.module or f"benchmarks.card.parts.{job.leg.part}")
        part.run(job, rows)
    except Exception as error:
        traceback.print_exc()
        rows.write(job.leg.part, "error", error=error_text(error))
        return 1
    return 1 if rows.failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
