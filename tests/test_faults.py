"""The twelve faults: FAULTS names the tests that hold each; those that no other file has are below.

`make test` ends with the twelve and how many of their tests passed (conftest.py).
"""

import ast
import errno
import functools
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

import pandas as pd
import pytest
import torch
from conftest import assert_same, folder_of, smoke
from test_notebooks import notebook

from replication import __main__, jobs, trainer
from replication.__main__ import main
from replication.checkpoints import checkpoint_folder
from replication.jobs import Pool, ensure_runs
from replication.notebooks import NotebookFailed, run_notebook
from replication.records import COLUMNS, ROOT, read_run
from replication.trainer import Training, train, train_steps

FAULTS = {  # the tests that hold each, in test_<file>.py
    "1 a training worker killed at random steps": """
        faults::test_200_runs_with_random_kills_end_with_every_record_whole_and_none_lost
        training::test_a_stopped_run_ends_as_if_it_had_not_been
        training::test_a_run_asked_to_stop_writes_a_checkpoint_as_soon_as_its_steps_are_looked_at
        cluster::test_a_job_is_requeued_one_crashes_one_is_killed_and_all_end_as_if_uninterrupted
        cli::test_a_killed_or_crashed_worker_costs_its_own_run_only
        cli::test_a_grid_stopped_by_its_budget_twice_ends_as_if_it_had_not_been
        cli::test_stopping_the_command_ends_its_workers""",
    "2 a notebook's kernel killed, papermill terminated, Ctrl-C": """
        notebooks::test_failure_names_notebook_cell_and_log_and_marks_nothing_done
        notebooks::test_stopped_from_outside_ends_the_kernel_and_its_children
        cli::test_stopping_the_command_ends_its_workers""",
    "3 the disk full while a checkpoint, a CSV or a notebook is written": """
        faults::test_a_full_disk_keeps_the_older_checkpoint
        faults::test_a_full_disk_leaves_no_half_record_and_nothing_is_trained_again
        faults::test_a_full_disk_fails_the_notebook_and_keeps_the_last_good_copy
        records::test_failed_write_leaves_the_old_file_and_no_litter
        records::test_killed_write_counts_as_missing_and_its_litter_goes""",
    "4 a checkpoint truncated, empty, one byte flipped, of another configuration": """
        training::test_a_damaged_checkpoint_is_said_and_not_used""",
    "5 audio of the wrong rate, length, channels or dtype, empty or not finite": """
        losses::test_wrong_audio_says_what_is_wrong one_shots::test_a_bad_file_is_refused_by_name""",
    "6 a loss or gradient that is not finite": """
        training::test_a_run_that_cannot_go_on_fails_for_good_and_the_next_goes_on
        training::test_where_only_some_steps_are_looked_at_the_failure_names_them_all""",
    "7 saved probabilities or optimizer tables of another number of paths": """
        losses::test_wrong_probabilities_say_what_is_wrong
        optim::test_a_state_of_another_optimizer_or_other_weights_is_refused""",
    "8 an unknown method, profile or parameter, or a wrong type": """
        house::test_notebook_in_git_is_clean_strict_and_refuses_what_is_mistyped
        house::test_a_mistyped_method_stops_notebook_05_before_it_draws_or_trains
        notebooks::test_parameters_are_refused_before_anything_starts
        cli::test_bad_input_is_refused_in_one_line""",
    "9 duplicate seeds and equal keys; data order and initial weights of other methods": """
        training::test_only_what_is_missing_is_computed_once_and_deleting_a_folder_asks_again
        records::test_copied_record_is_refused
        training::test_methods_share_weights_and_data_order_and_reconstructions_never_have_the_seeds_of_the_data""",
    "10 two processes on one run, two `make reproduce` at once": """
        faults::test_two_make_reproduce_at_once_leave_one_record
        training::test_of_two_processes_on_one_run_one_computes_and_the_other_waits
        records::test_two_writers_and_a_reader_never_see_a_mix""",
    "11 results edited by hand, truncated, a row missing": """
        records::test_damage_is_refused_with_file_expected_found_and_mend
        training::test_a_stale_or_broken_record_is_said_not_used_and_not_deleted""",
    "12 CUDA asked for without CUDA; out of memory": """
        training::test_cuda_asked_for_without_cuda_is_refused_at_once
        training::test_a_run_that_cannot_go_on_fails_for_good_and_the_next_goes_on""",
}
FAULTS = {fault: [f"test_{test.replace('::', '.py::')}" for test in tests.split()] for fault, tests in FAULTS.items()}

pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_fault_has_tests():
    assert len(FAULTS) == 12 and all(FAULTS.values())
    for name in {test for tests in FAULTS.values() for test in tests}:
        file, function = name.split("::")
        tree = ast.parse((ROOT / "tests" / file).read_text())
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, name


class Forked:
    """`subprocess.Popen` of `python -m replication ...`, forked from this process, which spares it the imports.

    fatal_write: the file, counted from 1, whose writing SIGKILL interrupts before it is renamed into place; None: none.
    """

    def __init__(self, target, fatal_write=None, stdout=None, **_):
        def run():
            if stdout is not None:
                sys.stdout = sys.stderr = open(stdout.fileno(), "w", buffering=1, closefd=False)
            if fatal_write is not None:
                writes = itertools.count(1)
                os.fsync = lambda _: next(writes) == fatal_write and os.kill(os.getpid(), signal.SIGKILL)
            target()

        self.process = multiprocessing.get_context("fork").Process(target=run)
        self.process.start()
        self.send_signal = functools.partial(os.kill, self.process.pid)

    def poll(self):
        return self.process.exitcode


class Tiny(Training):
    """A random walk of 12 steps in place of a training: a function of the seed alone."""

    n_steps, looked, stopping, device, loss = 12, True, False, torch.device("cpu"), None

    def __init__(self, config, *_):
        self.config, self.encoder = config, torch.nn.Linear(1, 1, bias=False, dtype=torch.float64)
        self.encoder.weight.data.zero_()
        self.optimizer = torch.optim.SGD(self.encoder.parameters())
        self.step, self.step_s, self.history, self.epoch_losses, self.best_loss = 0, [], [], [], 0.0
        self.best_weights = self.weights()

    def steps(self):
        while self.step < self.n_steps:
            self.step += 1
            self.encoder.weight.data += random.Random(self.config.seed * 1000 + self.step).gauss(0, 1)
            self.best_weights = self.weights()
            self._log("val", "loss", float(self.encoder.weight.detach()))
            time.sleep(0.002)
            yield self.step


def test_200_runs_with_random_kills_end_with_every_record_whole_and_none_lost(tmp_path, monkeypatch, capfd):
    """Four workers; of the first 300 two in three are killed at one of their 28 writes (seed 11), and twice the command
    itself. Records must hold the values of walks that nobody killed, to the last of 9 digits."""
    draw, killed = random.Random(11), []
    tested = pd.DataFrame([("weight", 0.0, "1")], columns=COLUMNS["test.csv"])
    for name, value in {"Training": Tiny, "CHECKPOINT_EVERY_S": 0, "evaluate": lambda *_: (tested, {})}.items():
        monkeypatch.setattr(trainer, name, value)

    train(smoke("p_loss"), tmp_path / "before")  # imports what the forked processes then need not

    def popen(command, **options):
        def target():
            monkeypatch.setattr(__main__, "PARENT", os.getppid())
            main(command[4:])

        killed.append(draw.randint(1, 28) if len(killed) < 300 and draw.random() < 2 / 3 else None)
        return Forked(target, killed[-1], **options)

    monkeypatch.setattr(jobs, "subprocess", SimpleNamespace(Popen=popen, DEVNULL=subprocess.DEVNULL))

    def ask():
        return ensure_runs(["granular"], ["p_loss"], range(200), "smoke", tmp_path, pool=Pool(tmp_path, "cpu", 4))

    for seconds in (1.5, 2.5):
        command = Forked(ask)
        command.process.join(seconds)
        command.send_signal(signal.SIGKILL)
        command.process.join(120)
        assert command.poll() == -signal.SIGKILL
    runs = []
    while len(runs) < 200 and len(killed) < 800:
        runs = ask()
    assert [run.seed for run in runs] == list(range(200)) and all(run.ok for run in runs)
    assert capfd.readouterr().err.count("crashed (exit status -9: ") > 100
    for run in runs:
        whole = Tiny(smoke("p_loss", run.seed))
        assert run.history["step"].tolist() == list(whole.steps()) == list(range(1, 13))
        assert (run.history["value"] - whole.history_table()["value"]).abs().max() < 1e-8
        folder = folder_of(smoke("p_loss", run.seed), tmp_path)
        assert sorted(path.name for path in folder.iterdir()) == ["history.csv", "run.json", "test.csv"]
    assert not list((tmp_path / "checkpoints").rglob("*.pt"))  # logs of killed workers may stay


