"""The published files that the documents name: their folders, sizes and addresses.

What each rule refuses is shown at the end.
"""

from __future__ import annotations

import re

import pytest
from pack.nodes.weights.missing import FILES_REPOSITORY, FOLDER, FOLDER_REPOSITORY, PUBLISHED, VAE
from pack.testing.example_workflows import NAMES, model_files
from pack.testing.example_workflows import read as read_workflow
from pack.tests.architecture_rules import documents
from pack.tests.benchmarks.settings import FILE_SIZES

TEXTS = documents()
READMES = ("README.md", "README.zh.md")
# As the workflows of Z-Image offer them for download: name, directory, url.
OFFERED = {
    file["name"]: file
    for name in NAMES
    if name.startswith("z_image")
    for file in model_files(read_workflow(name))
}
SITE = OFFERED[PUBLISHED[VAE]]["url"].partition(FILES_REPOSITORY)[0]
PLACE = re.compile(r"(?<![\w/])models/\w+")
SIZE = re.compile(r"\d[\d.]* [GM]i?B")
ADDRESS = re.compile(rf"{re.escape(SITE)}[^)\s]+")


def wrong_files(markdown: str) -> list[str]:
    """What is wrong in lines about a published file, and links to no published place."""
    wrong = []
    for line in markdown.splitlines():
        named = [name for name in PUBLISHED.values() if name in line]
        right = {
            *(f"models/{OFFERED[name]['directory']}" for name in named),
            *(FILE_SIZES[name] for name in named),
            *(OFFERED[name]["url"] for name in named),
        }
        said = [found[0] for found in ADDRESS.finditer(line) if "/resolve/" in found[0]]
        if named:
            said += [found[0] for kind in (PLACE, SIZE) for found in kind.finditer(line)]
        wrong += [what for what in said if what not in right]
    pages = {SITE + name: name for name in (FILES_REPOSITORY, FOLDER_REPOSITORY)}
    links = re.findall(rf"\[([^\]]+)\]\(({re.escape(SITE)}[^)]+)\)", markdown)
    shown = {**pages, **{file["url"]: file["name"] for file in OFFERED.values()}}
    return wrong + [url for title, url in links if shown.get(url) != title]


@pytest.mark.parametrize("name", TEXTS)
def test_published_files_in_texts_are_where_the_workflows_say(name):
    assert wrong_files(TEXTS[name]) == []


@pytest.mark.parametrize("name", READMES)
def test_a_readme_tells_how_to_get_the_files_by_hand(name):
    for file in PUBLISHED.values():
        offered = OFFERED[file]
        link, place = f"[{file}]({offered['url']})", f"`models/{offered['directory']}`"
        words = (link, place, FILE_SIZES[file])
        assert any(all(word in line for word in words) for line in TEXTS[name].splitlines()), words
    assert f"]({SITE}{FILES_REPOSITORY})" in TEXTS[name]
    folder = f"]({SITE}{FOLDER_REPOSITORY})"
    place = f"`models/diffusers/{FOLDER}`"
    assert folder in TEXTS[name] and place in TEXTS[name]


ROW = f"| [ae.safetensors]({OFFERED['ae.safetensors']['url']}) | `models/vae` | 0.3 GiB |"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("models/vae", "models/text_encoders"),
        ("0.3 GiB", "7.5 GiB"),
        ("split_files/vae/ae", "split_files/vae/qwen_3_4b"),
        ("Comfy-Org/z_image_turbo", "Comfy-Org/z_image"),
        ("[ae.safetensors]", "[qwen_3_4b.safetensors]"),
    ],
)
def test_a_wrong_row_is_seen(old, new):
    assert wrong_files(ROW) == []
    assert wrong_files(ROW.replace(old, new)) != []


def test_a_wrong_page_is_seen():
    assert wrong_files(f"[{FILES_REPOSITORY}]({SITE}{FILES_REPOSITORY})") == []
    assert wrong_files(f"[{FILES_REPOSITORY}]({SITE}{FOLDER_REPOSITORY})") != []
    assert wrong_files(f"[x/y]({SITE}x/y)") == [f"{SITE}x/y"]
