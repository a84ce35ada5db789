"""A node's text reaches the page that asked for the prompt, and no other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from pack.testing.probe_prompts import CLIENT, Bench, bench

pytestmark = pytest.mark.usefixtures("host")
TEXT = b"\x00\x00\x00\x0212a line"  # the length of the node's id, the id and the text


@pytest.fixture
def prompts(host: Any) -> Iterator[Bench]:
    with bench(host) as made:
        yield made


def sent(prompts: Bench, *, client: str | None) -> list[tuple[Any, str | None]]:
    from pack.nodes.host.base import server
    from protocol import BinaryEventTypes

    prompts.server.client_id = client
    server.show_text("12", "a line")
    server.show_text(None, "a line of no node")
    return prompts.sent(BinaryEventTypes.TEXT)


def test_the_page_that_asked_gets_the_text(prompts):
    assert sent(prompts, client=CLIENT) == [(TEXT, CLIENT)]


def test_a_prompt_without_a_page_shows_its_text_on_no_other_page(prompts):
    """Bug: without a receiver's name the host sent it to every open page."""
    assert sent(prompts, client=None) == []
