"""Runs as jobs of submitit: its local executor, and SLURM's commands played by scripts. A worker's faults come by sitecustomize."""

import os
import re
import subprocess
import sys
import textwrap
import threading
import time
from types import SimpleNamespace

import psutil
import pytest
import submitit

from replication import jobs as cluster
from replication import trainer as training
from replication.__main__ import main
from replication.jobs import Jobs
from replication.path_probabilities import importance_table
from replication.records import ROOT, read_run, run_folder
from replication.tasks import importance_config, make_config
from replication.trainer import states, train

METHOD = "scrapl_no_theta_is"

pytestmark = pytest.mark.usefixtures("one_thread")


def config(seed, method=METHOD, task="granular"):
    return make_config(task, method, seed, "smoke")


def folder_of(config, output):
    return run_folder("smoke", config.task, config.method, config.seed, output)


def run(output, *arguments):
    return main(["run", "--profile", "smoke", "--output", str(output), *arguments])


def patched(monkeypatch, folder, text):
    """Have every Python started from here execute `text`, in which `training` is scrapl_lib's, if it is a worker."""
    (folder / "sitecustomize.py").write_text(
        "import sys\nif '--worker' in sys.orig_argv:\n" + textwrap.indent(text, "    ")
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(ROOT)]))


# ---- submitit's local executor --------------------------------------------------------------------------------------

FAULTY = """
import functools, os, pathlib, signal, time
from scrapl_lib import training
seed, asked, watch = sys.orig_argv[sys.orig_argv.index("--seeds") + 1], [], training.watch_parent()
standing = pathlib.Path({folder!r}, "standing_" + seed)
train_step = training.Training._train_step
training.train = functools.partial(training.train, checkpoint_every_s=0 if seed != "0" else 1000)
def faulty(self, items):
    if self.step == 0:
        stop = signal.getsignal(signal.SIGUSR1)
        signal.signal(signal.SIGUSR1, lambda *arguments: (stop(*arguments), asked.append(True)))
    if self.step == 4 and seed == "1":
        raise ValueError("a bug")
    if self.step == 4 and not standing.exists():
        training.write_text_atomic(standing, str(os.getppid()))
        while not asked:
            time.sleep(0.02)
            watch()
    train_step(self, items)
training.Training._train_step = faulty
"""


def job_process(standing):
    """The process of the job whose worker stands at step 4, told by the file that the worker writes then."""
    deadline = time.monotonic() + 300
    while not standing.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    return psutil.Process(int(standing.read_text()))


def test_a_job_is_requeued_one_crashes_one_is_killed_and_all_end_as_if_uninterrupted(tmp_path, monkeypatch, capfd):
    """Seed 0 must make way at step 4, before its first checkpoint, seed 1 crashes there, seed 2 is killed there. The same bits."""
    monkeypatch.setattr(submitit.Job, "_results_timeout_s", 1)
    arguments = [
        "--task",
        "granular",
        "--method",
        METHOD,
        "--seeds=0-2",
        "--executor",
        "local",
        "--workers=3",
        "--deterministic",
    ]

    def disturb():
        job_process(tmp_path / "standing_0").send_signal(submitit.JobEnvironment._usr_sig())
        job_process(tmp_path / "standing_2").kill()

    with monkeypatch.context() as patch:
        patched(patch, tmp_path, FAULTY.format(folder=str(tmp_path)))
        thread = threading.Thread(target=disturb)
        thread.start()
        assert run(tmp_path, *arguments) == 1
        thread.join()
    said = capfd.readouterr()
    assert (
        f"granular/{METHOD}/seed 1 crashed (exit status 1: ValueError: a bug); log: " in said.err
        and "killed; log: " in said.err
    )
    assert (
        "2 of 3 jobs crashed; the same command tries them again" in said.err
        and "1 of 3 runs finished, 0 failed" in said.out
    )
    (logs,) = tmp_path.glob("checkpoints/smoke/jobs_*")
    assert any("Requeued job" in path.read_text() for path in logs.glob("*_log.*"))
    assert any(
        "resumed from step 5" in path.read_text() for path in logs.glob("*_log.err")
    )  # it did the step it was at
    assert training.kept_of(config(1), tmp_path) == training.kept_of(config(2), tmp_path) == "step 4"

    assert run(tmp_path, *arguments) == 0
    assert "3 of 3 runs finished, 0 failed" in capfd.readouterr().out
    assert list(tmp_path.glob("checkpoints/smoke/jobs_*")) == [logs]  # of the second call's jobs nothing is left
    for seed in range(3):
        whole, found = train(config(seed), tmp_path / "whole"), read_run(folder_of(config(seed), tmp_path))
        assert found.ok and len(found.history) == 19 and len(found.test) > 5 and found.info["deterministic"] is True
        assert found.history.drop(columns="wall_s").equals(whole.history.drop(columns="wall_s")) and found.test.equals(
            whole.test
        )


