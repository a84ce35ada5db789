"""The page that waits for the running prompt, the only one that our messages are for."""

from __future__ import annotations

from typing import Any, NamedTuple

from server import PromptServer


class Page(NamedTuple):
    """The host's server, and the name by which it knows the page."""

    server: Any
    client_id: str


def waiting() -> Page | None:
    """The page that asked for the running prompt; None without a server or without such a page.

    Without a client's name the host would send to every open page.
    """
    server = getattr(PromptServer, "instance", None)
    if server is None or server.client_id is None:
        return None
    return Page(server, server.client_id)
