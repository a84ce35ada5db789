"""The messages that docs/troubleshooting*.md quote are those that users see."""

from __future__ import annotations

import json
import re
from pathlib import Path, PurePosixPath

import pytest
from pack.tests.architecture_rules import REPO, read

# Quoted from our code, our locales or ComfyUI's code: a span of three words or more, no command.
_MESSAGE = re.compile(r"`((?!python )[^`\s]+(?:\s[^`\s]+){2,})`")
_HOSTS = ("execution.py", "comfy/sd.py")


def quoted(markdown: str) -> list[str]:
    # "measure and reset peak" is a setting, which the schemas hold as well.
    return [" ".join(span.split()) for span in _MESSAGE.findall(markdown)]


def sources(host_dir: Path) -> str:
    """Everything that can say something, with adjacent strings joined."""
    ours = [path.read_text("utf-8") for path in (REPO / "nodes").rglob("*.py")]
    hosts = [(host_dir / name).read_text("utf-8") for name in _HOSTS]
    page = json.dumps(json.loads(read(PurePosixPath("locales/en/main.json"))), ensure_ascii=False)
    return re.sub(r'"\s*\n\s*f?"', "", "\n".join([*ours, *hosts, page]))


@pytest.mark.parametrize("name", ["troubleshooting.md", "troubleshooting.zh.md"])
def test_every_quoted_message_exists(host, name):
    said = sources(Path(host.sd.__file__).parent.parent)
    messages = quoted(read(PurePosixPath(f"docs/{name}")))
    assert len(messages) >= 6
    assert [message for message in messages if message not in said] == []


def test_a_wrong_message_is_seen(host):
    (message,) = quoted("`this VAE stays as it was: x` and `prefer` and `python run.py demo`")
    assert message not in sources(Path(host.sd.__file__).parent.parent)
