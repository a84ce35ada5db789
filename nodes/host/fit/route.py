"""A route that answers the page's question what a picture would need, by the formula alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import comfy.model_management as management
from server import web

from ..base import server
from . import budget

UI_KEY = "z_image_fit"

AnswerFn = Callable[[Mapping[str, Any], int | None], dict[str, Any]]


def add(answer: AnswerFn) -> None:
    """Adds the route to the host's server.

    Args:
        answer: the plan for a question, and the room on the host's main device; raises ValueError
            or TypeError for a bad question.
    """

    async def fit(request: web.Request) -> web.Response:
        try:
            asked = await request.json()
            device = management.get_torch_device()
            made = answer(asked, budget.room_bytes(device))
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            return web.json_response({"error": str(error)}, status=400)
        return web.json_response({**made, "card_bytes": budget.card_bytes(device)})

    server.add_route("POST", "/z_image_low_vram/fit", fit)
