"""Folders that lead to other folders: the pack among the custom nodes, models in their place."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

PACK_NAME = "z-image-low-vram"
RUNTIME_FILES = ("__init__.py", "pyproject.toml", "nodes", "js", "locales", "example_workflows")


def link_folder(target: Path, link: Path) -> None:
    """Makes `link` lead to the folder `target`, copying nothing; needs no rights on Windows."""
    if link.is_symlink() or link.exists():
        if link.resolve() == target.resolve():
            return
        unlink_folder(link)
    link.parent.mkdir(parents=True, exist_ok=True)
    if os.name == "nt":
        # A symlink needs a privilege there, a junction does not.
        command = ["cmd", "/c", "mklink", "/J", str(link), str(target)]
        subprocess.run(command, check=True, capture_output=True)
    else:
        link.symlink_to(target, target_is_directory=True)


def unlink_folder(link: Path) -> None:
    """Removes a link or junction, or a copy that stands in for one; never what it leads to."""
    if link.is_symlink():
        link.unlink()
        return
    try:
        os.rmdir(link)  # ends a junction, and refuses a folder with files in it
    except OSError:
        shutil.rmtree(link, ignore_errors=True)


def install_pack(pack_dir: Path, base_dir: Path) -> Path:
    """Places the pack among the custom nodes of `base_dir`; a copy only where links are refused."""
    place = base_dir / "custom_nodes" / PACK_NAME
    try:
        link_folder(pack_dir, place)
    except (OSError, subprocess.CalledProcessError):
        unlink_folder(place)
        place.mkdir(parents=True)
        for name in RUNTIME_FILES:
            source = pack_dir / name
            if source.is_dir():
                shutil.copytree(source, place / name)
            elif source.exists():
                shutil.copy2(source, place / name)
    return place
