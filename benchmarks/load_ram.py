"""Peak RAM and time of loading a sharded folder: our loader node, and mapping it whole.

    python run.py bench load_ram [--layers N] [--dtype float32|bfloat16] [--way node]
        [--tiny]

Each row is a process of its own on the unmodified host with --cpu. The peak is the process' largest
resident set, mapped file pages included, less what it held before loading. The folder has the true
widths and few layers; its tensors are zero but for their first rows, which costs as much RAM.
On the CPU the host keeps the transformer in float32: a bfloat16 folder doubles in memory. `--tiny`
only tries the script, on tiny widths. Rows of other folders are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

from pack.nodes.units import GIB

from .rows import REPO, RESULTS_DIR, merged, write
from .shown import load_ram as shown
from .shown.load_ram import WAYS

RESULTS = RESULTS_DIR / "load_ram.jsonl"
KEY = ("way", "layers", "dim", "dtype")


def peak_rss_bytes() -> int:
    """The largest resident set of this process so far, in bytes."""
    if os.name == "nt":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def load_in_this_process(
    way: str, base: Path, folder_name: str, *, is_tiny: bool
) -> dict[str, float]:
    """Loads the folder in this process; returns seconds and peak bytes above the start."""
    sys.path.insert(0, os.environ["ZIMAGE_HOST_DIR"])
    import comfy.options
    from comfy.cli_args import args

    args.cpu, args.base_directory, args.disable_api_nodes = True, str(base), True
    import comfy.sd
    import comfy.utils
    import utils.extra_config  # noqa: F401 (first: hosts before 0.26 hide `utils` later)
    from pack.nodes.host.loader.choices import SAME_FOLDER
    from pack.nodes.load_model import LoadZImageTurbo

    if is_tiny:
        from pack.testing import widen_detection

        widen_detection.install()
    before, start = peak_rss_bytes(), time.perf_counter()
    if way == "node":
        kept = LoadZImageTurbo.execute(f"{folder_name}/", SAME_FOLDER, SAME_FOLDER).result
    else:
        kept = _load_mapped(comfy, base / "models" / "diffusers" / folder_name)
    seconds = time.perf_counter() - start
    assert len(kept) == 3
    return {"seconds": seconds, "peak_bytes": peak_rss_bytes() - before}


def _load_mapped(comfy: types.ModuleType, folder: Path) -> tuple[object, object, object]:
    def merged(part: str) -> dict[str, object]:
        tensors: dict[str, object] = {}
        for shard in sorted((folder / part).glob("*.safetensors")):
            tensors.update(comfy.utils.load_torch_file(str(shard)))
        return tensors

    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    sizes = (
        "num_hidden_layers", "hidden_size", "intermediate_size",
        "num_attention_heads", "num_key_value_heads", "vocab_size",
    )  # fmt: skip
    options = {"qwen3_4b_model_config": {key: config[key] for key in sizes}}
    return (
        comfy.sd.load_diffusion_model_state_dict(merged("transformer"), metadata={}),
        comfy.sd.load_text_encoder_state_dicts(
            [merged("text_encoder")],
            clip_type=comfy.sd.CLIPType.LUMINA2,
            model_options=options,
        ),
        comfy.sd.VAE(sd=merged("vae")),
    )


def measure(way: str, base: Path, folder_name: str, *, is_tiny: bool = False) -> dict[str, float]:
    """Runs `load_in_this_process` in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.load_ram", "--child", way, str(base), folder_name]
    command += ["--tiny"] if is_tiny else []
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPO)
    if done.returncode != 0:
        raise RuntimeError(f"{way} failed: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def folder_bytes(folder: Path) -> int:
    """Size of the weight files, in bytes, holes included."""
    return sum(p.stat().st_size for p in folder.rglob("*.safetensors"))


def make_folder(base: Path, *, layers: int, dtype: str, is_tiny: bool = False) -> Path:
    """Writes the folder below the base directory's models/diffusers."""
    import torch
    from pack.testing import tiny_models

    folder = base / "models" / "diffusers" / "Z-Image-Turbo"
    make = tiny_models.write_small_folder if is_tiny else tiny_models.write_real_width_folder
    return make(folder, layers=layers, dtype=getattr(torch, dtype))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=2, help="main layers of the transformer")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--way", action="append", choices=WAYS, help="only these")
    parser.add_argument("--tiny", action="store_true", help="tiny widths: tries the script")
    parser.add_argument(
        "--child", nargs=3, metavar=("WAY", "BASE", "FOLDER"), help=argparse.SUPPRESS
    )
    options = parser.parse_args()
    if options.child:
        way, base, folder_name = options.child
        found = load_in_this_process(way, Path(base), folder_name, is_tiny=options.tiny)
        print(json.dumps(found))
        return

    import torch

    version = Path(os.environ["ZIMAGE_HOST_DIR"], "comfyui_version.py").read_text().split('"')[1]
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary)
        tiny = options.tiny
        folder = make_folder(base, layers=options.layers, dtype=options.dtype, is_tiny=tiny)
        size = folder_bytes(folder)
        dim = json.loads((folder / "transformer" / "config.json").read_text())["dim"]
        if not tiny:  # fills the page cache, so that no row pays for it
            measure("mapped", base, folder.name)
        rows = [
            {
                "way": way, "layers": options.layers, "dim": dim, "dtype": options.dtype,
                "folder_bytes": size,
                "host": version, "torch": torch.__version__, "device": f"cpu {platform.machine()}",
                **measure(way, base, folder.name, is_tiny=tiny),
            }
            for way in options.way or WAYS
        ]  # fmt: skip
    write(RESULTS, merged(RESULTS, rows, KEY))
    print(
        f"{options.layers} main layers of width {dim}, {options.dtype}, {size / GIB:.2f} GiB of "
        f"shards; ComfyUI {version}, torch {torch.__version__}, CPU"
    )
    print(shown.tables(rows)["load_ram"], end="")


if __name__ == "__main__":
    main()
