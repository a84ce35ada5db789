"""A probe's events: how many, to whom, and that the last one comes."""

from __future__ import annotations

import asyncio
import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from pack.testing.probe_prompts import (
    CLIENT,
    probe,
    sampler,
    sampling,
    shelf,
    source,
)

pytestmark = pytest.mark.usefixtures("host")
SAMPLINGS = 30


def test_many_short_samplings_behind_one_probe_send_at_most_ten_events_in_any_second(
    prompts, loaded, clock
):
    """Bug: each sampling had a pace of its own, and sent two events at the least."""
    prompt = sampling(loaded, detail="totals", steps=1)
    for index in range(1, SAMPLINGS):
        prompt[f"sampler {index}"] = sampler(["probe", 0], steps=1, seed=index)
        before = f"sampler {index - 1}" if index > 1 else "sampler"
        prompt[f"sampler {index}"]["inputs"]["latent_image"] = [before, 0]
    prompt["shown"]["inputs"]["source"] = [f"sampler {SAMPLINGS - 1}", 0]
    record = prompts.record(prompt, "probe")
    assert any(f"sampled {SAMPLINGS} times" in note for note in record["notes"])
    clock.now += 1
    # The first event belongs to the node itself, in front of the samplings.
    records = [data["record"] for data, _ in prompts.sent()][1:]
    times = [0.0, *(seen["timeline"][-1][0] for seen in records)]
    assert len(times) > 2
    for first in times:
        assert len([t for t in times if first <= t < first + 1]) <= 10
    assert records[-1] == record, "the last one comes, though it was too soon"


def test_a_sampling_that_ends_too_soon_is_shown_as_ended_where_the_next_node_fails(prompts, loaded):
    def fail() -> None:
        raise RuntimeError("behind the sampling")

    prompt = sampling(loaded, detail="totals", steps=1)
    shelf(fails=fail)
    prompt["fails"] = {**source("fails"), "inputs": {"name": "fails", "turn": ["sampler", 0]}}
    prompt["shown"]["inputs"]["source"] = ["fails", 0]
    prompts.run(prompt)
    assert prompts.error is not None
    assert prompts.sent()[-1][0]["record"]["state"] == "done"


def test_what_waits_goes_to_the_page_of_its_own_prompt(prompts, loaded):
    """The probe itself comes from the host's cache, with what it has not yet sent."""
    names = {}
    for seed, client in enumerate((CLIENT, "another-page", None)):
        prompts.run(sampling(loaded, detail="totals", steps=1, seed=seed), client=client)
        names[prompts.prompt_id] = client
    sent = prompts.sent()
    assert {receiver for _, receiver in sent} == {CLIENT, "another-page"}
    assert all(names[data["prompt_id"]] == receiver for data, receiver in sent)
    for client in (CLIENT, "another-page"):
        states = [data["record"]["state"] for data, receiver in sent if receiver == client]
        assert states[-1] == "done"


def test_each_record_that_comes_too_soon_goes_out_when_it_is_due(prompts):
    from pack.nodes.host.probe import events

    events.follow("a-page", "a prompt", ["a-page"])
    sender, place = events.Sender(), events.Place("a prompt", "1")
    for turn in range(3):
        for part in ("at once", "soon"):
            sender.send(place, {"told": f"{part} {turn}"})
        assert [data["record"]["told"] for data, _ in prompts.sent()][-1] == f"soon {turn}"


def asked(prompt_id: str, client: str | None) -> dict[str, Any]:
    """The answer to a page that asks for a prompt's records."""
    from aiohttp.test_utils import make_mocked_request
    from pack.nodes.host.probe import route

    query = "" if client is None else f"?clientId={client}"
    request = make_mocked_request("GET", f"/{query}", match_info={"prompt_id": prompt_id})
    with ThreadPoolExecutor(1) as server:  # whose loop has a thread of its own
        return json.loads(server.submit(asyncio.run, route.answer(request)).result().text)


@pytest.mark.parametrize("queued_by", [CLIENT, None])
def test_a_page_that_asks_gets_what_was_seen_and_the_events_from_then_on(
    prompts, loaded, queued_by
):
    """A tab opened in mid-run; it asks before the sampling, and is told of no other prompt."""
    answers: list[dict[str, Any]] = []

    def ask() -> int:
        prompts.server.sockets["late-page"] = None
        answers.append(asked(prompts.prompt_id, "late-page"))
        return 0

    prompt = sampling(loaded, detail="totals", steps=1)
    shelf(asks=ask)
    prompt["first"] = probe(label="first")
    prompt["asks"] = {**source("asks"), "inputs": {"name": "asks", "turn": ["first", 0]}}
    prompt["sampler"]["inputs"]["seed"] = ["asks", 0]
    prompts.run(prompt, client=queued_by)
    assert prompts.error is None
    records = [data["record"] for data, receiver in prompts.sent() if receiver == "late-page"]
    assert answers[0]["first"]["label"] == "first"
    assert records[-1]["state"] == "done"
    assert records[-1]["label"] == "sample"
    assert asked("another prompt", None) == {}
    prompts.run(sampling(loaded, detail="totals", steps=1, seed=4), client=queued_by)
    assert "late-page" not in {receiver for _, receiver in prompts.sent()}


def test_a_page_that_was_closed_gets_no_more_once_another_page_asks(prompts):
    from pack.nodes.host.probe import events

    events.follow("closed-page", "a prompt", ["closed-page"])
    events.follow("open-page", "a prompt", ["open-page"])
    events.send(events.Place("a prompt", "1"), {})
    receivers = {receiver for _, receiver in prompts.sent()}
    assert receivers - {CLIENT, None} == {"open-page"}


def test_the_page_that_asked_for_the_prompt_gets_each_event_once(prompts, loaded):
    def ask() -> int:
        asked(prompts.prompt_id, CLIENT)
        return 5

    prompt = sampling(loaded, detail="totals", steps=1)
    shelf(again=ask)
    prompt["again"] = source("again")
    prompt["sampler"]["inputs"]["seed"] = ["again", 0]
    prompts.run(prompt)
    sent = [data["record"] for data, _ in prompts.sent()]
    assert len(sent) > 1
    assert all(one != other for one, other in itertools.pairwise(sent))
