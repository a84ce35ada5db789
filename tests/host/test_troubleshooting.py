"""The messages that docs/troubleshooting*.md quote are those that users see."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

import pytest
from pack.tests.architecture_rules import read
from pack.tests.test_user_texts import literals, missing, said


def quoted(markdown: str) -> list[str]:
    """Spans of three words or more that are no command: what our code, the page or ComfyUI says."""
    spans = [span.split() for span in re.findall(r"`([^`]+)`", markdown)]
    return [" ".join(words) for words in spans if len(words) >= 3 and words[0] != "python"]


@pytest.fixture
def everything(host) -> str:
    """What our nodes, the page and ComfyUI can say."""
    host_dir = Path(host.sd.__file__).parent.parent
    sources = [(host_dir / name).read_text("utf-8") for name in ("execution.py", "comfy/sd.py")]
    return "\n".join([said(), *(text for source in sources for text in literals(source))])


@pytest.mark.parametrize("name", ["troubleshooting.md", "troubleshooting.zh.md"])
def test_every_quoted_message_exists(everything, name):
    messages = quoted(read(PurePosixPath(f"docs/{name}")))
    assert len(messages) >= 6
    assert missing(messages, everything) == []


def test_a_wrong_message_is_seen(everything):
    messages = quoted("`this VAE stays as it was: x` and `prefer` and `python run.py demo`")
    assert missing(messages, everything) == ["this VAE stays as it was: x"]
