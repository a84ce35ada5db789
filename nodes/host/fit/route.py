"""A route for the page: answers what a picture would need, by the formula alone."""

from __future__ import annotations

import comfy.model_management as management
from server import web

from ...fit.answer import answer as answer_to
from ...words import Words, with_words
from . import budget
from .inputs import models_here

UI_KEY = "z_image_fit"


async def answer(request: web.Request) -> web.Response:
    """The plan as JSON; status 400 and one sentence for a question that cannot be answered."""
    device = management.get_torch_device()
    room, margin = budget.room_bytes(device), budget.margin_bytes()
    try:
        asked = await request.json()
        card = budget.card_bytes(device)
        made = answer_to(asked, room, margin, models=models_here(), card_bytes=card)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        told = next((given for given in error.args if isinstance(given, Words)), str(error))
        return web.json_response(with_words({"error": told}), status=400)
    return web.json_response(made)
