"""A route for the page: answers what a picture would need, by the formula alone."""

from __future__ import annotations

import comfy.model_management as management
from server import web

from ...fit import planner
from . import budget

UI_KEY = "z_image_fit"


async def answer(request: web.Request) -> web.Response:
    """The plan as JSON; status 400 and one sentence for a question that cannot be answered."""
    device = management.get_torch_device()
    room, margin = budget.room_bytes(device), budget.margin_bytes()
    try:
        asked = await request.json()
        made = planner.answer(asked, room, margin, card_bytes=budget.card_bytes(device))
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        return web.json_response({"error": str(error)}, status=400)
    return web.json_response(made)
