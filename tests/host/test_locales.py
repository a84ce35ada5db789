"""The Chinese texts name every node, input and output of the schemas, and nothing else."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from pack.runner.live_host import REPO

CHINESE = json.loads((REPO / "locales" / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def schemas(host) -> dict[str, Any]:
    from pack.nodes.extension import ZImageLowVRAM

    nodes = asyncio.run(ZImageLowVRAM().get_node_list())
    return {schema.node_id: schema for schema in (node.GET_SCHEMA() for node in nodes)}


def test_every_node(schemas):
    assert set(CHINESE) == set(schemas)
    for node_id in schemas:
        texts = {"display_name", "description", "inputs", "outputs"}
        assert set(CHINESE[node_id]) == texts, node_id


def test_every_input_and_output(schemas):
    for node_id, schema in schemas.items():
        inputs, outputs = CHINESE[node_id]["inputs"], CHINESE[node_id]["outputs"]
        assert list(inputs) == [given.id for given in schema.inputs], node_id
        assert list(outputs) == [str(i) for i in range(len(schema.outputs))], node_id
        assert all(set(texts) == {"name", "tooltip"} for texts in inputs.values()), node_id
        assert all(set(texts) == {"tooltip"} for texts in outputs.values()), node_id


def test_the_host_serves_them(schemas, monkeypatch, tmp_path):
    import folder_paths
    from app.custom_node_manager import CustomNodeManager
    from pack.runner.folder_links import PACK_NAME, link_folder

    link_folder(REPO, tmp_path / PACK_NAME)
    custom_nodes = ([str(tmp_path)], set())
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "custom_nodes", custom_nodes)
    served = CustomNodeManager().build_translations()
    assert served["zh"]["nodeDefs"] == CHINESE
    for language in ("en", "zh"):
        main = json.loads((REPO / "locales" / language / "main.json").read_text(encoding="utf-8"))
        assert main.items() <= served[language].items()
    assert "nodeDefs" not in served["en"]
