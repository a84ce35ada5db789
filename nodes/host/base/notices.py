"""Text and progress on a node while it runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import comfy.model_management
import comfy.utils

from . import page

T = TypeVar("T")


def show_text(node_id: str | None, text: str) -> None:
    """Shows a line on the node; nothing where there is no node, or no page that waits for it."""
    to = page.waiting()
    if to is not None and node_id is not None:
        to.server.send_progress_text(text, node_id, to.client_id)


def with_progress(steps: Sequence[T]) -> Iterator[T]:
    """Yields the steps; moves the node's progress bar after each and ends when the user cancels."""
    bar = comfy.utils.ProgressBar(len(steps))
    for step in steps:
        comfy.model_management.throw_exception_if_processing_interrupted()
        yield step
        bar.update(1)
