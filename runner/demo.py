"""The example workflow on a real ComfyUI server, to a picture and a table of memory.

Started by `python run.py demo`, which makes the environment first.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .environment import ROOT, SetupError
from .live_host import HostError, LiveHost
from .model_files import Models, offer_models
from .server_watch import Watched, watch

PROMPT = (
    "A red fox asleep in the snow under a birch tree, early morning light, soft long shadows, "
    "sharp fur, a photograph"
)
SIZE_CPU_PX = 256
SIZE_GPU_PX = 1024
STEPS = 8
# What the host says about devices and dtypes when it loads the models.
LOG_FACTS = re.compile(r"(?:Device:|model weight dtype|VAE load device|CLIP/text encoder model).*")


class Picture(NamedTuple):
    """What is to be drawn; width and height in pixels."""

    width: int
    height: int
    steps: int = STEPS
    seed: int = 0
    text: str = PROMPT


class DemoResult(NamedTuple):
    """path: the picture; watched: what was measured; facts: the server's lines on devices."""

    path: Path
    watched: Watched
    facts: list[str]


def example_prompt(models: Models, picture: Picture) -> dict[str, Any]:
    """example_workflows/z_image_turbo.json in the API format, with these models and settings."""
    return {
        "1": {
            "class_type": "ZImageTurboLoader",
            "inputs": {
                "diffusion_model": models.diffusion_model,
                "text_encoder": models.text_encoder,
                "vae": models.vae,
                "weight_dtype": "default",
                "shift": 0.0,
            },
        },
        "2": {
            "class_type": "CLIPTextEncode",
            "inputs": {"clip": ["1", 1], "text": picture.text},
        },
        "3": {"class_type": "ConditioningZeroOut", "inputs": {"conditioning": ["2", 0]}},
        "4": {
            "class_type": "EmptySD3LatentImage",
            "inputs": {"width": picture.width, "height": picture.height, "batch_size": 1},
        },
        "5": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["1", 0],
                "positive": ["2", 0],
                "negative": ["3", 0],
                "latent_image": ["4", 0],
                "seed": picture.seed,
                "steps": picture.steps,
                "cfg": 1.0,
                "sampler_name": "res_multistep",
                "scheduler": "simple",
                "denoise": 1.0,
            },
        },
        "6": {"class_type": "VAEDecode", "inputs": {"samples": ["5", 0], "vae": ["1", 2]}},
        "7": {
            "class_type": "SaveImage",
            "inputs": {"images": ["6", 0], "filename_prefix": "z_image_turbo"},
        },
    }


def random_models(demo_dir: Path) -> Path:
    """A models folder with random weights of the true widths and few layers; made once."""
    folder = demo_dir / "models"
    target = folder / "diffusers" / "Z-Image-Turbo"
    if not target.is_dir():
        part = demo_dir / "models.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        command = [sys.executable, "-m", "testing.tiny_models", "real-folder", str(part)]
        result = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", cwd=ROOT
        )
        if result.returncode != 0:
            last = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise SetupError(f"writing the random weights failed: {last}")
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(part, target)  # last, so that a folder in this place is whole
    return folder


def run_demo(
    host_dir: Path,
    demo_dir: Path,
    picture: Picture,
    *,
    models_dir: Path | None = None,
    cpu: bool = True,
    keep_open: bool = False,
    host_args: Sequence[str] = (),
) -> DemoResult:
    """Starts the host, runs the example workflow and prints what happens.

    Args:
        host_dir: an unpacked ComfyUI.
        demo_dir: everything that is written lies below it.
        picture: what to draw.
        models_dir: real weights; None: random ones are written.
        cpu: use no GPU.
        keep_open: leave the server running until Ctrl-C.
        host_args: more arguments for the host.

    Raises:
        SetupError, HostError: with one sentence for the user.
    """
    base_dir = demo_dir / "base"
    if models_dir is None:
        print("Writing random weights of the true widths, few layers (--models: real ones) ...")
    models = offer_models(models_dir or random_models(demo_dir), base_dir)
    named = ", ".join(models[:3])
    print(f"Models: {named}\nStarting the server ...", flush=True)
    started = time.monotonic()
    server = LiveHost(
        host_dir, base_dir, cpu=cpu, extra_model_paths=models.paths_file, args=host_args
    )
    with server:
        stats = server.get_json("/system_stats")
        device = stats["devices"][0]
        system = stats["system"]
        print(
            f"ComfyUI {system['comfyui_version']}, torch {system['pytorch_version']}, "
            f"Python {system['python_version'].split()[0]}, device {device['name']} "
            f"({time.monotonic() - started:.0f} s)\n"
            f"Drawing {picture.width}x{picture.height}, {picture.steps} steps, "
            f"seed {picture.seed}: {picture.text}",
            flush=True,
        )
        prompt = example_prompt(models, picture)
        has_vram = device["type"] != "cpu"
        watched = watch(server, prompt, has_vram=has_vram, say=lambda text: print(f"  {text}"))
        output = demo_dir / "output"
        output.mkdir(parents=True, exist_ok=True)
        path = output / f"z_image_turbo_{picture.width}x{picture.height}_{picture.seed}.png"
        path.write_bytes(server.images(watched.history)[0])
        facts = list(dict.fromkeys(LOG_FACTS.findall(server.log())))
        print("\nThe server's own words:", *facts, "", watched.table(), "", sep="\n")
        if models_dir is None:
            print("random weights: the picture is noise by design")
        print(f"Picture: {path}", flush=True)
        if keep_open:
            print(f"The server stays open: {server.url} (Ctrl-C ends it)", flush=True)
            while True:
                time.sleep(1)
                server.check_alive()
    return DemoResult(path, watched, facts)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="run.py demo", description=__doc__)
    parser.add_argument("--host-dir", type=Path, required=True)
    parser.add_argument("--models", type=Path)
    parser.add_argument("--width", type=int)
    parser.add_argument("--height", type=int)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--keep-open", action="store_true")
    options = parser.parse_args(argv)
    try:
        side = SIZE_CPU_PX if options.cpu else SIZE_GPU_PX
        seed = random.getrandbits(32) if options.seed is None else options.seed
        run_demo(
            options.host_dir,
            ROOT / ".demo",
            Picture(
                options.width or side, options.height or side, options.steps, seed, options.prompt
            ),
            models_dir=options.models,
            cpu=options.cpu,
            keep_open=options.keep_open,
        )
    except (SetupError, HostError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
