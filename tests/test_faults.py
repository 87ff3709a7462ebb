"""The twelve faults: FAULTS names the tests that hold each; those that no other file has are below.

`make test` ends with the twelve and how many of their tests passed (conftest.py).
"""

import ast
import errno
import itertools
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pandas as pd
import pytest
import torch
from conftest import assert_same, folder_of, smoke
from test_notebooks import failed_copy, notebook

from replication import __main__, jobs, trainer
from replication.__main__ import main
from replication.checkpoints import checkpoint_folder
from replication.jobs import Pool, ensure_runs
from replication.notebooks import NotebookFailed, notebook_names, notebook_path, run_notebook
from replication.records import COLUMNS, ROOT, read_run
from replication.trainer import Training, train, train_steps

FAULTS = {  # the tests that hold each, in test_<file>.py
    "1 a training worker killed at random steps": """
        faults::test_a_run_killed_at_random_steps_ends_as_if_it_had_not_been
        faults::test_200_runs_with_random_kills_end_with_every_record_whole_and_none_lost
        training::test_a_stopped_run_ends_as_if_it_had_not_been
        training::test_a_run_killed_while_tested_is_not_trained_again
        training::test_a_run_asked_to_stop_writes_a_checkpoint_as_soon_as_its_steps_are_looked_at
        cluster::test_a_job_is_requeued_one_crashes_one_is_killed_and_all_end_as_if_uninterrupted
        cli::test_a_killed_or_crashed_worker_costs_its_own_run_only
        cli::test_a_grid_stopped_by_its_budget_twice_ends_as_if_it_had_not_been
        cli::test_stopping_the_command_ends_its_workers""",
    "2 a notebook's kernel killed, papermill terminated, Ctrl-C": """
        faults::test_after_a_killed_kernel_the_next_call_does_what_is_left
        notebooks::test_stopped_from_outside_ends_the_kernel_and_its_children
        cli::test_stopping_the_command_ends_its_workers""",
    "3 the disk full while a checkpoint, a CSV or a notebook is written": """
        faults::test_a_full_disk_keeps_the_older_checkpoint faults::test_a_full_disk_leaves_no_half_record
        faults::test_a_full_disk_fails_the_notebook_and_keeps_the_last_good_copy
        records::test_failed_write_leaves_the_old_file_and_no_litter
        records::test_killed_write_counts_as_missing_and_its_litter_goes""",
    "4 a checkpoint truncated, empty, one byte flipped, of another configuration": """
        training::test_a_damaged_checkpoint_is_said_and_not_used""",
    "5 audio of the wrong rate, length, channels or dtype, empty or not finite": """
        losses::test_wrong_audio_says_what_is_wrong one_shots::test_a_bad_file_is_refused_by_name""",
    "6 a loss or gradient that is not finite": """
        training::test_a_nonfinite_loss_or_gradient_ends_the_run_for_good
        training::test_where_only_some_steps_are_looked_at_the_failure_names_them_all""",
    "7 saved probabilities or optimizer tables of another number of paths": """
        losses::test_wrong_probabilities_say_what_is_wrong
        optim::test_a_state_of_another_optimizer_or_other_weights_is_refused""",
    "8 an unknown method, profile or parameter, or a wrong type": """
        faults::test_every_notebook_refuses_a_mistyped_profile_in_its_first_cells
        house::test_a_mistyped_method_stops_notebook_05_before_it_draws_or_trains
        cli::test_bad_input_is_refused_in_one_line""",
    "9 duplicate seeds and equal keys; data order and initial weights of other methods": """
        faults::test_what_is_asked_for_twice_is_run_once records::test_copied_record_is_refused
        training::test_methods_start_from_the_same_weights_and_seeds_do_not
        training::test_methods_share_data_order_and_reconstructions_never_have_the_seeds_of_the_data""",
    "10 two processes on one run, two `make reproduce` at once": """
        faults::test_two_make_reproduce_at_once_leave_one_record
        training::test_of_two_processes_on_one_run_one_computes_and_the_other_waits
        records::test_two_writers_and_a_reader_never_see_a_mix""",
    "11 results edited by hand, truncated, a row missing": """
        records::test_damage_is_refused_with_file_expected_found_and_mend
        training::test_a_broken_record_is_refused""",
    "12 CUDA asked for without CUDA; out of memory": """
        training::test_cuda_asked_for_without_cuda_is_refused_at_once
        training::test_out_of_memory_ends_the_run_for_good
        faults::test_after_a_run_out_of_memory_the_next_goes_on""",
}
FAULTS = {fault: [f"test_{test.replace('::', '.py::')}" for test in tests.split()] for fault, tests in FAULTS.items()}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_has_tests(fault):
    for name in FAULTS[fault]:
        file, function = name.split("::")
        tree = ast.parse((ROOT / "tests" / file).read_text())
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, name
    assert len(FAULTS) == 12