FAST = """
import pathlib
import torch
from replication import path_probabilities
def fake(loss, encode, synthesize, inputs, params, *_, paths, **__):
    pathlib.Path({folder!r}, "paths_" + str(paths[0])).write_text(str(len(paths)))
    yield from ((path, torch.full((2,), 1.0 + path, dtype=torch.float64)) for path in paths)
path_probabilities.curvature_by_path = fake
"""


def test_path_probabilities_come_in_parts_and_before_the_run_that_needs_them(tmp_path, monkeypatch, capfd):
    task = "chirplet_fast_fast"
    patched(monkeypatch, tmp_path, FAST.format(folder=str(tmp_path)))
    assert (
        run(
            tmp_path,
            "--task",
            task,
            "--method",
            "scrapl",
            "--seeds=1",
            "--executor",
            "local",
            "--workers=2",
            "--parts=2",
        )
        == 0
    )
    assert re.search(r"3 jobs; logs: .*\n(.*\n)*3 of 3 jobs done", capfd.readouterr().err)
    assert read_run(folder_of(config(1, "scrapl", task), tmp_path)).ok
    assert {path.name: path.read_text() for path in tmp_path.glob("paths_*")} == {"paths_0": "11", "paths_11": "10"}
    table = importance_table(config(1, "scrapl", task), tmp_path)
    assert table["curvature_am"].tolist() == list(range(1, 22))
    assert (
        main(["importance", "--profile", "smoke", "--task", task, "--output", str(tmp_path), "--executor", "local"])
        == 0
    )
    said = capfd.readouterr()
    assert said.out == f"path probabilities of {task}, profile smoke: done\n" and "jobs" not in said.err


# ---- SLURM's commands, played by scripts ----------------------------------------------------------------------------

SBATCH = """#!{python}
import os, re, shutil, subprocess, sys
script = shutil.copy(sys.argv[1], {folder!r} + "/submitted.sh")
text = open(script).read()
for task in range(int(re.search("--array=0-(\\\\d+)", text)[1]) + 1):
    number = {{"SLURM_JOB_ID": str(100 + task), "SLURM_ARRAY_JOB_ID": "100", "SLURM_ARRAY_TASK_ID": str(task)}}
    subprocess.Popen(["bash", script], env=os.environ | number, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                     start_new_session=True)
print("Submitted batch job 100")
"""
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do [[ $1 == --unbuffered ]] && shift || shift 2; done
exec "$@" 2>/dev/null
"""


def test_an_array_of_runs_on_slurm(tmp_path, monkeypatch, capfd):
    sbatch = SBATCH.format(python=sys.executable, folder=str(tmp_path))
    for name, text in {"sbatch": sbatch, "srun": SRUN, "sacct": "#!/bin/sh\n"}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    arguments = ["--task", "granular", "--method", "p_loss", "--seeds", "0,1", "--executor", "slurm"]
    assert run(tmp_path, *arguments, "--slurm", "partition=gpu", "--slurm", "time=30", "--workers", "7") == 0
    assert set(states([config(seed, "p_loss") for seed in (0, 1)], tmp_path).values()) == {"done"}
    text = (tmp_path / "submitted.sh").read_text()
    for line in ("partition=gpu", "time=30", "array=0-1%2", "signal=USR2@120", "mem=16GB", "job-name=scrapl"):
        assert f"#SBATCH --{line}\n" in text
    assert "gpus" not in text and "gpus_per_node" in Jobs("slurm", "smoke", tmp_path, "cuda").parameters
    with pytest.raises(ValueError, match="submitit knows no option partitoin of sbatch"):
        Jobs("slurm", "smoke", tmp_path, "cpu", slurm={"partitoin": "gpu"})
    capfd.readouterr()


# ---- without processes ----------------------------------------------------------------------------------------------


class Executor:
    """In submitit's place: jobs end at the second look, those of `crashing` badly; `submitted` and `cancelled` list them."""

    def __init__(self, crashing=(), stop_at=None):
        self.submitted, self.cancelled, self.crashing, self.stop_at, self.most, self.now = (
            [],
            [],
            crashing,
            stop_at,
            0,
            0,
        )

    def __call__(self, folder, max_num_timeout):
        return self

    def update_parameters(self, **parameters):
        pass

    def submit_array(self, jobs):
        return [self.submit(job) for job in jobs]

    def submit(self, job):
        self.submitted.append((job.config.method, job.config.seed, job.arguments[-1]))
        self.now, looks = self.now + 1, []
        self.most = max(self.most, self.now)

        def done():
            if len(self.submitted) == self.stop_at:
                raise KeyboardInterrupt
            looks.append(1)
            self.now -= len(looks) == 2
            return len(looks) >= 2

        crashed = RuntimeError("trace\nRuntimeError: exit status 9") if job.config.method in self.crashing else None
        return SimpleNamespace(
            done=done,
            exception=lambda: crashed,
            job_id="1",
            paths=None,
            cancel=lambda check: self.cancelled.append(job.config.seed),
        )


