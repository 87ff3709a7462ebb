"""The papermill runner: every way a notebook can end, and every parameter it must refuse. No number is drawn."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from unittest.mock import Mock

import nbformat
import pytest
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from replication import notebooks
from replication.__main__ import parser
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


def set_up(path):
    return f"from replication.notebooks import setup\nconfig = setup(globals(), {str(path)!r})"


def failed_copy(output):
    """The failed copy's text and papermill status by cell, and the log."""
    cells = nbformat.read(output / "executed/failed/tiny.ipynb", as_version=4).cells
    assert not list(output.glob("executed/*/.*.tmp")) and not list(output.glob("executed/*/.*.ipynb"))
    statuses = [cell.metadata.get("papermill", {}).get("status") for cell in cells if cell.cell_type == "code"]
    return cells[0].source, statuses, (output / "executed/failed/tiny.log").read_text(encoding="utf-8")


def test_success_converts_parameters_and_hands_over_profile_and_output(tmp_path, monkeypatch, capfd):
    """Also with no home, no locks and no locale."""
    for name, value in {"HOME": "/dev/null/home", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": ""}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(fcntl, "flock", Mock(side_effect=OSError(errno.EOPNOTSUPP, "Operation not supported")))
    monkeypatch.setenv("TR808_DIR", os.path.relpath(tmp_path))
    path, output = tmp_path / "tiny.ipynb", tmp_path / "a{b} θ"
    notebook(
        tmp_path, set_up(path), "import os, sys\nprint(vars(config), sys.executable, os.environ['TR808_DIR'], 'θ')"
    )
    done = run_notebook(path, {"steps": "1e3", "rate": "2", "live": "false"}, "smoke", output)
    assert done == output / "executed/smoke/tiny.ipynb" and not (output / "executed/failed").exists()
    expected = {"profile": "smoke", "output": str(output), "steps": 1000, "rate": 2.0, "live": False}
    printed = nbformat.read(done, as_version=4).cells[-1].outputs[0].text
    assert printed == f"{expected} {sys.executable} {tmp_path} θ\n"
    assert {file.name for file in done.parent.iterdir()} == {".tiny.lock", "tiny.ipynb"}
    assert "supports no locks" in capfd.readouterr().err


ENDS = [("1\nraise KeyError('boom')", "KeyError: 'boom'"), ("import sys; sys.exit(0)", "SystemExit")]


@pytest.mark.parametrize("source, reason", [*ENDS, ("import os; os._exit(0)", "the kernel died")])
def test_failure_names_notebook_cell_and_log_and_marks_nothing_done(tmp_path, source, reason):
    good = tmp_path / "executed/quick/tiny.ipynb"
    good.parent.mkdir(parents=True)
    good.write_text("the last good copy")
    path = notebook(tmp_path, "print('before')", source, "print('after')")
    with pytest.raises(NotebookFailed) as failure:
        run_notebook(path, {"steps": 5}, "quick", tmp_path)
    words = str(failure.value)
    assert failure.value.exit_status == 1 and reason in words and f"{tmp_path}/executed/failed/tiny.log" in words
    assert words.startswith(f"notebook tiny failed at code cell 3 ({source.splitlines()[0]!r}): ")
    banner, statuses, log = failed_copy(tmp_path)
    assert reason in banner and statuses[-2:] == ["completed", "failed"]
    assert "'steps': 5" in log and source in log and "\x1b" not in log
    assert good.read_text() == "the last good copy"


def alive(pid):
    """Whether a process runs; a zombie, which waits for a parent that may be nobody's business, does not."""
    with suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/{pid}/status") as status:
        return "\nState:\tZ" not in status.read()
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


# ---- several --------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("first_fails, computed", [(False, 1), (True, 2)])
def test_of_two_runs_on_one_output_one_computes_and_the_other_waits(
    tmp_path, monkeypatch, capfd, first_fails, computed
):
    path, calls, results = notebook(tmp_path), [], []
    done = tmp_path / "executed/quick/tiny.ipynb"

    def slow(_path, values, request, done, _failed):
        calls.append(values)
        time.sleep(0.5)
        if fails and len(calls) == 1:
            raise NotebookFailed("why", 1)
        done.write_text(json.dumps({"metadata": {"request": request}}))

    def run(_):
        with suppress(NotebookFailed):
            results.append(run_notebook(path, output=tmp_path))

    monkeypatch.setattr(notebooks, "_execute", slow)
    fails = False
    run_notebook(path, output=tmp_path)  # an earlier success is none of a waiter's business
    calls.clear()
    fails = first_fails
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, range(2)))
    assert len(calls) == computed and results == [done] * (3 - computed)
    assert "another process executes it" in capfd.readouterr().err
    run_notebook(path, output=tmp_path)  # a later call computes again
    assert len(calls) == computed + 1


# ---- parameters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, error, match",
    [
        ({"profil": "quick"}, ValueError, "unknown parameter of tiny 'profil': did you mean 'profile'"),
        ({"steps": "many"}, TypeError, "steps must be a whole number .int., got 'many' .str."),
        ({"steps": "2.5"}, TypeError, "got 2.5"),
        ({"steps": True}, TypeError, "got True"),
        ({"rate": "nan"}, TypeError, "rate must be a finite number"),
        ({"live": 1}, TypeError, "live must be True or False"),
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
    """In the cell that papermill adds: of a misspelt name it only warns, and it reads 1e3 as a float."""
    path = notebook(tmp_path)

    def handed_over(**values):
        book = parameterize_notebook(load_notebook_node(str(path)), values, kernel_name="python3", language="python")
        namespace = {"In": ["", *(cell.source for cell in book.cells if cell.cell_type == "code")]}
        for source in namespace["In"]:
            exec(source, namespace)
        return setup(namespace, path)

    with pytest.raises(ValueError, match="unknown parameter of tiny 'profil': did you mean 'profile'"):
        handed_over(profil="quick")
    assert repr(handed_over(steps=1e3).steps) == "1000"


@pytest.mark.parametrize(
    "change, error, match",
    [
        ({"__annotations__": {"stepss": int}}, ValueError, "unknown parameter of tiny 'stepss': did you mean 'steps'"),
        ({"In": ["", '# Parameters\nrat = float("inf")\n']}, ValueError, "'rat': did you mean 'rate'"),
        ({"steps": 2.5}, TypeError, "steps must be a whole number"),
        ({"steps": "3"}, TypeError, "steps must be a whole number"),
        ({"profile": 5}, TypeError, "profile must be a text"),
        ({"profile": "papr"}, ValueError, "unknown profile 'papr': did you mean 'paper'"),
        ({"steps": None}, ValueError, "no value for steps; run the parameters cell first"),
        ({"In": ["", "x = 1", "%time"], "steps": 3.0, "rate": 2, "batch": 4}, None, ""),  # again, after other cells
    ],
)
def test_setup_refuses(tmp_path, change, error, match):
    namespace = {name: value for name, value in (VALUES | change).items() if value is not None}
    if error is None:
        assert repr(vars(setup(namespace, notebook(tmp_path)))) == repr(VALUES | {"rate": 2.0})
    else:
        with pytest.raises(error, match=match):
            setup(namespace, notebook(tmp_path))
