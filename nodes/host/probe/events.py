"""Sends a probe's record to the page that asked for the prompt, and to pages that follow it."""

from __future__ import annotations

import threading
from collections.abc import Container
from typing import Any, NamedTuple

from comfy_execution.progress import get_progress_state
from comfy_execution.utils import get_executing_context
from server import PromptServer

from ...probe.recorder import Pace
from ..base.server import waiting_pages

EVENT = "z_image_low_vram.probe"
# With the node's own event, which goes out at once, below ten in any second.
EVENTS_PER_SECOND = 8
# By a page's name: the prompt that it follows. A page that was closed goes with the next question.
_followed: dict[str, str] = {}


class Place(NamedTuple):
    """The running prompt, and the node as the page knows it."""

    prompt_id: str
    node_id: str | None


def place_of(node_id: str | None) -> Place:
    """The place of a node in the prompt that runs now; outside of any, the prompt is ""."""
    context = get_executing_context()
    registry = get_progress_state()
    prompt_id = context.prompt_id if context is not None else registry.prompt_id
    if node_id is None:
        return Place(prompt_id, None)
    return Place(prompt_id, registry.dynprompt.get_display_node_id(node_id))


def follow(client_id: str, prompt_id: str, open_pages: Container[str]) -> None:
    """From now on, a page that did not queue this prompt gets its events too."""
    for name in [name for name in _followed if name not in open_pages]:
        del _followed[name]
    _followed[client_id] = prompt_id


def send(place: Place, record: dict[str, Any]) -> None:
    """Sends a record; nothing without a node, or without a page that waits for the prompt."""
    _send(_pages(place), place, record)


class Sender:
    """Sends what one probe sees in all its samplings, at a pace; the newest always goes out.

    A record that comes too soon waits for its time on the server's loop, or until a newer one takes
    its place. So the last one reaches the page also if no node runs after the sampling, or one
    fails.
    """

    def __init__(self) -> None:
        self._pace = Pace(EVENTS_PER_SECOND)
        self._waiting: tuple[list[str], Place, dict[str, Any]] | None = None
        self._is_timed = False
        self._lock = threading.Lock()  # the loop and the prompts run in threads of their own

    def is_open(self) -> bool:
        """True if a record would go out at once."""
        return self._pace.wait_s() == 0

    def send(self, place: Place, record: dict[str, Any]) -> None:
        """Sends a record now or when it is due, to the pages that wait for the prompt now."""
        to = _pages(place)
        with self._lock:
            if self._waiting is not None and self._waiting[1] != place:
                _send(*self._waiting)  # the last of an earlier prompt: nothing newer replaces it
            self._waiting = None
            if self._pace.is_due():
                _send(to, place, record)
            elif to:
                self._waiting = to, place, record
                if not self._is_timed:
                    self._is_timed = True
                    loop = PromptServer.instance.loop
                    loop.call_soon_threadsafe(self._set_timer, loop)

    def _set_timer(self, loop: Any) -> None:
        loop.call_later(self._pace.wait_s(), self._send_waiting, loop)

    def _send_waiting(self, loop: Any) -> None:
        """Runs on the loop when the next record is due."""
        with self._lock:
            if self._waiting is not None and not self._pace.is_due():
                self._set_timer(loop)  # something newer went out since the timer was set
                return
            self._is_timed = False
            if self._waiting is not None:
                _send(*self._waiting)
                self._waiting = None


def _pages(place: Place) -> list[str]:
    followers = [name for name, prompt in list(_followed.items()) if prompt == place.prompt_id]
    return waiting_pages(followers)


def _send(to: list[str], place: Place, record: dict[str, Any]) -> None:
    if place.node_id is None:
        return
    data = {"prompt_id": place.prompt_id, "node_id": place.node_id, "record": record}
    for page in to:
        PromptServer.instance.send_sync(EVENT, data, page)
