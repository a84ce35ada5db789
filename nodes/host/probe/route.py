"""Answers a page that did not queue the running prompt: what its probes have seen so far.

Events go to the page that queued a prompt and to no other, so that a tab opened in mid-run hears
none of them. It may ask instead, as it may ask the host for its queue and its history.
"""

from __future__ import annotations

from typing import Any

from server import web

from ..base import server
from . import prompt as probe_prompt


def add() -> None:
    """Adds the route to the host's server."""
    server.add_route("GET", "/z_image_low_vram/probes/{prompt_id}", answer)


async def answer(request: Any) -> Any:
    """Records by the node's id; none of a prompt that does not run."""
    return web.json_response(probe_prompt.live_records(request.match_info["prompt_id"]))
