"""Sends a probe's record to the page that asked for the prompt, and to no other."""

from __future__ import annotations

from typing import Any, NamedTuple

from comfy_execution.progress import get_progress_state
from comfy_execution.utils import get_executing_context

from . import page

EVENT = "z_image_low_vram.probe"
# With the first and the last of a recording, which go out at once, below ten in any second.
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
    to = page.waiting()
    if to is None or place.node_id is None:
        return
    data = {"prompt_id": place.prompt_id, "node_id": place.node_id, "record": record}
    to.server.send_sync(EVENT, data, to.client_id)
