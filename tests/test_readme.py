"""README and docs/ say what is so: snippets run, commands and files exist, the table is the committed one."""

import importlib
import re
import shlex
import subprocess

import pytest

from replication.__main__ import parser
from replication.notebooks import notebook_names
from replication.records import ROOT
from replication.tasks import METHODS, PROFILES, TASKS

TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in sorted(ROOT.glob("docs/*.md"))}
TEXTS = {"README.md": (ROOT / "README.md").read_text("utf-8")} | TEXTS
TESTED_ELSEWHERE = "docs/training_loops.md"  # its snippets
EVERYTHING = "\n".join(TEXTS.values())


def blocks(language):
    return [
        (name, block)
        for name, text in TEXTS.items()
        for block in re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    ]


LINES = [line.partition(" #")[0].strip() for _, block in blocks("sh") for line in block.splitlines()]
COMMANDS = dict.fromkeys(LINES + re.findall(r"`((?:make|python) [^`]+)`", EVERYTHING))
SNIPPETS = [snippet for snippet in blocks("python") if snippet[0] != TESTED_ELSEWHERE]


@pytest.mark.parametrize("name, snippet", SNIPPETS, ids=[name for name, _ in SNIPPETS])
def test_python_snippet_runs(name, snippet, monkeypatch):
    monkeypatch.chdir(ROOT)
    exec(compile(snippet, name, "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("command", COMMANDS)
def test_command_exists(command):
    """Targets of the Makefile; options, tasks, methods, profiles and notebooks of the command line; scripts."""
    program, *arguments = shlex.split(command)
    if program == "make":
        subprocess.run(["make", "-n", *arguments], cwd=ROOT, check=True, capture_output=True)
    elif arguments[:2] == ["-m", "replication"]:
        args = vars(parser().parse_args([word for word in arguments[2:] if word not in ("--help", "...")]))
        for name, valid in {"task": [*TASKS], "method": [*METHODS, "NAME"], "profile": PROFILES}.items():
            given = args.get(name) or valid[0]
            assert set(given.split(",") if isinstance(given, str) else given) <= set(valid)
        assert set(args.get("names", [])) <= set(notebook_names())
    else:
        script = ROOT / arguments[0]
        assert script.is_file() and all(flag in script.read_text() for flag in arguments[1:] if flag.startswith("--"))


def test_there_is_something_to_check():
    assert len(TEXTS) >= 8 and len(COMMANDS) >= 15 and len(SNIPPETS) >= 2
    assert len(TEXTS["README.md"].splitlines()) <= 150
    assert {"make reproduce", "make test", "python -m replication status"} <= set(COMMANDS)


@pytest.mark.parametrize("name", TEXTS)
def test_links_and_named_files_exist(name):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", TEXTS[name])
    assert not [link for link in links if not ((ROOT / name).parent / link).exists()]
    folders = "replication|scrapl_lib|results|figures|notebooks|benchmarks|tests"
    assert not [file for file in re.findall(rf"`((?:{folders})/[^`<*:]+)`", TEXTS[name]) if not (ROOT / file).exists()]


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`((?:replication|scrapl_lib)(?:\.\w+)+)", EVERYTHING))))
def test_named_code_exists(name):
    package, module, *attributes = name.split(".")
    found = importlib.import_module(package)
    found = getattr(found, module, None) or importlib.import_module(f"{package}.{module}")
    for attribute in attributes:
        found = getattr(found, attribute)


def test_every_page_and_every_notebook_is_listed():
    listed = re.findall(r"^\| `(\d\d_\w+)` \|", TEXTS["README.md"], re.MULTILINE)
    assert listed == notebook_names()
    pages = re.findall(r"^\| \[(docs/\w+\.md)\]", TEXTS["README.md"], re.MULTILINE)
    assert {"README.md", *pages} == set(TEXTS)


def test_table_is_the_committed_one():
    found = re.search(r"<!-- begin table_1 -->\n(.*?)\n<!-- end table_1 -->", TEXTS["README.md"], re.DOTALL)[1]
    written = (ROOT / "results/quick/tables/table_1.md").read_text("utf-8").splitlines()
    rows = [line for line in written if line.startswith("|")]
    assert len(rows) > 5 and found == "\n".join(rows)