def jobs_with(executor, output, monkeypatch, **options):
    monkeypatch.setattr(cluster.time, "sleep", lambda _: None)
    jobs = Jobs("local", "smoke", output, "cpu", **options)
    jobs.kind = executor
    return jobs


def test_jobs_wait_for_their_probabilities_and_for_room(tmp_path, monkeypatch):
    executor, importance = Executor(), importance_config("granular", "smoke")
    asked = [importance, config(3, "scrapl"), config(0), config(4, "scrapl")]
    jobs_with(executor, tmp_path, monkeypatch, workers=3, parts=4)(asked)
    parts = [("theta_importance", 0, paths) for paths in ("0-8", "9-17", "18-26", "27-34")]
    assert executor.submitted == [*parts, (METHOD, 0, ""), ("scrapl", 3, ""), ("scrapl", 4, "")] and executor.most == 3


def test_what_needs_a_crashed_job_is_not_submitted(tmp_path, monkeypatch, capsys):
    executor = Executor(crashing=["theta_importance"])
    jobs_with(executor, tmp_path, monkeypatch, workers=9)(
        [importance_config("granular", "smoke"), config(3, "scrapl"), config(0)]
    )
    assert executor.submitted == [("theta_importance", 0, ""), (METHOD, 0, "")]
    said = capsys.readouterr().err
    assert "job 1: exit status 9\n" in said and "granular: no scrapl runs, the path probabilities are missing" in said
    assert "1 of 3 jobs crashed" in said


def test_stopping_the_command_cancels_its_jobs(tmp_path, monkeypatch):
    executor = Executor(stop_at=2)
    with pytest.raises(KeyboardInterrupt):
        jobs_with(executor, tmp_path, monkeypatch, workers=2)([config(0), config(1), config(2)])
    assert executor.cancelled == [0, 1] and len(executor.submitted) == 2


def test_a_worker_that_does_not_stop_is_killed_and_its_job_requeued(monkeypatch):
    monkeypatch.setitem(cluster.STOP_S, "smoke", 0.3)
    job = cluster.Job(config(5), ROOT, "cpu", False)
    process = subprocess.Popen(["sh", "-c", "trap '' USR1; echo; exec sleep 100"], stdout=subprocess.PIPE)
    process.stdout.readline()
    job.worker = SimpleNamespace(process=process)
    again = job.checkpoint()
    assert (
        process.wait(timeout=60) == -9 and again.function.arguments == job.arguments and again.function.worker is None
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["run", "--executor", "slurm"], "slurm needs SLURM's sbatch and srun, which are not here"),
        (
            ["run", "--executor", "local", "--device=cuda:1"],
            "each job has its own GPU: device must be cpu or cuda, got 'cuda:1'",
        ),
        (["run", "--executor", "local", "--workers", "0"], "workers must be at least 1, got 0"),
        (["run", "--executor", "local", "--parts", "0"], "parts must be at least 1, got 0"),
        (["run", "--executor", "local", "--budget-minutes", "5"], "--budget-minutes is for workers of this machine"),
        (["run", "--parts", "2"], "--parts and --slurm are for jobs: add --executor slurm"),
        (["run", "--slurm", "partition=gpu"], "--parts and --slurm are for jobs: add --executor slurm"),
        (["importance", "--executor", "local", "--paths", "0-3"], "--paths is for one process; for jobs, --parts N"),
    ],
)
def test_bad_input_is_refused_in_one_line(tmp_path, monkeypatch, arguments, message, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main([*arguments, "--profile", "smoke", "--output", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {message}") and len(said.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_without_submitit_it_is_said_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "submitit", None)  # import fails, as without the extra
    assert run(tmp_path, "--executor", "local") == 2
    assert capsys.readouterr().err == "error: an executor needs submitit: pip install '.[cluster]'\n"


def test_an_option_that_is_none_is_refused(tmp_path, capsys):
    for text in ("partition", "=gpu", "time="):
        with pytest.raises(SystemExit):
            run(tmp_path, "--executor", "local", "--slurm", text)
        assert f"an option of sbatch is NAME=VALUE such as partition=gpu; got '{text}'" in capsys.readouterr().err
