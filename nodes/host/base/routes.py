"""Routes of ours on the host's server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from server import PromptServer


def add(method: str, path: str, handler: Callable[[Any], Any]) -> None:
    """Adds a route before the server begins to listen; nothing without a server.

    Args:
        method: GET or POST.
        path: as aiohttp writes it.
        handler: an async function of the request.
    """
    server = getattr(PromptServer, "instance", None)
    if server is None:
        return
    # A second copy of the pack must not keep the host from starting: it takes no path twice.
    if all(getattr(route, "path", None) != path for route in server.routes):
        server.routes.route(method, path)(handler)
