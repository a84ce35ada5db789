"""Lets a page follow a prompt that it did not queue.

Events go to the page that queued a prompt, so a tab opened in mid-run hears none of them. It asks
once, with its name: the answer is what the prompt's probes saw so far, and the events follow.
"""

from __future__ import annotations

from typing import Any

from server import PromptServer, web

from .events import follow
from .prompt import live_records


async def answer(request: Any) -> Any:
    """Records by the node's id; none of a prompt that does not run."""
    prompt_id = request.match_info["prompt_id"]
    if client_id := request.query.get("clientId"):
        follow(client_id, prompt_id, PromptServer.instance.sockets)
    return web.json_response(live_records(prompt_id))
