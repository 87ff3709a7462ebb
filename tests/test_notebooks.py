"""The papermill runner: every way a notebook can end, and every parameter it must refuse. No number is drawn."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import nbformat
import papermill
import pytest

from replication import notebooks
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


@pytest.mark.parametrize("surroundings", ["as they are", "no home, no locks, no locale"])
def test_success_converts_parameters_and_hands_over_profile_and_output(tmp_path, monkeypatch, capfd, surroundings):
    if surroundings != "as they are":
        for name, value in {"HOME": "/dev/null/home", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": ""}.items():
            monkeypatch.setenv(name, value)
        unsupported = OSError(errno.EOPNOTSUPP, "Operation not supported")
        monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(unsupported))
    path, output = tmp_path / "tiny.ipynb", tmp_path / "a{b} θ"
    notebook(tmp_path, set_up(path), "import sys\nprint(vars(config))\nprint(sys.executable, 'θ')")
    done = run_notebook(path, {"steps": "1e3", "rate": "2", "live": "false"}, "smoke", output)
    assert done == output / "executed/smoke/tiny.ipynb" and not (output / "executed/failed").exists()
    expected = {"profile": "smoke", "output": str(output), "steps": 1000, "rate": 2.0, "live": False}
    assert nbformat.read(done, as_version=4).cells[-1].outputs[0].text == f"{expected}\n{sys.executable} θ\n"
    assert {file.name for file in done.parent.iterdir()} == {".tiny.lock", "tiny.ipynb"}
    assert ("supports no locks" in capfd.readouterr().err) == (surroundings != "as they are")


@pytest.mark.parametrize(
    "source, reason, earlier",
    [
        ("1\nraise KeyError('boom')", "KeyError: 'boom'", False),
        ("import sys; sys.exit(0)", "SystemExit", False),
        ("import os; os._exit(0)", "the kernel died", True),
    ],
)
def test_failure_names_notebook_cell_and_log_and_marks_nothing_done(tmp_path, source, reason, earlier):
    good = tmp_path / "executed/quick/tiny.ipynb"
    if earlier:
        good.parent.mkdir(parents=True)
        good.write_text("the last good copy")
    path = notebook(tmp_path, "print('before')", source, "print('after')")
    with pytest.raises(NotebookFailed, match=reason) as failure:
        run_notebook(path, {"steps": 5}, "quick", tmp_path)
    error, first_line = failure.value, source.splitlines()[0]
    assert error.notebook == "tiny" and error.exit_status == 1 and error.log == tmp_path / "executed/failed/tiny.log"
    assert error.cell == f"code cell 3 ({first_line!r})" and str(error.log) in str(error)
    banner, statuses, log = failed_copy(tmp_path)
    assert reason in banner and statuses[-2:] == ["completed", "failed"]
    assert "'steps': 5" in log and source in log and "\x1b" not in log
    assert good.read_text() == "the last good copy" if earlier else not good.exists()


def test_a_failure_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "executed").mkdir()
    (tmp_path / "executed/failed").write_text("in the way")
    with pytest.raises(NotebookFailed, match="ZeroDivisionError.*no log or copy could be written"):
        run_notebook(notebook(tmp_path, "1/0"), output=tmp_path)


def alive(pid):
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as stat:  # a zombie waits for a parent that may be nobody's business
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


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
    deadline = time.monotonic() + 300
    while not (child.exists() and child.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    pid = int(child.read_text())
    try:
        process.send_signal(number)
        said = process.communicate(timeout=180)[1]
        assert process.returncode == 128 + number
        assert "notebook tiny failed at code cell 3" in said and f"stopped by {number.name}" in said
        assert failed_copy(tmp_path)[1][-1] == "failed" and not (tmp_path / "executed/quick/tiny.ipynb").exists()
        while alive(pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not alive(pid)
    finally:
        process.kill()
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


# ---- several --------------------------------------------------------------------------------------------------------


def test_several_notebooks_run_side_by_side_between_the_first_and_the_last(tmp_path, monkeypatch):
    """Each writes when it began and ended; "a" and "b" wait for one another, as only notebooks side by side can."""
    source = """
import os, time
from pathlib import Path
folder, name = Path({folder!r}), {name!r}
(folder / f"{{name}}.began").write_text(str(time.monotonic()))
while name in "ab" and not (folder / f"{{'ba'['ab'.index(name)]}}.began").exists():
    time.sleep(0.05)
    assert time.monotonic() < {deadline}
