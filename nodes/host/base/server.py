"""The host's server: pages that wait, our routes, and what a node says while it runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from server import PromptServer

logger = logging.getLogger(__name__)


def waiting_pages(followers: Iterable[str] = ()) -> list[str]:
    """Names of the page that asked for the running prompt and of those that follow it.

    Empty without a server. A page without a name is left out: the host would send to every page.
    """
    server = _host_server()
    if server is None:
        return []
    return [name for name in dict.fromkeys([server.client_id, *followers]) if name is not None]


def add_route(method: str, path: str, handler: Callable[[Any], Any]) -> None:
    """Adds a route, answered by an async function, before the server begins to listen.

    Does nothing without a server.
    """
    server = _host_server()
    if server is None:
        return
    # A second copy of the pack must not keep the host from starting: it takes no path twice.
    if all(getattr(route, "path", None) != path for route in server.routes):
        server.routes.route(method, path)(handler)


def show_text(node_id: str | None, text: str) -> None:
    """Shows a line on the node; nothing where there is no node, or no page that waits for it.

    Older pages (of ComfyUI 0.16.3) take it for HTML. Names of files are in it, which come with a
    workflow from anywhere, so no tag gets there.
    """
    text = text.replace("<", "\u2039").replace(">", "\u203a")
    for page in waiting_pages() if node_id is not None else ():
        _host_server().send_progress_text(text, node_id, page)


class NodeLog:
    """What one node says, in the log and on the node.

    Args:
        name: of the node, as users know it; begins each line of the log.
        node_id: None where nothing is shown.
    """

    def __init__(self, name: str, node_id: str | None) -> None:
        self._name, self._node_id = name, node_id
        self._lines: dict[str, str] = {}

    def say(self, text: str, level: int = logging.INFO) -> None:
        """Logs the text, and shows it instead of what the node showed before."""
        logger.log(level, "%s: %s", self._name, text)
        show_text(self._node_id, text)

    def say_once(self, kind: str, line: str | Callable[[], str], level: int = logging.INFO) -> None:
        """Logs the line and adds it to the node's text, unless that kind was said before."""
        # A compiled graph is not broken for a line of text.
        if torch.compiler.is_compiling() or kind in self._lines:
            return
        self._lines[kind] = line if isinstance(line, str) else line()
        logger.log(level, "%s: %s", self._name, self._lines[kind])
        show_text(self._node_id, "\n".join(self._lines.values()))


def _host_server() -> Any:
    """None where ComfyUI runs without one."""
    return getattr(PromptServer, "instance", None)
