"""A route for the page: answers what a picture would need, by the formula alone."""

from __future__ import annotations

import comfy.model_management as management
from server import web

from ...fit.planner import answer
from ..base.server import add_route
from . import budget

UI_KEY = "z_image_fit"


def add() -> None:
    """Adds the route to the host's server."""
    add_route("POST", "/z_image_low_vram/fit", _fit)


async def _fit(request: web.Request) -> web.Response:
    device = management.get_torch_device()
    room, margin = budget.room_bytes(device), budget.margin_bytes()
    try:
        asked = await request.json()
        made = answer(asked, room, margin, card_bytes=budget.card_bytes(device))
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        return web.json_response({"error": str(error)}, status=400)
    return web.json_response(made)
