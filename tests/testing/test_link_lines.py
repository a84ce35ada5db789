"""The links of the example workflows are easy to follow."""

from __future__ import annotations

import copy

import pytest
from pack.testing.example_workflows import NAMES, read
from pack.testing.link_lines import Faults, faults


@pytest.mark.parametrize("name", NAMES)
def test_links_run_to_the_right_and_pass_no_node_and_no_title(name: str) -> None:
    assert faults(read(name)) == Faults(behind=[], backwards=[], titles=[])


def test_a_link_behind_a_node_is_told() -> None:
    workflow = copy.deepcopy(read("z_image_turbo"))
    nodes = {node["id"]: node for node in workflow["nodes"]}
    loader, prompt, sampler, decode = 1, 2, 5, 6
    nodes[prompt]["pos"] = [nodes[prompt]["pos"][0], nodes[loader]["pos"][1]]
    assert (1, prompt) in faults(workflow).behind, "the model's link"
    nodes[decode]["pos"] = [nodes[sampler]["pos"][0], nodes[sampler]["pos"][1] + 400]
    assert [link for link in workflow["links"] if link[0] in faults(workflow).backwards] == [
        link for link in workflow["links"] if link[1] == sampler
    ]


def test_a_link_through_a_groups_title_is_told() -> None:
    workflow = copy.deepcopy(read("z_image_turbo"))
    nodes = {node["id"]: node for node in workflow["nodes"]}
    decode, vae_link = 6, 3
    (prompt,) = (group for group in workflow["groups"] if group["title"] == "2. Prompt")
    prompt["bounding"][1] = nodes[decode]["pos"][1] + 20
    assert (vae_link, "2. Prompt") in faults(workflow).titles
