"""Checks that a tag names the version that pyproject.toml and CHANGELOG.md name.

    python -m runner.release v0.2.0

Standard library only: the workflow that publishes runs it before anything is installed.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def project_version(pyproject: str) -> str:
    """The version that the registry would publish; "" where there is none."""
    found = re.search(r'^version = "(.*)"$', pyproject, re.MULTILINE)
    return found[1] if found else ""


def releases(changelog: str) -> dict[str, str]:
    """What each dated release of a changelog says, by version, newest first."""
    parts = re.split(r"^## \[(.+?)\](.*)$", changelog, flags=re.MULTILINE)[1:]
    entries = zip(parts[::3], parts[1::3], parts[2::3], strict=True)
    return {
        version: text.strip()
        for version, date, text in entries
        if re.fullmatch(r" - \d{4}-\d\d-\d\d", date)
    }


def disagreements(tag: str, pyproject: str, changelog: str) -> list[str]:
    """One sentence for each thing that does not agree with the tag."""
    version, known = project_version(pyproject), releases(changelog)
    wrong = []
    if tag != f"v{version}":
        wrong.append(f"the tag is {tag}, but pyproject.toml's version is {version or 'missing'}")
    newest = next(iter(known), "missing")
    if tag != f"v{newest}":
        wrong.append(f"the tag is {tag}, but the newest dated release in CHANGELOG.md is {newest}")
    elif not known[newest]:
        wrong.append(f"CHANGELOG.md says nothing about {newest}")
    return wrong


def main(argv: list[str]) -> int:
    if len(argv) != 1:
        print("usage: python -m runner.release v0.2.0", file=sys.stderr)
        return 2
    texts = [(ROOT / name).read_text("utf-8") for name in ("pyproject.toml", "CHANGELOG.md")]
    wrong = disagreements(argv[0], *texts)
    print("\n".join(wrong) or f"{argv[0]} agrees with pyproject.toml and CHANGELOG.md")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