@pytest.fixture
def full(monkeypatch):
    """List of folders below which there is no room for what is written."""
    folders, true = [], os.fsync

    def fsync(number):
        path = os.readlink(f"/proc/self/fd/{number}")
        if any(Path(path).is_relative_to(folder) for folder in folders):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        true(number)

    monkeypatch.setattr(os, "fsync", fsync)
    return folders


def test_a_full_disk_keeps_the_older_checkpoint(tmp_path, full, capsys):
    config = smoke()
    folder = checkpoint_folder(config, tmp_path)
    with pytest.raises(OSError, match=r"No space left on device: .*\.step_00000004\.pt"):
        for run in train_steps(config, tmp_path, checkpoint_every_s=0):
            full += [tmp_path] * (run.step == 4)
    names = [f"step_0000000{step}.{kind}" for step in (2, 3) for kind in ("pt", "sha256")]
    assert sorted(path.name for path in folder.glob("step_*")) == names and not folder_of(config, tmp_path).exists()
    full.clear()
    steps = [run.step for run in train_steps(config, tmp_path)]
    assert steps == [*range(4, 10)] and "resumed from step 3" in capsys.readouterr().err
    assert_same(read_run(folder_of(config, tmp_path)), train(config, tmp_path / "uninterrupted"))


def test_a_full_disk_leaves_no_half_record_and_nothing_is_trained_again(tmp_path, full):
    """The disk is full when the CSV files are written; the checkpoint of the last step did not wait for the timer."""
    config = smoke("p_loss", dropout=0.5)
    folder = folder_of(config, tmp_path)
    full.append(folder)
    with pytest.raises(OSError, match=r"No space left on device: .*history\.csv"):
        train(config, tmp_path)
    kept = [path.name for path in checkpoint_folder(config, tmp_path).glob("*.pt")]
    assert list(folder.iterdir()) == [] and kept == ["step_00000009.pt"]
    full.clear()
    assert list(train_steps(config, tmp_path)) == []
    assert_same(read_run(folder), train(config, tmp_path / "uninterrupted"))


def test_a_full_disk_fails_the_notebook_and_keeps_the_last_good_copy(tmp_path, full):
    good = tmp_path / "executed/quick/tiny.ipynb"
    good.parent.mkdir(parents=True)
    good.write_text("good")
    path = notebook(tmp_path, "print('a cell')")
    full.append(tmp_path / "executed")
    with pytest.raises(NotebookFailed, match=r"No space left on device.*no log or copy could be written") as failed:
        run_notebook(path, output=tmp_path)
    assert failed.value.exit_status == 1 and good.read_text() == "good"
    assert {path.suffix for path in (tmp_path / "executed").rglob("*") if path.is_file()} <= {".ipynb", ".lock"}


STUB = """\
#!/bin/sh
# an interpreter that installs nothing, runs one small run and no notebook, and says what it did
case "$1 $2 $3" in
  "-m venv"*) echo venv >> "{log}"; sleep 1; mkdir -p .venv/bin; cp "$0" .venv/bin/python;;
  "-m replication run") echo run >> "{log}"; shift 3
    exec "{python}" -m replication run "$@" --method p_loss --seeds 0;;
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
