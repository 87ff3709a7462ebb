"""The papermill runner: every way a notebook can end, and every parameter it must refuse. No number is drawn."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import nbformat
import psutil
import pytest
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from replication import notebooks
from replication.__main__ import main, parser
from replication.notebooks import NotebookFailed, notebook_path, parameters_of, run_notebook, run_notebooks, setup
from replication.records import ROOT

PARAMETERS = """\
profile: str = "quick"  # which problem
output: str = ""  # folder; empty: the project

steps: int = 3  # how many # or so
  # a comment
rate: float = 0.5  # per step
live: bool = True  # train something
"""
VALUES = {"profile": "quick", "output": "", "steps": 3, "rate": 0.5, "live": True}


def notebook(folder, *sources, parameters=PARAMETERS, name="tiny"):
    cells = [nbformat.v4.new_markdown_cell("# Tiny"), nbformat.v4.new_code_cell(parameters)]
    cells[1].metadata["tags"] = ["parameters"]
    path = folder / f"{name}.ipynb"
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    cells += [nbformat.v4.new_code_cell(source) for source in sources]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), path)
    return path


SET_UP = "from replication.notebooks import setup\nconfig = setup(globals(), {!r})"


def failed_copy(output):
    """The failed copy's text and papermill status by cell, and the log."""
    cells = nbformat.read(output / "executed/failed/tiny.ipynb", as_version=4).cells
    assert not list(output.glob("executed/*/.*.tmp")) and not list(output.glob("executed/*/.*.ipynb"))
    statuses = [cell.metadata.get("papermill", {}).get("status") for cell in cells if cell.cell_type == "code"]
    return cells[0].source, statuses, (output / "executed/failed/tiny.log").read_text(encoding="utf-8")


def test_success_converts_parameters_and_hands_over_profile_and_output(tmp_path, monkeypatch):
    """Also with no home and no locale."""
    for name, value in {"HOME": "/dev/null/home", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": ""}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TR808_DIR", os.path.relpath(tmp_path))
    output = tmp_path / "a{b} θ"
    show = "import os, sys\nprint(vars(config), sys.executable, os.environ['TR808_DIR'], 'θ')"
    path = notebook(tmp_path, SET_UP.format(f"{tmp_path}/tiny.ipynb"), show)
    done = run_notebook(path, {"steps": "1e3", "rate": "2", "live": "false"}, "smoke", output)
    assert done == output / "executed/smoke/tiny.ipynb" and not (output / "executed/failed").exists()
    expected = {"profile": "smoke", "output": str(output), "steps": 1000, "rate": 2.0, "live": False}
    printed = nbformat.read(done, as_version=4).cells[-1].outputs[0].text
    assert printed == f"{expected} {sys.executable} {tmp_path} θ\n"
    assert {file.name for file in done.parent.iterdir()} == {".tiny.lock", "tiny.ipynb"}


@pytest.mark.parametrize(
    "source, reason",
    [
        ("1\nraise KeyError('boom')", "KeyError: 'boom'"),
        ("import sys; sys.exit(0)", "SystemExit"),
        ("import os; os.kill(os.getpid(), 9)", "the kernel died"),
    ],
)
def test_failure_names_notebook_cell_and_log_and_marks_nothing_done(tmp_path, capsys, source, reason):
    good = tmp_path / "executed/quick/tiny.ipynb"
    good.parent.mkdir(parents=True)
    good.write_text("the last good copy")
    path = notebook(tmp_path, "print('before')", source, "print('after')")
    assert main(["notebook", str(path), "-p", "steps=5", "--output", str(tmp_path)]) == 1
    _, _, words = capsys.readouterr().err.partition("error: ")
    assert words.startswith(f"notebook tiny failed at code cell 3 ({source.splitlines()[0]!r}): ")
    assert reason in words and f"{tmp_path}/executed/failed/tiny.log" in words
    banner, statuses, log = failed_copy(tmp_path)
    assert reason in banner and statuses[-2:] == ["completed", "failed"]
    assert "'steps': 5" in log and source in log and "\x1b" not in log
    assert good.read_text() == "the last good copy"