# ---- 1: killed workers ----------------------------------------------------------------------------------------------


class Forked:
    """`subprocess.Popen` of `python -m replication ...`, forked from this process, which spares it the imports.

    alarm_s: seconds after which SIGALRM kills it, wherever it is. fatal_write: the file, counted from 1, whose writing
    SIGKILL interrupts, right before it would be renamed into place. None: never.
    """

    def __init__(self, target, alarm_s=None, fatal_write=None, stdout=None, **_):
        def run():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            if stdout is not None:
                sys.stdout = sys.stderr = open(stdout.fileno(), "w", buffering=1, closefd=False)
            if alarm_s is not None:
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.setitimer(signal.ITIMER_REAL, alarm_s)
            if fatal_write is not None:
                writes = itertools.count(1)
                os.fsync = lambda _: next(writes) == fatal_write and os.kill(os.getpid(), signal.SIGKILL)
            target()

        self.process = multiprocessing.get_context("fork").Process(target=run)
        self.process.start()
        self.wait, self.send_signal = self.process.join, lambda number: os.kill(self.process.pid, number)

    @property
    def returncode(self):
        return self.process.exitcode

    def poll(self):
        return self.returncode


@pytest.mark.parametrize("method", ["scrapl_plain", "scrapl_padam", "scrapl_no_theta_is"])  # AdamW, P-Adam, P-SAGA
def test_a_run_killed_at_random_steps_ends_as_if_it_had_not_been(tmp_path, method):
    """SIGKILL after the checkpoint of a step or before it; four of nine steps, drawn with seed 7; the same bits."""
    config, draw = smoke(method, dropout=0.5), random.Random(7)

    def killed_at(step, before_its_checkpoint):
        def killed():
            for run in train_steps(config, tmp_path, checkpoint_every_s=0):
                if run.step == step + (not before_its_checkpoint):
                    os.kill(os.getpid(), signal.SIGKILL)

        return killed

    kills = sorted(draw.sample(range(1, 9), 4))
    for step in kills:
        worker = Forked(killed_at(step, draw.random() < 0.5))
        worker.wait(timeout=120)
        assert worker.returncode == -signal.SIGKILL
    steps = [run.step for run in train_steps(config, tmp_path)]
    assert steps[0] >= kills[-1] and steps == list(range(steps[0], 10))
    assert_same(read_run(folder_of(config, tmp_path)), train(config, tmp_path / "uninterrupted"))


class Tiny:
    """In place of `Training`: a random walk of 12 steps, which is a function of the seed alone."""

    n_steps, looked, stopping, device, loss = 12, True, False, torch.device("cpu"), None

    def __init__(self, config, *_):
        self.config, self.encoder = config, torch.nn.Linear(1, 1, bias=False, dtype=torch.float64)
        self.encoder.weight.data.zero_()
        self.optimizer = torch.optim.SGD(self.encoder.parameters())
        self.step, self.step_s, self.history, self.epoch_losses, self.best_loss = 0, [], [], [], 0.0
        self.best_weights = self.encoder.state_dict()

    def keep_references(self, *_):
        """There are none."""

    def steps(self):
        while self.step < self.n_steps:
            self.step += 1
            self.encoder.weight.data += random.Random(self.config.seed * 1000 + self.step).gauss(0, 1)
            self.best_weights = self.encoder.state_dict()
            self.history.append((self.step, "val", "loss", float(self.encoder.weight.detach()), 0.0))
            time.sleep(0.002)
            yield self.step

    def history_table(self):
        return pd.DataFrame(self.history, columns=COLUMNS["history.csv"])

    def step_ms(self):
        return None


