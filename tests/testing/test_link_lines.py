"""The links of the example workflows are easy to follow."""

from __future__ import annotations

import copy

import pytest
from pack.testing.example_workflows import NAMES, read
from pack.testing.link_lines import faults

# The decode stands below its sampler: a column more would not fit beside the three probes.
BACKWARDS = {"z_image_turbo_probes": 1}


@pytest.mark.parametrize("name", NAMES)
def test_links_run_to_the_right_and_pass_no_node(name: str) -> None:
    found = faults(read(name))
    assert found.behind == []
    assert len(found.backwards) <= BACKWARDS.get(name, 0)


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