def alive(pid):
    """A zombie waits for a parent that may be nobody's business."""
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def wait_until(true, deadline_s=300):
    end = time.monotonic() + deadline_s
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_from_outside_ends_the_kernel_and_its_children(tmp_path, number):
    child, begin = tmp_path / "child", "import subprocess, time\nchild = subprocess.Popen(['sleep', '300'])"
    path = notebook(tmp_path, begin, f"open({str(child)!r}, 'w').write(str(child.pid))\ntime.sleep(300)")
    process = subprocess.Popen(
        [sys.executable, "-m", "replication", "notebook", str(path), "--output", str(tmp_path)],
        cwd=ROOT,
        text=True,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    wait_until(lambda: child.exists() and child.read_text())
    pid = int(child.read_text())
    try:
        process.send_signal(number)
        said = process.communicate(timeout=180)[1]
        assert process.returncode == 128 + number
        assert "notebook tiny failed at code cell 3" in said and f"stopped by {number.name}" in said
        assert failed_copy(tmp_path)[1][-1] == "failed" and not (tmp_path / "executed/quick/tiny.ipynb").exists()
        wait_until(lambda: not alive(pid))
    finally:
        process.kill()
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def in_place_of_python(tmp_path, monkeypatch):
    """Makes a shell script of a text: what processes side by side, two at once, then run; $name is their notebook's."""

    def use(text):
        script = tmp_path / "python"
        script.write_text(f"#!/bin/sh\ncd {tmp_path}\nname=$(basename $4 .ipynb)\n{text}")
        script.chmod(0o755)
        monkeypatch.setattr(notebooks.sys, "executable", str(script))
        monkeypatch.setattr(notebooks, "n_cores", lambda: 2)

    return use


def test_several_notebooks_run_side_by_side_between_the_first_and_the_last(tmp_path, monkeypatch, in_place_of_python):
    """ "a" and "b" wait for one another, as only notebooks side by side can."""
    in_place_of_python("""touch $name
for i in $(seq 300); do [ -e a ] && [ -e b ] && break; sleep 0.1; done
[ -e a ] && [ -e b ] && echo "$name $OMP_NUM_THREADS" >> order
echo "$@" > $name.words""")
    order, names = tmp_path / "order", ["a", "first", "b", "last"]
    monkeypatch.setattr(notebooks, "ALONE", ("first",))
    monkeypatch.setattr(notebooks, "LAST", ("last",))
    monkeypatch.setattr(notebooks, "run_notebook", lambda path, *_: order.open("a").write(f"{path.stem} here\n"))
    paths = [notebook(tmp_path, name=name) for name in names]
    done = run_notebooks(list(map(str, paths)), {"steps": "5"}, "smoke", tmp_path)
    assert done == [tmp_path / f"executed/smoke/{name}.ipynb" for name in names]
    first, *both, last = order.read_text().splitlines()
    assert (first, last) == ("first here", "last here") and sorted(both) == ["a 1", "b 1"]
    args = parser().parse_args((tmp_path / "a.words").read_text().split()[2:])
    assert (args.names, args.parameter) == ([str(paths[0])], ["steps=5"])
    assert (args.profile, str(args.output)) == ("smoke", str(tmp_path))


@pytest.mark.parametrize(
    "end, status, words",
    [
        ("echo because >&2; exit 3", 3, "because\nerror: notebook bad: its process ended with status 3"),
        ("kill -9 $$", 137, "status -9 (-9: out of memory?)"),
    ],
)
def test_one_of_several_fails_and_stops_the_others(tmp_path, capfd, in_place_of_python, end, status, words):
    """ "bad" ends as soon as "slow" waits for its end; "never" should not begin."""
    in_place_of_python(f"""case $name in
  slow) trap 'touch stopped; exit 1' TERM; touch began; while :; do sleep 0.1; done;;
  bad) while [ ! -e began ]; do sleep 0.1; done; {end};;
  never) touch never;;
esac""")
    with pytest.raises(SystemExit) as stopped:
        run_notebooks([str(notebook(tmp_path, name=name)) for name in ("slow", "bad", "never")], output=tmp_path)
    assert stopped.value.code == status and words in capfd.readouterr().err
    assert (tmp_path / "stopped").exists() and not (tmp_path / "never").exists()


@pytest.mark.parametrize("first_fails", [False, True])
def test_of_two_runs_on_one_output_one_computes_and_the_other_waits(tmp_path, monkeypatch, capfd, first_fails):
    """An earlier success is none of a waiter's business, and a later call computes again."""
    path, calls, results = notebook(tmp_path), [], []

    def slow(_path, _values, request, done, _failed):
        calls.append(request)
        time.sleep(0.5)
        if first_fails and len(calls) == 2:
            raise NotebookFailed("why", 1)
        done.write_text(json.dumps({"metadata": {"request": request}}))

    def run(*_):
        with suppress(NotebookFailed):
            results.append(run_notebook(path, output=tmp_path))

    monkeypatch.setattr(notebooks, "_execute", slow)
    run()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, range(2)))
    assert len(calls) == 2 + first_fails and "another process executes it" in capfd.readouterr().err
    run()
    assert len(calls) == 3 + first_fails
    assert results == [tmp_path / "executed/quick/tiny.ipynb"] * (4 - first_fails)


