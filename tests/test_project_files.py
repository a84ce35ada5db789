"""What the project's texts name exists: files, commands, versions, nodes.

What each check refuses is shown at the end.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pack import run
from pack.runner import release
from pack.runner.commands import benchmark_names
from pack.tests.architecture_rules import REPO, files, read

TEXTS = [p for p in files(".md") if p.parts[0] not in ("tests", "benchmarks")]
FORMS = [p for p in files(".yml") if p.parent.name == "ISSUE_TEMPLATE"]
WORKFLOWS = [p for p in files(".yml") if p.parent.name == "workflows"]
HOOKS = ".pre-commit-config.yaml"
# What looks like a path but is in a user's ComfyUI, on Hugging Face, or written by a run; and GB/s.
NOT_OURS = {
    "Comfy-Org", "ComfyUI", "Tongyi-MAI", "diffusion_models", "models", "scheduler",
    "text_encoders", "vae", "z_image_low_vram", ".card", "report.md", "GB",
}  # fmt: skip
PLACEHOLDER = re.compile(r"[A-Z]{3,}|[\u4e00-\u9fff]|<")  # "bench NAME", "--models 目录"


def code_of(markdown: str) -> list[str]:
    """Code spans, which may go over a line's end, and the lines of indented blocks."""
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", markdown)]
    lines = re.findall(r"^ {4}(?:\$ )?(\S.*)$", markdown, re.MULTILINE)
    return [*spans, *lines]


def commands_of(code: str) -> list[list[str]]:
    """The arguments of each call of run.py, without a comment, a placeholder or an ellipsis."""
    found = re.findall(r"python run\.py ([^#\n]+)", code)
    return [words for text in found if not PLACEHOLDER.search(text) and (words := text.split())]


