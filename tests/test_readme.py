"""The README says what is so: its snippet runs, its commands exist, its table is the committed one."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from scrapl_lib.__main__ import parser
from scrapl_lib.execute import notebook_names
from scrapl_lib.records import ROOT

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


def test_commands_parse():
    commands = re.findall(r"`python -m scrapl_lib ([^`]+)`", README)
    assert len(commands) >= 3
    for command in commands:
        assert parser().parse_args(shlex.split(command)).function


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
    rows = [line for line in Path(ROOT / "results/quick/tables" / f"{name}.md").read_text().splitlines() if line.startswith("|")]
    assert len(rows) > 5 and block == "\n".join(rows)