@pytest.mark.parametrize(
    "given, error, match",
    [
        ({"profil": "quick"}, ValueError, "unknown parameter of tiny 'profil': did you mean 'profile'"),
        ({"steps": "many"}, TypeError, "steps must be a whole number .int., got 'many' .str."),
        ({"output": 5}, ValueError, "at once; give it once, as --output"),
        ({"profile": "paper"}, ValueError, "'quick' and 'paper' at once; give it once, as --profile"),
    ],
)
def test_parameters_are_refused_before_anything_starts(tmp_path, given, error, match):
    with pytest.raises(error, match=match):
        run_notebook(notebook(tmp_path), given, output=tmp_path)
    assert not (tmp_path / "executed").exists()


def test_an_unknown_notebook_or_parameter_among_several_is_refused_before_any_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(notebooks, "_run_side_by_side", lambda *_: pytest.fail("started"))
    with pytest.raises(ValueError, match="unknown notebook '05_granula': did you mean '05_granular'"):
        run_notebooks(["09_report_card", "05_granula"], output=tmp_path)
    with pytest.raises(ValueError, match="unknown parameter of 01_paths_and_jtfs 'seed'"):
        run_notebooks(["10_bring_your_own", "01_paths_and_jtfs"], {"seed": "1"}, output=tmp_path)
    with pytest.raises(FileNotFoundError, match="no notebook"):
        notebook_path(tmp_path / "absent.ipynb")


def test_parameters_of_reads_the_cell_and_refuses_another_form(tmp_path):
    assert parameters_of(notebook(tmp_path)) == VALUES
    lines = ["steps = 3", "steps: int = 'a'", "rate: float = 1", "import os", "steps: int = len('a')", "x: list = []"]
    for line in [*lines, "a: int = 1\na: int = 2"]:
        with pytest.raises(ValueError, match="name: type = value"):
            parameters_of(notebook(tmp_path, parameters=line))
    path = tmp_path / "tiny.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1")]), path)
    with pytest.raises(ValueError, match="0 cells tagged 'parameters', expected exactly one"):
        parameters_of(path)
    for text in ("{", json.dumps({"cells": 3}), "[]"):
        path.write_text(text)
        with pytest.raises(ValueError, match="not a notebook"):
            parameters_of(path)


def test_set_up_sees_what_papermill_hands_over(tmp_path):
    """In the cell that papermill adds: of a misspelt name it only warns, and it reads 1e3 as a float. Later cells may
    define what they like, and need not be Python."""
    path = notebook(tmp_path)

    def handed_over(**values):
        book = parameterize_notebook(load_notebook_node(str(path)), values, kernel_name="python3", language="python")
        namespace = {"In": ["", *(cell.source for cell in book.cells if cell.cell_type == "code")]}
        for source in namespace["In"]:
            exec(source, namespace)
        return namespace

    with pytest.raises(ValueError, match="unknown parameter of tiny 'profil': did you mean 'profile'"):
        setup(handed_over(profil="quick"), path)
    namespace = handed_over(steps=1e3, rate=2) | {"batch": 4}
    namespace["In"].append("%time")
    assert repr(vars(setup(namespace, path))) == repr(VALUES | {"steps": 1000, "rate": 2.0})


@pytest.mark.parametrize(
    "change, error, match",
    [
        ({"__annotations__": {"stepss": int}}, ValueError, "unknown parameter of tiny 'stepss': did you mean 'steps'"),
        ({"steps": 2.5}, TypeError, "steps must be a whole number"),
        ({"steps": "3"}, TypeError, "steps must be a whole number"),
        ({"steps": True}, TypeError, "steps must be a whole number"),
        ({"rate": math.nan}, TypeError, "rate must be a finite number"),
        ({"live": 1}, TypeError, "live must be True or False"),
        ({"profile": 5}, TypeError, "profile must be a text"),
        ({"profile": "papr"}, ValueError, "unknown profile 'papr': did you mean 'paper'"),
        ({"steps": None}, ValueError, "no value for steps; run the parameters cell first"),
    ],
)
def test_setup_refuses(tmp_path, change, error, match):
    namespace = {name: value for name, value in (VALUES | change).items() if value is not None}
    with pytest.raises(error, match=match):
        setup(namespace, notebook(tmp_path))
