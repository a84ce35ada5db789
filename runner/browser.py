"""Finds a Chromium for the browser tests, and installs one where that is possible."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from .environment import child_environment

CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROMIUM_PLACES = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    "C:/Program Files/Google/Chrome/Application/chrome.exe",
)
FIND_PLAYWRIGHTS = (
    "from playwright.sync_api import sync_playwright as p\n"
    "with p() as it: print(it.chromium.executable_path)"
)


def starts(path: str | None) -> bool:
    """Whether the program is there and runs; a stub without its program is not enough."""
    if path is None or not Path(path).is_file():
        return False
    if os.name == "nt":  # there --version opens a window
        return True
    return subprocess.run([path, "--version"], capture_output=True).returncode == 0


def installed_chromium() -> str | None:
    """The first browser of this machine that starts."""
    paths = [*map(shutil.which, CHROMIUM_NAMES), *CHROMIUM_PLACES]
    return next(filter(starts, paths), None)


def attempt(command: list[str]) -> None:
    """Runs an installer; where it fails, says so in one line."""
    environment = child_environment(DEBIAN_FRONTEND="noninteractive")
    result = subprocess.run(
        command, env=environment, capture_output=True, encoding="utf-8", errors="replace"
    )
    if result.returncode != 0:
        said = [line.strip() for line in (result.stdout + result.stderr).splitlines()]
        errors = [line for line in said if line.lower().startswith(("e:", "error"))]
        print(f"  {' '.join(command)} failed: {next(iter(errors), 'no reason given')}", flush=True)


def find_chromium(python: Path) -> str | None:
    """A Chromium that starts: this machine's, Debian's or Playwright's; None if there is none."""
    if path := installed_chromium():
        return path
    if shutil.which("apt-get") and hasattr(os, "geteuid") and os.geteuid() == 0:
        attempt(["apt-get", "update", "-qq"])
        attempt(["apt-get", "install", "-y", "-qq", "chromium"])
        if path := installed_chromium():
            return path
    attempt([str(python), "-m", "playwright", "install", "chromium"])
    answer = subprocess.run([str(python), "-c", FIND_PLAYWRIGHTS], capture_output=True, text=True)
    if starts(path := answer.stdout.strip()):
        return path
    print("No Chromium could be found or installed: the browser tests are skipped.", flush=True)
    return None
