"""The pack on a real server, over HTTP: what a user's browser would see and get."""

from __future__ import annotations

import io
import os
import re
import shutil
import uuid
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from pack.nodes.units import size
from pack.runner.demo import run_demo
from pack.runner.folder_links import PACK_NAME, install_pack, unlink_folder
from pack.runner.graphs import FIT, PROBE, Picture, example_prompt
from pack.runner.live_host import REPO, HostError, LiveHost
from pack.runner.model_files import SAME_FOLDER, Models
from pack.tests.e2e.conftest import TIMEOUT_S, forget, tree_sums
from PIL import Image

LOADER = "ZImageTurboLoader"
FOLDER = "Z-Image-Turbo/"
FILES = ("z_image_turbo_bf16.safetensors", "qwen_3_4b.safetensors", "ae.safetensors")
SMALL = Picture(64, 96, steps=2, seed=7, text="a lighthouse in fog")


def prompt_for(
    model: str, encoder: str, vae: str, picture: Picture = SMALL, **loader: Any
) -> dict[str, Any]:
    prompt = example_prompt(Models(model, encoder, vae, Path()), picture)
    prompt["1"]["inputs"].update(loader)
    # A new name makes the host save again: old hosts report no picture when nothing has changed.
    prompt["7"]["inputs"]["filename_prefix"] = uuid.uuid4().hex
    return prompt


def pixels(server: LiveHost, entry: dict[str, Any]) -> np.ndarray:
    (png,) = server.images(entry)
    image = Image.open(io.BytesIO(png))
    assert image.format == "PNG"
    return np.array(image)


def run(server: LiveHost, prompt: dict[str, Any]) -> np.ndarray:
    return pixels(server, server.wait(server.queue(prompt), TIMEOUT_S))


def cached_nodes(entry: dict[str, Any]) -> set[str]:
    """The nodes that the host did not run because it still had their outputs."""
    messages = dict(entry["status"]["messages"])
    return set(messages.get("execution_cached", {}).get("nodes", []))


def test_object_info_explains_every_input_and_output(server):
    info = server.get_json(f"/object_info/{LOADER}")[LOADER]
    assert info["display_name"] == "Load Z-Image-Turbo"
    assert info["category"] == "model/loaders"
    assert info["output"] == ["MODEL", "CLIP", "VAE"]
    assert info["description"]
    inputs = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
    assert list(inputs) == ["diffusion_model", "text_encoder", "vae", "weight_dtype", "shift"]
    for name, (_, options) in inputs.items():
        assert len(options.get("tooltip", "").split()) > 5, f"no tooltip on the input {name}"
    assert len(info["output_tooltips"]) == len(info["output"])
    for tooltip in info["output_tooltips"]:
        assert tooltip
        assert len(tooltip.split()) > 3


def test_the_choices_are_files_and_folders(server):
    inputs = server.get_json(f"/object_info/{LOADER}")[LOADER]["input"]["required"]

    def options(name: str) -> list[str]:
        kind, settings = inputs[name]
        return settings["options"] if kind == "COMBO" else kind

    for name, file in zip(("diffusion_model", "text_encoder", "vae"), FILES, strict=True):
        assert FOLDER in options(name)
        assert file in options(name)
    assert SAME_FOLDER not in options("diffusion_model")
    assert options("text_encoder")[0] == options("vae")[0] == SAME_FOLDER


class TestPictures:
    def test_folder_files_and_a_mix_draw_the_same_picture(self, server):
        """Both layouts hold the same weights, so every way of choosing them must agree."""
        choices = (
            (FOLDER, SAME_FOLDER, SAME_FOLDER),
            FILES,
            (FOLDER, FILES[1], SAME_FOLDER),
            (FILES[0], FOLDER, FILES[2]),
        )
        drawn = [run(server, prompt_for(*choice)) for choice in choices]
        assert drawn[0].shape == (SMALL.height, SMALL.width, 3)
        assert drawn[0].std() > 1, "a picture of one colour shows nothing"
        for other in drawn[1:]:
            np.testing.assert_array_equal(other, drawn[0])

    def test_the_same_seed_draws_the_same_pixels_and_another_does_not(self, server):
        prompt = prompt_for(FOLDER, SAME_FOLDER, SAME_FOLDER)
        first = run(server, prompt)
        forget(server)
        entry = server.wait(server.queue(prompt), TIMEOUT_S)
        assert cached_nodes(entry) == set(), "nothing of the first run may be shown again"
        np.testing.assert_array_equal(pixels(server, entry), first)
        other = run(server, prompt_for(FOLDER, SAME_FOLDER, SAME_FOLDER, SMALL._replace(seed=8)))
        assert (other != first).any()

    def test_text_shift_and_weight_dtype_reach_the_picture(self, server):
        plain = run(server, prompt_for(*FILES))
        assert (run(server, prompt_for(*FILES, SMALL._replace(text="a red barn"))) != plain).any()
        assert (run(server, prompt_for(*FILES, shift=6.0)) != plain).any()
        assert (run(server, prompt_for(*FILES, weight_dtype="fp8_e4m3fn")) != plain).any()

    def test_shift_0_is_the_folders_3_and_the_templates_own_node_is_harmless(self, server):
        automatic = run(server, prompt_for(FOLDER, SAME_FOLDER, SAME_FOLDER))
        explicit = run(server, prompt_for(FOLDER, SAME_FOLDER, SAME_FOLDER, shift=3.0))
        np.testing.assert_array_equal(explicit, automatic)
        template = prompt_for(FOLDER, SAME_FOLDER, SAME_FOLDER)
        inputs = {"model": ["1", 0], "shift": 3.0}
        template["8"] = {"class_type": "ModelSamplingAuraFlow", "inputs": inputs}
        template["5"]["inputs"]["model"] = ["8", 0]
        np.testing.assert_array_equal(run(server, template), automatic)

    def test_the_hosts_own_loaders_draw_the_same_picture_from_the_files(self, server):
        """Model and VAE; the host's own CLIP loader knows no text encoder of this size."""
        prompt = prompt_for(*FILES)
        ours = run(server, prompt)
        unet = {"unet_name": FILES[0], "weight_dtype": "default"}
        prompt["8"] = {"class_type": "UNETLoader", "inputs": unet}
        prompt["9"] = {"class_type": "VAELoader", "inputs": {"vae_name": FILES[2]}}
        prompt["5"]["inputs"]["model"] = ["8", 0]
        prompt["6"]["inputs"]["vae"] = ["9", 0]
        np.testing.assert_array_equal(run(server, prompt), ours)