def test_200_runs_with_random_kills_end_with_every_record_whole_and_none_lost(tmp_path, monkeypatch, capfd):
    """Four workers; of the first 300 two in three are killed at one of their 28 writes (seed 11), and twice the command
    itself. Records must hold the values of walks that nobody killed, to the last of 9 digits."""
    draw, killed = random.Random(11), []
    tested = pd.DataFrame([("weight", 0.0, "1")], columns=COLUMNS["test.csv"])
    for name, value in {"Training": Tiny, "CHECKPOINT_EVERY_S": 0, "evaluate": lambda *_: (tested, {})}.items():
        monkeypatch.setattr(trainer, name, value)

    def popen(command, **options):
        def target():
            monkeypatch.setattr(__main__, "PARENT", os.getppid())
            main(command[4:])

        fatal_write = draw.randint(1, 28) if len(killed) < 300 and draw.random() < 2 / 3 else None
        killed.append(fatal_write)
        return Forked(target, None, fatal_write, **options)

    monkeypatch.setattr(jobs, "subprocess", SimpleNamespace(Popen=popen, DEVNULL=subprocess.DEVNULL))

    def ask():
        return ensure_runs(["granular"], ["p_loss"], range(200), "smoke", tmp_path, pool=Pool(tmp_path, "cpu", 4))

    for alarm_s in (1.5, 2.5):
        command = Forked(ask, alarm_s)
        command.wait(timeout=120)
        assert command.returncode == -signal.SIGALRM
    runs = []
    while len(runs) < 200 and len(killed) < 800:
        runs = ask()
    assert [run.seed for run in runs] == list(range(200)) and all(run.ok for run in runs)
    assert capfd.readouterr().err.count("crashed (exit status -9: ") > 100
    for run in runs:
        whole = Tiny(smoke("p_loss", run.seed))
        list(whole.steps())
        assert run.history["step"].tolist() == list(range(1, 13))
        assert (run.history["value"] - whole.history_table()["value"]).abs().max() < 1e-8
        folder = folder_of(smoke("p_loss", run.seed), tmp_path)
        assert sorted(path.name for path in folder.iterdir()) == ["history.csv", "run.json", "test.csv"]
    assert not list((tmp_path / "checkpoints").rglob("*.pt"))  # logs of killed workers may stay


# ---- 2: killed kernels ----------------------------------------------------------------------------------------------


def test_after_a_killed_kernel_the_next_call_does_what_is_left(tmp_path, capsys):
    source = f"""
import os, signal
from pathlib import Path
from replication.tasks import make_config
from replication.trainer import train_steps
output, trained = Path({str(tmp_path)!r}), []
for seed in range(2):
    trained += [seed] * any([run.step for run in train_steps(make_config("granular", "p_loss", seed, "smoke"), output)])
    if seed == 0 and not (output / "killed").exists():
        (output / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
(output / "trained").write_text(str(trained))
"""
    path = notebook(tmp_path, source)
    ask = ["notebook", str(path), "--output", str(tmp_path)]
    assert main(ask) == 1
    said = capsys.readouterr().err
    assert "notebook tiny failed at code cell 2 (" in said and "the kernel died" in said
    assert str(tmp_path / "executed/failed/tiny.log") in said and failed_copy(tmp_path)[1][-1] == "failed"
    assert not (tmp_path / "executed/quick/tiny.ipynb").exists()
    first = folder_of(smoke("p_loss"), tmp_path) / "run.json"
    before = first.read_bytes()
    assert main(ask) == 0 and (tmp_path / "executed/quick/tiny.ipynb").exists()
    assert (tmp_path / "trained").read_text() == "[1]" and first.read_bytes() == before


# ---- 3: a full disk -------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(monkeypatch):
    """`disk.full(folder)`: from now on there is no room for what is written below it; `disk.free()`: there is."""
    true = os.fsync

    def full(folder):
        def fsync(number):
            path = os.readlink(f"/proc/self/fd/{number}")
            if Path(path).is_relative_to(folder):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
            true(number)

        monkeypatch.setattr(os, "fsync", fsync)

    return SimpleNamespace(full=full, free=lambda: monkeypatch.setattr(os, "fsync", true))


def test_a_full_disk_keeps_the_older_checkpoint(tmp_path, disk, capsys):
    config = smoke()
    folder = checkpoint_folder(config, tmp_path)
    with pytest.raises(OSError, match=r"No space left on device: .*\.step_00000004\.pt"):
        for run in train_steps(config, tmp_path, checkpoint_every_s=0):
            if run.step == 4:
                disk.full(tmp_path)
    names = [f"step_0000000{step}.{kind}" for step in (2, 3) for kind in ("pt", "sha256")]
    assert sorted(path.name for path in folder.glob("step_*")) == names and not folder_of(config, tmp_path).exists()
    disk.free()
    steps = [run.step for run in train_steps(config, tmp_path)]
    assert steps == [*range(4, 10)] and "resumed from step 3" in capsys.readouterr().err
    assert_same(read_run(folder_of(config, tmp_path)), train(config, tmp_path / "uninterrupted"))


