"""One sample's decode or encode, tried again in smaller pieces, and its progress."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import comfy.model_management
import comfy.utils
from torch.backends import cudnn

Plan = TypeVar("Plan")


def with_attempts(
    plan_of: Callable[[int], Plan | None], run: Callable[[Plan], None], say: Callable[[Plan], None]
) -> None:
    """Runs the plan that is left after 0 attempts, after 1, and so on, until one does not fail.

    Args:
        plan_of: gives the plan after so many ran out of memory; None: no smaller one.
        say: tells which plan is tried next.
    """
    plan = plan_of(0)
    for attempt in itertools.count(1):
        assert plan is not None  # the first attempt has one, and only such are tried again
        following = plan_of(attempt)
        try:
            with _without_benchmarks():
                run(plan)
            return
        except Exception as error:
            if following is None or not _is_oom(error):
                raise
        # Outside the except block: the error holds every tensor of the attempt.
        comfy.model_management.soft_empty_cache(True)
        plan = following
        say(plan)


@contextmanager
def _without_benchmarks() -> Iterator[None]:
    """Keeps cuDNN from timing its algorithms for each shape of strip, with `--fast autotune`."""
    was_on = cudnn.benchmark
    # Not by set_flags, which raises or resets what the user set for `fp32_precision`.
    cudnn.benchmark = False
    try:
        yield
    finally:
        cudnn.benchmark = was_on


class Progress:
    """Ends the work when the user cancels, and moves the running node's bar.

    On a card, strips are done when they are queued, as nothing waits for them. So the bar may reach
    its end while the card still works, and a cancel ends only what is not queued yet.

    Args:
        steps: how many there are; None shows no bar.
    """

    def __init__(self, steps: int | None) -> None:
        self._done, self._percent = 0.0, 0
        self._per_step = 100 / steps if steps else 0.0
        self._bar = comfy.utils.ProgressBar(100) if steps else None

    def __call__(self, share: float) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        self._done += share * self._per_step
        percent = min(100, round(self._done))
        if self._bar is not None and percent > self._percent:
            self._percent = percent
            self._bar.update_absolute(percent)


def _is_oom(error: Exception) -> bool:
    # Hosts before 0.20 name only the exception.
    is_oom = getattr(comfy.model_management, "is_oom", None)
    if is_oom is not None:
        return is_oom(error)
    return isinstance(error, comfy.model_management.OOM_EXCEPTION)