def test_the_loader_runs_again_when_a_file_changes_and_not_otherwise(server, small_models):
    prompt = prompt_for(FOLDER, SAME_FOLDER, SAME_FOLDER)

    def loader_was_cached() -> bool:
        prompt["5"]["inputs"]["seed"] += 1
        return "1" in cached_nodes(server.wait(server.queue(prompt), TIMEOUT_S))

    loader_was_cached()
    assert loader_was_cached()
    shard = next((small_models / "diffusers" / "Z-Image-Turbo" / "transformer").glob("*-00001-*"))
    os.utime(shard, ns=(shard.stat().st_atime_ns, shard.stat().st_mtime_ns + 10**9))
    assert not loader_was_cached()
    assert loader_was_cached()


class TestWrongInput:
    @pytest.fixture
    def bad_file(self, small_models):
        """Places a file among the diffusion models for one test."""
        placed = []

        def place(source: Path | bytes) -> str:
            name = f"bad_{uuid.uuid4().hex}.safetensors"  # the host lists a new name at once
            path = small_models / "diffusion_models" / name
            if isinstance(source, bytes):
                path.write_bytes(source)
            else:
                shutil.copy(source, path)
            placed.append(path)
            return name

        yield place
        for path in placed:
            path.unlink()

    def failure(self, server: LiveHost, model: str) -> dict[str, Any]:
        """The execution_error in the history of a prompt that must fail."""
        with pytest.raises(HostError) as raised:
            run(server, prompt_for(model, FILES[1], FILES[2]))
        messages = dict(raised.value.history["status"]["messages"])
        assert messages["execution_error"]["exception_message"].strip() in str(raised.value)
        return messages["execution_error"]

    def test_a_vae_in_place_of_the_model_is_one_sentence(self, server, small_models, bad_file):
        name = bad_file(small_models / "vae" / FILES[2])
        error = self.failure(server, name)
        assert error["node_type"] == LOADER
        sentence = error["exception_message"].strip()
        assert "\n" not in sentence
        assert name in sentence
        assert "is not Z-Image: it looks like a VAE" in sentence

    def test_a_truncated_file_is_one_sentence(self, server, small_models, bad_file):
        whole = (small_models / "diffusion_models" / FILES[0]).read_bytes()
        name = bad_file(whole[: len(whole) // 2])
        sentence = self.failure(server, name)["exception_message"].strip()
        assert "\n" not in sentence
        assert name in sentence
        assert str(len(whole) // 2) in sentence.replace(",", "")

    def test_the_server_still_draws_after_a_failure(self, server, small_models, bad_file):
        self.failure(server, bad_file(b"no weights"))
        assert run(server, prompt_for(*FILES)).shape == (SMALL.height, SMALL.width, 3)

    def test_a_name_that_is_not_listed_is_one_sentence(self, server):
        error = self.failure(server, "nowhere.safetensors")
        assert error["node_type"] == LOADER
        assert error["executed"] == [], "nothing ran before it"
        sentence = error["exception_message"].strip()
        assert "\n" not in sentence
        assert sentence.startswith("Missing: nowhere.safetensors in models/diffusion_models;")

    def test_what_is_no_name_is_refused_at_once(self, server):
        with pytest.raises(HostError, match=r"HTTP 400 .*must be a file or folder, got 7"):
            server.queue(prompt_for(7, FILES[1], FILES[2]))  # type: ignore[arg-type]


class Lives(NamedTuple):
    """A second server on one base directory: before the pack was there, with it, and after it.

    before, with_pack: every node with the module that it comes from.
    files_before, files_after: the base directory's files and their sums, without the host's logs:
        before the pack was there, and after its folder was deleted.
    """

    before: dict[str, str]
    with_pack: dict[str, str]
    picture: np.ndarray
    files_before: dict[str, str]
    files_after: dict[str, str]


@pytest.fixture(scope="module")
def lives(host_dir, new_base) -> Lives:
    base = new_base("second")

    def node_types(host: LiveHost) -> dict[str, str]:
        info = host.get_json("/object_info")
        return {name: node["python_module"] for name, node in info.items()}

    def files() -> dict[str, str]:
        kept = [path for path in base.iterdir() if path.name not in ("models", "output")]
        sums = {f"{path.name}/{n}": s for path in kept for n, s in tree_sums(path).items()}
        return {name: total for name, total in sums.items() if not name.endswith(".log")}

    with LiveHost(host_dir, base, pack_dir=None) as host:
        before = node_types(host)
    files_before = files()
    with LiveHost(host_dir, base) as host:
        with_pack = node_types(host)
        picture = run(host, prompt_for(*FILES))
    unlink_folder(base / "custom_nodes" / PACK_NAME)
    return Lives(before, with_pack, picture, files_before, files())


class TestAnotherServer:
    def test_another_server_process_draws_the_same_pixels(self, server, lives):
        np.testing.assert_array_equal(lives.picture, run(server, prompt_for(*FILES)))

    def test_the_pack_adds_its_own_nodes_and_nothing_else(self, lives):
        assert LOADER not in lives.before
        added = dict(lives.with_pack.items() - lives.before.items())
        assert LOADER in added
        assert set(added.values()) == {f"custom_nodes.{PACK_NAME}"}
        assert lives.before.items() <= lives.with_pack.items()

    def test_a_host_whose_pack_was_deleted_has_the_files_of_one_that_never_had_it(self, lives):
        assert lives.files_before
        assert lives.files_after == lives.files_before


@pytest.mark.once
def test_deleting_the_link_leaves_what_it_leads_to(tmp_path):
    place = install_pack(REPO, tmp_path)
    assert (place / "nodes" / "extension.py").is_file()
    assert install_pack(REPO, tmp_path) == place
    unlink_folder(place)
    assert not place.exists()
    assert (REPO / "nodes" / "extension.py").is_file()


@pytest.mark.once
@pytest.mark.slow
def test_the_demo_draws_on_the_unmodified_host(host_dir, tmp_path, capsys):
    """The demo's own function, with files of the true widths and nothing widened."""
    result = run_demo(host_dir, tmp_path, Picture(64, 64, steps=2, seed=1), cpu=True)
    image = Image.open(result.path)
    assert (image.format, image.size) == ("PNG", (64, 64))
    assert np.array(image).std() > 1
    compared = result.compared
    assert compared.alone is not None
    ran = {node["class_type"] for node in prompt_for(*FILES).values()}
    assert {row.node for row in compared.alone.watched.rows} == ran | {PROBE}
    # The second run has models and the empty latent from the host's cache.
    again = {row.node for row in result.watched.rows}
    assert {FIT, PROBE, "KSampler", "VAEDecode", "SaveImage"} <= again <= ran | {FIT, PROBE}
    peak = max(row.ram_peak_bytes for row in compared.alone.watched.rows)
    # 1 layer of 3840 channels alone is 3.4 GiB in float32.
    assert peak - compared.alone.watched.ram_before_bytes > 3 * 2**30
    assert any("model weight dtype" in fact for fact in result.facts)
    shown = capsys.readouterr().out
    assert "random weights: the picture is noise by design" in shown
    assert "These are samples of its resident memory, every 50 ms" in shown
    # The pictures differ by rounding at most: Lean VAE sums in another order.
    pair = (Image.open(io.BytesIO(each.picture)) for each in (compared.alone, compared.ours))
    first, second = (np.asarray(each.convert("RGB"), dtype=np.int16) for each in pair)
    off = np.abs(first - second)
    assert off.max() <= 1
    assert f"Pictures: {compared.pictures()}." in shown
    sampling = [
        each.records["sampling"]["parts_at_peak"]["activations"]
        for each in (compared.alone, compared.ours)
    ]
    assert 0 < sampling[1] < sampling[0]
    assert re.search(
        rf"^sampling: memory it adds +{size(sampling[0])} +{size(sampling[1])}$", shown, re.M
    )
    seconds = [f"{each.seconds('decode'):.1f} s" for each in (compared.alone, compared.ours)]
    assert re.search(rf"^VAE decode: time +{' +'.join(seconds)}$", shown, re.M)
    assert "Predicted for an 8 GiB card" in shown
    assert f"Memory chart: {result.chart_path}\n" in shown.partition("Picture: ")[0]
    assert f"Picture: {result.path}" in shown
    chart = result.chart_path.read_text("utf-8")
    assert all(size(each) in chart for each in sampling)
    installed = [path.name for path in (tmp_path / "base" / "custom_nodes").iterdir()]
    assert installed == [PACK_NAME], "nothing may be widened"