def test_a_full_disk_leaves_no_half_record(tmp_path, disk):
    """The disk is full when the CSV files are written; the last checkpoint stays, and nothing is trained again."""
    config = smoke("p_loss")
    folder = folder_of(config, tmp_path)
    with pytest.raises(OSError, match=r"No space left on device: .*history\.csv"):
        for run in train_steps(config, tmp_path):
            if run.step == run.n_steps:
                disk.full(folder)
    kept = [path.name for path in checkpoint_folder(config, tmp_path).glob("*.pt")]
    assert list(folder.iterdir()) == [] and kept == ["step_00000009.pt"]
    disk.free()
    assert list(train_steps(config, tmp_path)) == [] and read_run(folder).ok


def test_a_full_disk_fails_the_notebook_and_keeps_the_last_good_copy(tmp_path, disk):
    good = tmp_path / "executed/quick/tiny.ipynb"
    good.parent.mkdir(parents=True)
    good.write_text("good")
    path = notebook(tmp_path, "print('a cell')")
    disk.full(tmp_path / "executed")
    with pytest.raises(NotebookFailed, match=r"No space left on device.*no log or copy could be written") as failed:
        run_notebook(path, output=tmp_path)
    assert failed.value.exit_status == 1 and good.read_text() == "good"
    assert {path.suffix for path in (tmp_path / "executed").rglob("*") if path.is_file()} <= {".ipynb", ".lock"}


# ---- 8 to 12 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", notebook_names())
def test_every_notebook_refuses_a_mistyped_profile_in_its_first_cells(name):
    cells = nbformat.read(notebook_path(name), as_version=4).cells
    parameters, setup, *_ = [cell.source for cell in cells if cell.cell_type == "code"]
    for wrong, error, match in (("quik", ValueError, "did you mean 'quick'"), (3, TypeError, "must be a text")):
        namespace = {}
        exec(parameters, namespace)
        namespace["profile"] = wrong
        with pytest.raises(error, match=f"profile .*{match}"):
            exec(setup, namespace)


def test_what_is_asked_for_twice_is_run_once(tmp_path, computed_here):
    runs = ensure_runs(["granular", "granular"], ["p_loss", "p_loss"], [1, 0, 1], "smoke", tmp_path)
    assert [(run.method, run.seed) for run in runs] == [("p_loss", 0), ("p_loss", 1)]
    assert sorted(computed_here) == [("p_loss", 0), ("p_loss", 1)]


STUB = """\
#!/bin/sh
# an interpreter that installs nothing, runs one small run and no notebook, and says what it did
case "$1 $2 $3" in
  "-m venv"*) echo venv >> "{log}"; sleep 1; mkdir -p .venv/bin; cp "$0" .venv/bin/python;;
  "-m replication run") echo run >> "{log}"; shift 3; exec "{python}" -m replication run "$@" --method p_loss --seeds 0;;
  "-m replication notebook") echo notebook >> "{log}";;
  "-m"*) echo "$2" >> "{log}";;
  *) exec "{python}" "$@";;
esac
"""


def test_two_make_reproduce_at_once_leave_one_record(tmp_path):
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "python").write_text(STUB.format(log=tmp_path / "log", python=sys.executable))
    (tmp_path / "python").chmod(0o755)
    command = ["make", "reproduce", "PROFILE=smoke", "FRESH=1", f"PYTHON={tmp_path}/python"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MAKEFLAGS": ""}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes) for _ in range(2)]
    said = [make.communicate(timeout=300)[1] for make in both]
    assert [make.returncode for make in both] == [0, 0], said
    log = (tmp_path / "log").read_text().split()
    assert log.count("venv") == 1 and log.count("run") == log.count("notebook") == 2
    record = folder_of(smoke("p_loss"), tmp_path / "fresh")
    assert [path.parent for path in tmp_path.rglob("run.json")] == [record]
    assert read_run(record).ok and "crashed" not in "".join(said)
    assert not list((tmp_path / "fresh/checkpoints").rglob("*.pt"))


def test_after_a_run_out_of_memory_the_next_goes_on(tmp_path, computed_here, monkeypatch):
    true = Training.batch_loss

    def batch_loss(self, *args, **options):
        if self.config.seed == 0 and self.step == 5:
            raise torch.OutOfMemoryError("no room")
        return true(self, *args, **options)

    monkeypatch.setattr(Training, "batch_loss", batch_loss)
    runs = ensure_runs(["granular"], ["p_loss"], [0, 1], "smoke", tmp_path)
    assert [run.status for run in runs] == ["failed:out of memory: no room", "ok"] and len(computed_here) == 2
