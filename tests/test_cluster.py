"""The pool: what it starts and when; jobs of submitit, by its local executor and by scripts in place of SLURM's
commands."""

import os
import sys
import threading
import time

import psutil
import pytest
import submitit
from conftest import assert_same, folder_of, smoke
from test_cli import METHOD, run

from replication import jobs
from replication.jobs import Pool
from replication.records import ROOT, read_run
from replication.status import kept_of, states
from replication.tasks import importance_config
from replication.trainer import train

pytestmark = pytest.mark.usefixtures("one_thread")


class Started(list):
    """(method, seed, paths) of what was started in place of processes; each ends at the second look.

    status: what they end with, by method. most: how many there were at once."""

    status, most, now = {}, 0, 0

    def start(self, config, paths, folder):
        self.append((config.method, config.seed, paths))
        self.now += 1
        self.most, looks = max(self.most, self.now), []

        def status():
            looks.append(1)
            self.now -= len(looks) == 2
            return self.status.get(config.method, 0) if len(looks) >= 2 else None

        return jobs.Running(config, f"{config.method} {config.seed}", folder / "no.log", status, None)


@pytest.fixture
def started(monkeypatch):
    started = Started()
    monkeypatch.setattr(Pool, "start", lambda pool, config, paths="": started.start(config, paths, pool.output))
    monkeypatch.setattr(jobs.time, "sleep", lambda _: None)
    return started


def test_runs_wait_for_their_probabilities_and_for_room(tmp_path, started):
    asked = [importance_config("granular", "smoke"), smoke("scrapl", 3), smoke(), smoke("scrapl", 4)]
    Pool(tmp_path, "cpu", workers=3, parts=4).run(asked)
    parts = [("theta_importance", 0, paths) for paths in ("0-8", "9-17", "18-26", "27-34")]
    assert started == [*parts, (METHOD, 0, ""), ("scrapl", 3, ""), ("scrapl", 4, "")] and started.most == 3


def test_what_needs_a_crashed_process_is_not_started(tmp_path, started, capsys):
    started.status = {"theta_importance": 9}
    Pool(tmp_path, "cpu", workers=9).run([importance_config("granular", "smoke"), smoke("scrapl", 3), smoke()])
    assert started == [("theta_importance", 0, ""), (METHOD, 0, "")]
    said = capsys.readouterr().err
    assert "theta_importance 0 crashed (exit status 9: nothing in its log)" in said
    assert "granular: no scrapl runs, the path probabilities are missing" in said
    assert "1 of 3 runs crashed: theta_importance 0; the same command tries them again" in said


def test_a_job_is_requeued_one_crashes_one_is_killed_and_all_end_as_if_uninterrupted(
    tmp_path, monkeypatch, in_workers, capfd
):
    """Seed 0 must make way at step 4, seed 1 crashes there, seed 2 is killed there. The same bits, tolerance 0."""
    monkeypatch.setattr(submitit.Job, "_results_timeout_s", 1)
    jobs_of = ["--method", METHOD, "--seeds=0-2", "--executor=local", "--workers=3", "--deterministic"]

    def disturb():
        """The worker that stands at step 4 says which process its job is."""
        standing, deadline = [tmp_path / f"standing_{seed}" for seed in (0, 2)], time.monotonic() + 300
        while not all(path.exists() for path in standing) and time.monotonic() < deadline:
            time.sleep(0.05)
        makes_way, killed = (psutil.Process(int(path.read_text())) for path in standing)
        makes_way.send_signal(submitit.JobEnvironment._usr_sig())
        killed.kill()

    in_workers(f"""
        standing = pathlib.Path({str(tmp_path)!r}, f"standing_{{seed}}")
        if step == 5 and seed == 1:
            raise ValueError("a bug")
        if step == 5 and seed != 1 and not standing.exists():
            standing.with_suffix(".new").write_text(str(os.getppid()))
            standing.with_suffix(".new").rename(standing)
            while True:
                wait()
    """)
    thread = threading.Thread(target=disturb)
    thread.start()
    assert run(tmp_path, *jobs_of) == 1
    thread.join()
    said = capfd.readouterr()
    assert f"granular/{METHOD}/seed 1 crashed (exit status 1: ValueError: a bug); log: " in said.err
    assert "2 of 3 runs crashed: " in said.err and "1 of 3 runs finished, 0 failed" in said.out
    (logs,) = tmp_path.glob("checkpoints/jobs_*")
    assert any("Requeued job" in path.read_text() for path in logs.glob("*_log.*"))
    assert any("resumed from step 4" in path.read_text() for path in logs.glob("*_log.err"))
    assert kept_of(smoke(seed=1), tmp_path) == kept_of(smoke(seed=2), tmp_path) == "step 4"

    monkeypatch.setenv("PYTHONPATH", "")
    assert run(tmp_path, *jobs_of) == 0
    assert "3 of 3 runs finished, 0 failed" in capfd.readouterr().out
    assert list(tmp_path.glob("checkpoints/jobs_*")) == [logs]  # of the second call's jobs nothing is left
    for seed in range(3):
        found = read_run(folder_of(smoke(seed=seed), tmp_path))
        assert_same(found, train(smoke(seed=seed), tmp_path / "whole"))
        assert found.info["deterministic"] is True


SBATCH = """#!{python}
import os, shutil, subprocess, sys
script = shutil.copy(sys.argv[1], {folder!r} + "/submitted.sh")
subprocess.Popen(["bash", script], env=os.environ | {{"SLURM_JOB_ID": str(os.getpid())}}, stdout=subprocess.DEVNULL,
                 stderr=subprocess.DEVNULL, start_new_session=True)
print("Submitted batch job", os.getpid())
"""
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do [[ $1 == --unbuffered ]] && shift || shift 2; done
exec "$@" 2>/dev/null
"""


def test_runs_on_slurm(tmp_path, monkeypatch, capfd):
    sbatch = SBATCH.format(python=sys.executable, folder=str(tmp_path))
    for name, text in {"sbatch": sbatch, "srun": SRUN, "sacct": "#!/bin/sh\n"}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    options = ["--slurm", "partition=gpu", "--slurm", "time=30", "--workers", "7"]
    assert run(tmp_path, "--method", "p_loss", "--seeds", "0,1", "--executor", "slurm", *options) == 0
    assert set(states([smoke("p_loss", seed) for seed in (0, 1)], tmp_path).values()) == {"done"}
    text = (tmp_path / "submitted.sh").read_text()
    for line in ("partition=gpu", "time=30", "signal=USR2@120", "mem=16GB", "job-name=scrapl"):
        assert f"#SBATCH --{line}\n" in text
    assert "gpus" not in text and "export OMP_NUM_THREADS=1\n" in text and f"export PYTHONPATH={ROOT}" in text
    assert Pool(tmp_path, "cuda", executor="slurm").executor.parameters["gpus_per_node"] == 1
    for wrong in ({"partitoin": "gpu"}, {"time": "soon"}):
        with pytest.raises(ValueError, match=f"submitit refuses one of .*{next(iter(wrong))}"):
            Pool(tmp_path, "cpu", executor="slurm", slurm=wrong)
    capfd.readouterr()
