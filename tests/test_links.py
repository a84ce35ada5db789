"""Links of the project's texts lead to files that exist, and to headings of them.

What each check refuses is shown at the end.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

import pytest
from pack.tests.architecture_rules import REPO, files, is_shipped, read

TEXTS = [p for p in files(".md") if p.parts[0] not in ("tests", "benchmarks")]
# `](x)`, `](<x> "title")`, a line `[name]: x`, and an attribute in either kind of quotes.
LINK = re.compile(
    r"""\]\(\s*<?([^)>\s]+)>?(?:\s+["'(][^\n]*?["')])?\s*\)"""
    r"""|^ {0,3}\[[^\]\n]+\]:\s*<?([^>\s]+)"""
    r"""|\b(?:src|srcset|href)\s*=\s*["']([^"'\s]+)["']""",
    re.MULTILINE,
)


def links_of(markdown: str) -> list[str]:
    """Where links and pictures lead in this project, as Markdown or as HTML."""
    links = ["".join(found) for found in LINK.findall(markdown)]
    # Not the pages of the place that serves the file. Addresses: the rule `places`.
    return [link for link in links if not re.match(r"(\.\./)+issues|https:", link)]


def headings_of(markdown: str) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", markdown, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}


def lost_links(markdown: str, path: Path) -> list[str]:
    """Links of a text that lead to no file, or to no heading of it."""
    lost = []
    for link in links_of(markdown):
        name, _, heading = link.partition("#")
        target = (REPO / path).parent / name
        if not target.exists():
            lost.append(link)
        elif heading:
            text = target.read_text("utf-8") if name else markdown
            lost += [link] if heading not in headings_of(text) else []
    return lost


@pytest.mark.parametrize("path", TEXTS, ids=str)
def test_links_in_texts_lead_somewhere(path):
    assert lost_links(read(path), path) == []


@pytest.mark.parametrize("path", [p for p in TEXTS if is_shipped(p)], ids=str)
def test_the_published_texts_link_to_published_files(path):
    links = [link.partition("#")[0] for link in links_of(read(path))]
    targets = [(REPO / path).parent.joinpath(link).resolve() for link in links if link]
    inside = [PurePosixPath(target.relative_to(REPO.resolve()).as_posix()) for target in targets]
    assert [str(p) for p in inside if not is_shipped(p)] == []


def test_a_wrong_link_is_seen():
    assert links_of("[a](docs/none.md) ![b](x.png) [c](#d) [e](../../issues/new)") == [
        "docs/none.md",
        "x.png",
        "#d",
    ]
    text = (
        "# Here\n[a](#here) [b](#there) [c](docs/developing.md#measure) [d](docs/developing.md#x)"
    )
    assert lost_links(text, Path("README.md")) == ["#there", "docs/developing.md#x"]
    picture = '<picture><source srcset="y.svg"><img src="z.svg" alt="z"></picture>'
    assert links_of(picture) == ["y.svg", "z.svg"]
    assert links_of("[a](b.md \"t\") ![c](<d.png> 't') [e](f.md (t))") == ["b.md", "d.png", "f.md"]
    assert links_of("See [h] and [i][j].\n\n[h]: k.md\n[j]: <l.md> 'm'\n") == ["k.md", "l.md"]
    assert links_of("<img src='n.png'> <a href = \"o.md\">p</a>") == ["n.png", "o.md"]
    assert headings_of("# A b\n\n## C-d: `e`\n") == {"a-b", "c-d-e"}