(folder / f"{{name}}.ended").write_text(f"{{time.monotonic()}} {{os.environ.get('OMP_NUM_THREADS')}} {{steps}}")
"""
    names, about = ["a", "first", "b", "last"], {"folder": str(tmp_path), "deadline": time.monotonic() + 120}
    paths = [str(notebook(tmp_path, source.format(name=name, **about), name=name)) for name in names]
    monkeypatch.setattr(notebooks, "ALONE", ("first",))
    monkeypatch.setattr(notebooks, "LAST", ("last",))
    monkeypatch.setattr(notebooks, "n_cores", lambda: 2)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    done = run_notebooks(paths, {"steps": "5"}, "smoke", tmp_path)
    assert done == [tmp_path / f"executed/smoke/{name}.ipynb" for name in names] and all(map(os.path.isfile, done))
    began = {name: float((tmp_path / f"{name}.began").read_text()) for name in names}
    ended = {name: (tmp_path / f"{name}.ended").read_text().split() for name in names}
    assert float(ended["first"][0]) < min(began["a"], began["b"])
    assert max(float(ended["a"][0]), float(ended["b"][0])) < began["last"]
    assert [ended[name][1:] for name in names] == [["1", "5"], ["7", "5"], ["1", "5"], ["7", "5"]]


def test_one_of_several_fails_and_stops_the_others(tmp_path, capfd, monkeypatch):
    began = tmp_path / "began"
    slow = notebook(tmp_path, f"import time\nopen({str(began)!r}, 'w')\ntime.sleep(300)", name="slow")
    wait = f"import os, time\nwhile not os.path.exists({str(began)!r}): time.sleep(0.1)\n1/0"
    never = notebook(tmp_path, name="never")
    monkeypatch.setattr(notebooks, "n_cores", lambda: 2)
    with pytest.raises(SystemExit) as stopped:
        run_notebooks([str(slow), str(notebook(tmp_path, wait, name="bad")), str(never)], output=tmp_path)
    said = capfd.readouterr().err
    assert stopped.value.code == 1
    assert "error: notebook bad failed at code cell 2" in said and "ZeroDivisionError" in said
    assert not list((tmp_path / "executed/quick").glob("[a-z]*.ipynb"))
    assert sorted(file.name for file in (tmp_path / "executed/failed").glob("*.log")) == ["bad.log", "slow.log"]


def test_one_of_several_is_killed_and_named(tmp_path, capfd):
    killed = notebook(tmp_path, "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)", name="killed")
    with pytest.raises(SystemExit) as stopped:
        run_notebooks([str(killed)], output=tmp_path)
    assert stopped.value.code == 137
    assert "error: notebook killed: its process ended with status -9" in capfd.readouterr().err


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
            raise NotebookFailed("tiny", "a cell", "a reason", done, 1)
        done.write_text(json.dumps({"metadata": {"request": request}}))

    def run():
        with suppress(NotebookFailed):
            results.append(run_notebook(path, output=tmp_path))

    monkeypatch.setattr(notebooks, "_execute", slow)
    fails = False
    run_notebook(path, output=tmp_path)  # an earlier success is none of a waiter's business
    calls.clear()
    fails = first_fails
    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
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
        ({"live": "yes"}, TypeError, "live must be True or False"),
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
    lines = ["steps: int = 3", "steps = 3  # n", "steps: int = 'a'  # n", "rate: float = 1  # r", "import os"]
    lines += ["steps: int = len('a')  # n", "x: list = []  # l", "a: int = 1; b: int = 2  # two", "a: int = 1  #"]
    for line in [*lines, "a: int = 1  # one\na: int = 2  # twice"]:
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


def test_set_up_refuses_what_papermill_only_warns_of(tmp_path):
    """A misspelt name, and text for a number; 1e3, which papermill reads as a float, becomes the int that is meant."""
    path = notebook(tmp_path, set_up(tmp_path / "tiny.ipynb"), "assert type(config.steps) is int")
    match = "unknown parameter of tiny 'profil': did you mean 'profile'"
    with pytest.raises(papermill.PapermillExecutionError, match=match):
        papermill.execute_notebook(path, tmp_path / "out.ipynb", {"profil": "quick"}, cwd=ROOT)
    papermill.execute_notebook(path, tmp_path / "out.ipynb", {"steps": 1e3}, cwd=ROOT)


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
