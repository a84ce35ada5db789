"""The published files that the example workflows name: what the page needs to offer them."""

from __future__ import annotations

import re

import pytest
from pack.nodes.weights.missing import FILES_REPOSITORY, PUBLISHED
from pack.testing.example_workflows import NAMES, model_files, nodes, read

PUBLISHED_URL = re.compile(r"https:/{2}huggingface\.co/[\w.-]+/[\w.-]+/resolve/main/\S+")
# Folders below models/ that every host has.
DIRECTORIES = {"checkpoints", "diffusion_models", "text_encoders", "vae"}
HASH = re.compile("[0-9a-f]{64}")


@pytest.mark.parametrize("name", NAMES)
def test_each_file_has_a_name_a_folder_and_a_published_address(name):
    files = list(model_files(read(name)))
    assert files
    for file in files:
        assert set(file) - {"hash", "hash_type"} == {"name", "url", "directory"}
        assert file["directory"] in DIRECTORIES
        assert PUBLISHED_URL.fullmatch(file["url"]), file["url"]
        assert file["url"].endswith(f"/{file['name']}")
        assert file["name"].endswith(".safetensors"), "the page downloads no other kind"
        assert ("hash" in file) == ("hash_type" in file)
        if "hash" in file:
            assert file["hash_type"] == "SHA256"
            assert HASH.fullmatch(file["hash"])


@pytest.mark.parametrize("name", NAMES)
def test_each_loader_names_its_files(name):
    """The page finds a file's address by the value of the node's widget."""
    for node in nodes(read(name)):
        values = [v for v in node.get("widgets_values") or () if str(v).endswith(".safetensors")]
        assert sorted(values) == sorted(f["name"] for f in node["properties"].get("models", ()))


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("z_image")])
def test_the_sentence_on_missing_files_names_the_workflows_files(name):
    files = list(model_files(read(name)))
    assert {f["name"] for f in files} == set(PUBLISHED.values())
    assert all(f"/{FILES_REPOSITORY}/resolve/" in f["url"] for f in files)
