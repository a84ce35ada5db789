"""Sends a probe's record to the page that asked for the prompt, and to no other."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from comfy_execution.progress import get_progress_state
from comfy_execution.utils import get_executing_context

from ..base import server

EVENT = "z_image_low_vram.probe"
# With the node's own event, which goes out at once, below ten in any second.
EVENTS_PER_SECOND = 8


class Place(NamedTuple):
    """The running prompt, and the node as the page knows it."""

    prompt_id: str
    node_id: str | None


def place_of(node_id: str | None) -> Place:
    """Where a node stands in the prompt that runs now; its prompt is "" outside of any."""
    context = get_executing_context()
    registry = get_progress_state()
    prompt_id = context.prompt_id if context is not None else registry.prompt_id
    if node_id is None:
        return Place(prompt_id, None)
    return Place(prompt_id, registry.dynprompt.get_display_node_id(node_id))


def send(place: Place, record: dict[str, Any]) -> None:
    """Sends a snapshot; nothing without a node, or a page that waits for the prompt."""
    _send(server.waiting_page(), place, record)


class Outlet:
    """Sends what one probe sees in all its samplings, at a pace; the newest always goes out.

    What comes too soon waits on the server's loop until it is due or a newer one takes its place.
    So the last one reaches the page also where no node runs behind the sampling, or one fails.

    Args:
        pace: says when the next may go out.
    """

    def __init__(self, pace: Any) -> None:
        self._pace = pace
        self._waiting: Callable[[], None] | None = None
        self._place: Place | None = None  # of what waits
        self._is_timed = False
        self._lock = threading.Lock()  # the loop and the prompts run in threads of their own

    def is_open(self) -> bool:
        """True if a snapshot would go out at once."""
        return self._pace.wait_s() == 0

    def send(self, place: Place, record: dict[str, Any]) -> None:
        """Sends a snapshot now or when it is due, to the page that waits for the prompt now."""
        to = server.waiting_page()
        with self._lock:
            if self._waiting is not None and self._place != place:
                self._waiting()  # the last of an earlier prompt, which nothing newer replaces
            self._waiting = None
            if self._pace.is_due():
                _send(to, place, record)
                return
            if to is None:
                return
            self._waiting, self._place = partial(_send, to, place, record), place
            if not self._is_timed:
                self._is_timed = True
                to.server.loop.call_soon_threadsafe(self._send_waiting, to.server.loop)

    def _send_waiting(self, loop: Any) -> None:
        """Runs on the loop, again and again until nothing waits."""
        with self._lock:
            if self._waiting is not None and not self._pace.is_due():
                loop.call_later(self._pace.wait_s(), self._send_waiting, loop)
                return
            self._is_timed = False
            if self._waiting is not None:
                self._waiting()
                self._waiting = None


def _send(to: server.Page | None, place: Place, record: dict[str, Any]) -> None:
    if to is None or place.node_id is None:
        return
    data = {"prompt_id": place.prompt_id, "node_id": place.node_id, "record": record}
    to.server.send_sync(EVENT, data, to.client_id)
