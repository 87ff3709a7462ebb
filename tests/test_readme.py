"""The README says what is so: its snippet runs, its commands exist, its table is the committed one."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from replication import __main__
from replication import tasks as experiments
from replication.__main__ import main
from replication.notebooks import notebook_names, notebook_path
from replication.records import ROOT
from replication.tasks import grid

README = (ROOT / "README.md").read_text()


def fenced(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_python_snippet_runs():
    (snippet,) = fenced("python")
    done = subprocess.run([sys.executable, "-c", snippet], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_make_targets_exist():
    targets = set(re.findall(r"\bmake ([a-z]+)\b", README)) - {"it"}
    assert {"reproduce", "test", "smoke", "bench", "lab", "help"} <= targets
    missing = targets - set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert not missing


COMMANDS = re.findall(r"`python -m replication ([^`]+)`", README)
MAKES = re.findall(r"`make ([^`]+)`|^make (\w+)", README, re.MULTILINE)


@pytest.mark.parametrize("command", dict.fromkeys(COMMANDS), ids=lambda command: " ".join(command.split()))
def test_command_runs(command, tmp_path, monkeypatch, capsys):
    """All of it but for training, path probabilities and kernels, in whose place is what says that it was called."""
    called = []

    def ensure_runs(tasks, methods, seeds, profile, *_):
        called.append("run")
        return [SimpleNamespace(ok=True)] * len({c for task in tasks for c in grid(task, profile, methods, seeds)})

    monkeypatch.setattr(experiments, "EmbeddingLoss", lambda *_: None)  # as if its weights were there
    monkeypatch.setattr(__main__, "ensure_runs", ensure_runs)
    monkeypatch.setattr(__main__, "compute_importance", lambda *_: called.append("importance"))
    monkeypatch.setattr(__main__, "run_notebook", lambda name, *_: called.append("notebook") or notebook_path(name))
    arguments = shlex.split(command)
    assert main([*arguments, "--output", str(tmp_path)]) == 0 and capsys.readouterr().out
    assert called == ([arguments[0]] if arguments[0] in ("run", "importance", "notebook") else []) and not list(
        tmp_path.iterdir()
    )


@pytest.mark.parametrize("command", dict.fromkeys("".join(found) for found in MAKES))
def test_make_command_parses(command):
    subprocess.run(["make", "-n", *shlex.split(command)], cwd=ROOT, check=True, capture_output=True)


def test_there_are_commands():
    assert len(COMMANDS) >= 8 and len(MAKES) >= 6


def test_named_files_exist():
    names = re.findall(r"\]\(([^)#:]+)\)", README)
    assert len(names) >= 2
    missing = [name for name in names if not (ROOT / name).exists()]
    assert not missing


def test_every_notebook_is_listed():
    assert notebook_names() and set(re.findall(r"^\| `(\d\d_\w+)` \|", README, re.MULTILINE)) == set(notebook_names())


@pytest.mark.parametrize("name", ["table_1"])
def test_table_is_the_committed_one(name):
    block = re.search(rf"<!-- begin {name} -->\n(.*?)<!-- end {name} -->", README, re.DOTALL).group(1).strip()
    rows = [
        line
        for line in Path(ROOT / "results/quick/tables" / f"{name}.md").read_text().splitlines()
        if line.startswith("|")
    ]
    assert len(rows) > 5 and block == "\n".join(rows)