def wrong_command(words: list[str]) -> str | None:
    """What run.py says against a command; None where it would run."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            options, rest = run.parse([word for word in words if word != "--help"])
    except SystemExit:
        return said.getvalue().strip().splitlines()[-1]
    name = getattr(options, "name", None)
    if name is not None and name not in benchmark_names():
        return f"no benchmark {name}"
    named = [word for word in rest if "/" in word and not (REPO / word.split("::")[0]).exists()]
    return f"no file {named[0]}" if named else None


def paths_of(code: str) -> list[str]:
    """What is written like a path of this repository."""
    found = re.findall(
        r"(?<![\w./-])([\w.-]+/[\w./-]*|[\w-]+\.(?:py|md|toml|yml|yaml))(?![\w/*])", code
    )
    return [path for path in found if path.split("/")[0] not in NOT_OURS]


def shell_of(workflow: Any) -> list[str]:
    """Every `run` of a workflow, once for each row of its matrix."""
    texts = []
    for job in workflow["jobs"].values():
        rows = job.get("strategy", {}).get("matrix", {}).get("include", [{}])
        for step in job.get("steps", []):
            for row in rows:
                text = step.get("run", "")
                for name, value in row.items():
                    text = text.replace(f"${{{{ matrix.{name} }}}}", value)
                texts.append(text)
    return texts


def uses_of(workflow: Any) -> list[str]:
    jobs = workflow["jobs"].values()
    steps = [step for job in jobs for step in job.get("steps", [])]
    return [entry["uses"] for entry in [*jobs, *steps] if "uses" in entry]


def load(path: Any) -> Any:
    return yaml.safe_load(read(Path(path)))


def conflicts_of(text: str) -> list[str]:
    """The marks that a merge left."""
    return [line for line in text.splitlines() if re.match(r"(<{7}|>{7}) \S", line)]


def test_no_merge_left_its_marks() -> None:
    texts = files(".md", ".py", ".json", ".js", ".toml", ".yml")
    assert [str(p) for p in texts if conflicts_of(read(p))] == []
    assert conflicts_of("a\n" + "<" * 7 + " HEAD\nb") == ["<" * 7 + " HEAD"]


def test_the_texts_are_found():
    names = {path.as_posix() for path in TEXTS}
    assert names >= {"README.md", "README.zh.md", "CONTRIBUTING.md", "CHANGELOG.md"}
    assert names >= {
        "docs/developing.md",
        "js/docs/ZImageLeanVAE.md",
        "js/docs/ZImageLeanVAE/zh.md",
    }
    assert {path.name for path in FORMS} == {
        "bug-report.yml",
        "card-report.yml",
        "feature-request.yml",
    }
    assert {path.name for path in WORKFLOWS} == {"publish.yml", "test.yml"}


@pytest.mark.parametrize("path", TEXTS, ids=str)
def test_commands_in_texts_run(path):
    commands = [command for code in code_of(read(path)) for command in commands_of(code)]
    assert [(c, why) for c in commands if (why := wrong_command(c))] == []
    if path.name in ("README.md", "README.zh.md", "CONTRIBUTING.md", "developing.md"):
        assert len(commands) >= 3


@pytest.mark.parametrize("path", TEXTS, ids=str)
def test_paths_in_texts_exist(path):
    # A changelog names what was there when it was written.
    named = (
        [] if path.name == "CHANGELOG.md" else [p for c in code_of(read(path)) for p in paths_of(c)]
    )
    assert [name for name in named if not (REPO / name).exists()] == []


def test_the_newest_release_is_the_version_that_would_be_published():
    newest = next(iter(release.releases(read(Path("CHANGELOG.md")))))
    assert newest == release.project_version(read(Path("pyproject.toml")))
    assert (
        release.disagreements(
            f"v{newest}", *map(read, map(Path, ("pyproject.toml", "CHANGELOG.md")))
        )
        == []
    )


@pytest.mark.parametrize("path", WORKFLOWS, ids=str)
def test_workflows_call_what_exists(path):
    workflow = load(path)
    shell = shell_of(workflow)
    commands = [command for text in shell for command in commands_of(text)]
    assert [(c, why) for c in commands if (why := wrong_command(c))] == []
    modules = [name for text in shell for name in re.findall(r"python -m ([\w.]+)", text)]
    assert [m for m in modules if not (REPO / f"{m.replace('.', '/')}.py").is_file()] == []
    assert commands or modules
    for used in uses_of(workflow):
        assert (
            (REPO / used).is_file()
            if used.startswith("./")
            else re.fullmatch(r"[\w-]+/[\w-]+@v\d+", used)
        )


def test_both_systems_run_the_tests_and_a_tag_waits_for_them():
    tests, publish = load(".github/workflows/test.yml"), load(".github/workflows/publish.yml")
    (job,) = tests["jobs"].values()
    systems = {row["os"].split("-")[0] for row in job["strategy"]["matrix"]["include"]}
    assert systems == {"ubuntu", "windows"}
    # YAML 1.1 reads the key `on` as true.
    assert {"push", "pull_request", "workflow_call"} <= set(tests[True])
    assert publish["jobs"]["publish"]["needs"] == "test"
    assert publish["jobs"]["test"]["uses"].endswith("/test.yml")


def test_the_cache_is_made_again_when_a_version_changes():
    (job,) = load(".github/workflows/test.yml")["jobs"].values()
    (key,) = [step["with"]["key"] for step in job["steps"] if "cache" in step.get("uses", "")]
    (named,) = re.findall(r"hashFiles\((.+?)\)", key)
    names = re.findall(r"'(.+?)'", named)
    assert "torch==" in read(Path(names[1]))
    assert "pytest==" in read(Path(names[0]))


def test_the_secret_is_the_one_that_the_release_list_names():
    secrets = set(re.findall(r"secrets\.(\w+)", read(Path(".github/workflows/publish.yml"))))
    assert len(secrets) == 1
    assert f"`{secrets.pop()}`" in read(Path("docs/developing.md"))


def test_the_hook_runs_the_checks():
    hooks = [hook for repo in load(HOOKS)["repos"] for hook in repo["hooks"]]
    commands = [command for hook in hooks for command in commands_of(hook["entry"])]
    assert commands == [["check"]]
    assert wrong_command(commands[0]) is None


@pytest.mark.parametrize("path", FORMS, ids=str)
def test_forms_are_whole(path):
    form = load(path)
    assert {"name", "description", "labels", "body"} <= set(form)
    kinds = {"markdown", "input", "textarea", "dropdown", "checkboxes"}
    assert {part["type"] for part in form["body"]} <= kinds
    ids = [part["id"] for part in form["body"] if part["type"] != "markdown"]
    assert len(ids) == len(set(ids)) >= 3
    labels = [
        part["attributes"].get("label") for part in form["body"] if part["type"] != "markdown"
    ]
    assert all(labels)
    assert all(f"`{label}`" in read(Path("docs/developing.md")) for label in form["labels"])


def test_the_bug_form_names_the_nodes_and_the_menu_as_they_are():
    form = load(".github/ISSUE_TEMPLATE/bug-report.yml")
    (nodes,) = [part["attributes"]["options"] for part in form["body"] if part.get("id") == "nodes"]
    sources = [read(p) for p in files(".py") if len(p.parts) == 2 and p.parts[0] == "nodes"]
    shown = [name for source in sources for name in re.findall(r'display_name="(.+?)"', source)]
    assert sorted(nodes) == sorted(name for name in shown if name in nodes)
    assert len(nodes) == len(json.loads(read(Path("locales/zh/nodeDefs.json"))))
    menu = json.loads(read(Path("locales/en/main.json")))["zImageVramProbe"]["issue"]
    assert f'"{menu}"' in read(Path(".github/ISSUE_TEMPLATE/bug-report.yml"))
    assert f'"{menu}"' in " ".join(read(Path("CONTRIBUTING.md")).split())


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("python run.py tests", "invalid choice"),
        ("python run.py test --slow", "unrecognized arguments"),
        ("python run.py test --host 0.1.0", "invalid choice"),
        ("python run.py test -- tests/vae/test_none.py", "no file"),
        ("python run.py bench none", "no benchmark"),
    ],
)
def test_a_wrong_command_is_seen(command, why):
    (words,) = [
        c for code in code_of(f"so:\n\n    $ {command}  # why\n") for c in commands_of(code)
    ]
    assert why in (wrong_command(words) or "")
    (words,) = [
        c
        for code in code_of(f"so `{command.replace(' ', chr(10), 1)}`.")
        for c in commands_of(code)
    ]
    assert why in (wrong_command(words) or "")


@pytest.mark.parametrize(
    "name", ["harness/rows.py", "nodes/memory/", "tests/tiny_models.py", "setup.py"]
)
def test_a_wrong_path_is_seen(name):
    (path,) = [
        p for code in code_of(f"see `{name}`, `models/vae` and `a / b`") for p in paths_of(code)
    ]
    assert not (REPO / path).exists()


@pytest.mark.parametrize(
    ("tag", "project", "changelog", "count"),
    [
        ("v1.0.0", 'version = "1.0.0"', "## [Unreleased]\n\n## [1.0.0] - 2027-01-31\n\n- A\n", 0),
        ("v1.0.1", 'version = "1.0.0"', "## [1.0.0] - 2027-01-31\n\n- A\n", 2),
        ("v1.0.1", 'version = "1.0.1"', "## [1.0.0] - 2027-01-31\n\n- A\n", 1),
        ("v1.0.1", 'version = "1.0.0"', "## [1.0.1] - 2027-01-31\n\n- A\n", 1),
        ("1.0.0", 'version = "1.0.0"', "## [1.0.0] - 2027-01-31\n\n- A\n", 2),
        ("v1.0.0", 'version = "1.0.0"', "## [1.0.0]\n\n- not dated\n", 1),
        (
            "v1.0.0",
            'version = "1.0.0"',
            "## [1.0.0] - 2027-01-31\n\n## [0.9.0] - 2026-01-01\n\n- A\n",
            1,
        ),
        ("v1.0.0", "", "", 2),
    ],
)
def test_what_a_release_check_refuses(tag, project, changelog, count):
    assert len(release.disagreements(tag, project, changelog)) == count
