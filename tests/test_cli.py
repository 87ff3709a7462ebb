"""The command line and the processes behind it: exit codes, messages, kills, crashes, Ctrl-C, a user's surroundings."""

import io
import math
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pandas as pd
import psutil
import pytest
import soundfile
import synthetic_records as synthetic
from conftest import assert_same, folder_of, smoke

from replication import __main__, jobs, records, trainer
from replication.__main__ import _seeds, main
from replication.checkpoints import checkpoint_folder
from replication.jobs import STOP_S, Budget, Pool, ensure_runs
from replication.records import IMPORTANCE, ROOT, read_run, run_folder
from replication.status import kept_of
from replication.tasks import NOT_RUN, make_config
from replication.trainer import train

METHOD = "scrapl_no_theta_is"

pytestmark = pytest.mark.usefixtures("one_thread")


def run(output, *arguments):
    return main(["run", "--profile=smoke", f"--output={output}", "--task=granular", *arguments])


def litter(output):
    """What is left below checkpoints/ beside lock files."""
    return [path for path in (output / "checkpoints").rglob("*") if path.is_file() and path.suffix != ".lock"]


@pytest.mark.parametrize(
    "text, seeds", [("0-4", [0, 1, 2, 3, 4]), ("0,2", [0, 2]), ("3", [3]), ("7,0-2", [7, 0, 1, 2]), ("1,0-1", [1, 0])]
)
def test_seeds(text, seeds):
    assert _seeds(text) == seeds


@pytest.mark.parametrize(
    "option, words, texts",
    [
        ("--seeds", "seeds are numbers and ranges such as", "|a|0,|1-|-1|0-1-2|1.5|0 1|4-0|1,4-2|0-99999999999"),
        ("--budget-minutes", "a budget is a positive number of minutes such as 25", "0|-5|nan|inf|1e999|soon|"),
        ("--slurm", "an option of sbatch is NAME=VALUE such as partition=gpu", "partition|=gpu|time="),
    ],
)
def test_a_value_of_another_form_is_refused(tmp_path, monkeypatch, option, words, texts, capsys):
    monkeypatch.setattr(__main__, "ensure_runs", lambda *_: pytest.fail("started"))
    for text in texts.split("|"):
        with pytest.raises(SystemExit) as refused:
            run(tmp_path, f"{option}={text}")
        said = capsys.readouterr().err
        assert refused.value.code == 2 and words in said and f"; got {text!r}" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words, message",
    [
        ("run --method p_loss,mss_lin", "unknown method 'mss_lin': did you mean 'mss_linear'"),
        ("run --method ms_clap", "method 'ms_clap' is not run: weights unavailable: ms_clap needs a pretrained model"),
        ("run --workers 0", "workers must be at least 1, got 0"),
        ("run --parts 0", "parts must be at least 1, got 0"),
        ("run --device gpu", "unknown device 'gpu': use cpu, cuda or cuda:<n>"),
        ("run --executor slurm", "slurm needs SLURM's sbatch and srun, which are not here"),
        ("run --executor local --device cuda:1", "each job has its own GPU: device must be cpu or cuda"),
        ("run --executor local --budget-minutes 5", "--budget-minutes is for processes of this machine"),
        ("run --slurm partition=gpu", "--slurm is for jobs: add --executor slurm"),
        ("importance --task granulr", "unknown task 'granulr': did you mean 'granular'"),
        ("importance --task granular --paths 30-35", "paths must be numbers from 0 to 34, got 35"),
        ("importance --parts 2 --paths 0-3", "--paths is for this process; --parts N divides all paths"),
        ("compare --profile quik", "unknown profile 'quik': did you mean 'quick'"),
        ("notebook -p epochs", "-p takes name=value, got 'epochs'"),
    ],
)
def test_bad_input_is_refused_in_one_line(tmp_path, monkeypatch, words, message, capsys):
    monkeypatch.setattr(Pool, "run", lambda *_: pytest.fail("started"))
    monkeypatch.setitem(sys.modules, "msclap", None)  # import fails, as without the extra
    monkeypatch.setenv("PATH", str(tmp_path))
    command, *options = words.split()
    assert main([command, "--profile=smoke", f"--output={tmp_path}", *options]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {message}") and len(said.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_an_output_that_is_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run(tmp_path / "file", "--method=p_loss") == 2
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("error: ") and str(tmp_path / "file") in said and "Traceback" not in said


def test_a_reader_who_has_seen_enough_ends_the_command(monkeypatch):
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # is put back afterwards
    monkeypatch.setattr(__main__, "_status", Mock(side_effect=BrokenPipeError))
    assert main(["status"]) == 128 + signal.SIGPIPE


def test_status_matrix(tmp_path, monkeypatch, capsys):
    """Records of 1 h, 2 h and 0.5 h (failed) of P-loss; one of MSS linear whose last process took 1 h, all steps 6 h.
    An hour of P-loss is 1 / 0.15 of SCRAPL, one of MSS 1 / 0.3: by the three finished runs SCRAPL takes 40 / 3 h."""
    monkeypatch.delenv("TR808_DIR", raising=False)

    def write(task, method, seed, minutes, steps_s=60.0, status="ok", **changes):
        monkeypatch.setattr(records, "utc_now", lambda: f"2026-01-01T{12 + minutes // 60}:{minutes % 60:02}:00+00:00")
        about = {"start_utc": "2026-01-01T12:00:00+00:00", "device": "cpu", "status": status}
        config = make_config(task, method, seed, "paper", **changes).flat
        history = pd.DataFrame([(9, "val", "loss", 1.0, steps_s)], columns=records.COLUMNS["history.csv"])
        test = pd.DataFrame([], columns=records.COLUMNS["test.csv"])
        folder = run_folder("paper", task, method, seed, tmp_path)
        records.write_run(folder, config=config, history=history, test=test, **about)

    write("granular", "p_loss", 0, 60)
    write("granular", "p_loss", 1, 120)
    write("granular", "p_loss", 2, 30, status="failed:nonfinite")
    write("granular", "mss_linear", 0, 60, steps_s=6 * 3600)
    write("granular", "mss_random", 0, 60, lr=0.5)
    write("chirplet_slow_moderate", "scrapl", 19, 15)
    write("tr808_meso", "jtfs", 3, 66)
    assert main(["status", "--profile", "paper", "--output", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    groups, tasks, *rows = [line.split() for line in said.split("\n\n")[1].splitlines()]
    assert groups == ["granular", "chirplet", "tr808"]
    assert tasks == "slow_slow slow_moderate fast_moderate fast_fast micro meso".split()
    unknown, mss = "0/0/20 0+?", "0/0/40 0+? 0/0/40 0+1.20"
    assert {method: " ".join(words) for method, *words in rows} == {
        "p_loss": "2/1/17 3.50+25.50",
        "jtfs": "0/0/1 0+147 0/0/4 0+? 1/0/3 1.10+3.30",
        "scrapl": f"0/0/20 0+267 {unknown} 1/0/19 0.25+4.75 {unknown} {unknown} 0/0/40 0+? 0/0/40 0+4.00",
        METHOD: f"0/0/20 0+267 {unknown} 0/0/20 0+5.00 {unknown} {unknown} 0/0/40 0+? 0/0/40 0+4.00",
        "scrapl_padam": "0/0/20 0+267",
        "scrapl_plain": "0/0/20 0+267",
        "mss_linear": f"1/0/19 6.00+114 {mss}",
        "mss_log_linear": f"0/0/20 0+80.00 {mss}",
        "mss_revisited": f"0/0/20 0+80.00 {mss}",
        "mss_random": f"0/0/19+1 stale 0+76.00 {mss}",
        "ms_clap": "not run",
        "panns_wavegram_logmel": "not run",
        IMPORTANCE: "0/0/1 0+13.33 0/0/1 0+? 0/0/1 0+0.25 0/0/1 0+? 0/0/1 0+? 0/0/1 0+? 0/0/1 0+0.10",
    }
    # 25.5 + 146.7 + 4 x 266.7 + 114 + 80 + 80 + 76 + 13.3; chirplet 4.75 + 5 + 0.25; drums 3.3 + 2 x 4 + 4 x 1.2 + 0.1.
    # Unknown: three chirplet tasks of 41, the micro drums' 4 + 6 x 40 + 1
    assert "in all 5 done, 1 failed, 1 stale, 829 missing; 10.85 hours spent, 1628 to go and 368 times ?" in said
    assert f"ms_clap not run: {NOT_RUN['ms_clap']}" in said


def test_exit_codes(tmp_path, computed_here, monkeypatch, capsys):
    assert run(tmp_path, "--method=p_loss,p_loss", "--task=granular,granular") == 0
    assert computed_here == [("p_loss", 0), ("p_loss", 1)]
    assert "2 of 2 runs finished, 0 failed, in " in capsys.readouterr().out

    # a failed run is a result: the command has done what it can
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Training, "check_finite", Mock(side_effect=trainer.RunFailed("nonfinite")))
        assert run(tmp_path, "--method=mss_linear", "--seeds=1") == 0
    said = capsys.readouterr().out
    assert "0 of 1 runs finished, 1 failed" in said and "granular/mss_linear/seed 1: failed:nonfinite" in said

    # a stale one is not
    train(smoke("mss_random", lr=2e-3), tmp_path)
    assert run(tmp_path, "--method=mss_random", "--seeds=0") == 1
    said = capsys.readouterr()
    assert "0 of 1 runs finished" in said.out and "stale, not used" in said.err

    # and a broken one stops everything
    (folder_of(smoke("p_loss", 0), tmp_path) / "test.csv").write_text("metric,value,unit\n")
    for command in ("status", "run"):
        assert main([command, "--profile", "smoke", "--output", str(tmp_path)]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: broken record ") and "test.csv: expected" in said and "delete the folder" in said


def test_importance_of_some_paths(tmp_path, importances, capsys):
    ask = ["importance", "--profile=smoke", "--task=chirplet_slow_slow,chirplet_fast_fast", f"--output={tmp_path}"]
    assert main([*ask, "--paths=0-2,7"]) == 0
    assert [call["paths"] for call in importances] == [[0, 1, 2, 7]] * 2
    assert "path probabilities of chirplet_fast_fast, profile smoke: 4 of 21 paths" in capsys.readouterr().out


def test_a_killed_or_crashed_worker_costs_its_own_run_only(tmp_path, monkeypatch, in_workers, capfd):
    """Seed 0 gets a loss that is not finite, seed 1 is killed, seed 2 raises, each at step 5."""

    words = [f"--method={METHOD}", "--seeds=0-2", "--workers=1", "--deterministic", "--budget-minutes=60"]
    in_workers("""
        if step == 4 and seed == 0:
            true = run.batch_loss
            run.batch_loss = lambda *args, **options: true(*args, **options) * float("nan")
        if step == 5 and seed == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == 5 and seed == 2:
            raise ValueError("a bug")
    """)
    assert run(tmp_path, *words) == 1
    out, err = capfd.readouterr()
    assert f"granular/{METHOD}/seed 0: failed:nonfinite at step 5" in out
    one, two = (f"granular/{METHOD}/seed {seed}" for seed in (1, 2))
    assert f"budget of 60 minutes: 1 runs done; under way: {one} at step 4, {two} at step 4; 0 missing; the same" in out
    logs = [checkpoint_folder(smoke(METHOD, seed), tmp_path).with_suffix(".log") for seed in range(3)]
    assert f"{one} crashed (exit status -9: nothing in its log); log: {logs[1]}" in err
    assert f"{two} crashed (exit status 1: ValueError: a bug); log: {logs[2]}" in err
    assert "Traceback" in logs[2].read_text() and logs[1].exists() and not logs[0].exists()
    assert f"2 of 3 runs crashed: {one}, {two}; the same command tries them again" in err

    failed = folder_of(smoke(METHOD), tmp_path) / "run.json"
    before = failed.read_bytes()
    monkeypatch.delenv("PYTHONPATH")
    assert run(tmp_path, *words) == 0
    out, err = capfd.readouterr()
    assert "2 of 3 runs finished, 1 failed" in out
    assert f"{one}: resumed from step 4" in err and f"{two}: resumed from step 4" in err
    assert failed.read_bytes() == before  # not tried again
    killed = read_run(folder_of(smoke(METHOD, 1), tmp_path))
    assert_same(killed, train(smoke(METHOD, 1), tmp_path / "uninterrupted"))
    assert killed.info["deterministic"] is True and litter(tmp_path) == []


def test_workers_make_the_probabilities_first_and_in_parts(tmp_path, capfd):
    arguments = ["--task", "chirplet_fast_fast", "--profile", "smoke", "--output", str(tmp_path), "--parts", "2"]
    assert main(["run", *arguments, "--method", "scrapl", "--seeds", "1"]) == 0
    said = capfd.readouterr()
    assert "1 of 1 runs finished" in said.out and "crashed" not in said.err and "3 runs" in said.err
    assert main(["importance", *arguments]) == 0
    assert capfd.readouterr().out == "path probabilities of chirplet_fast_fast, profile smoke: done\n"
    assert litter(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_stopping_the_command_ends_its_workers(tmp_path, number, in_workers):
    config = smoke(METHOD)
    arguments = f"run --task=granular --method={METHOD} --seeds=0 --profile=smoke --budget-minutes=60".split()
    in_workers("time.sleep(1 if step == 1 else 600)")  # it is to end wherever it is, not after a step
    command = subprocess.Popen(
        [sys.executable, "-m", "replication", *arguments, f"--output={tmp_path}"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    deadline = time.monotonic() + 300
    while not kept_of(config, tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    (worker,) = psutil.Process(command.pid).children()
    command.send_signal(number)
    said = command.communicate(timeout=60)[1]
    psutil.wait_procs([worker], timeout=60)
    assert not worker.is_running() and not folder_of(config, tmp_path).exists() and kept_of(config, tmp_path)
    if number == signal.SIGINT:
        assert command.returncode == 130 and "Traceback" not in said
        assert "stopped; the same command goes on from the checkpoints" in said
    else:
        log = checkpoint_folder(config, tmp_path).with_suffix(".log").read_text()
        assert command.returncode == -signal.SIGKILL
        assert "stopped: the process that started this worker is gone" in log


def test_a_grid_stopped_by_its_budget_twice_ends_as_if_it_had_not_been(tmp_path, monkeypatch, in_workers, capfd):
    """A budget is about to end as soon as the progress of a run is there, which waits at its second step for that."""
    words = "{} runs done; under way: granular/p_loss/seed {} at step 2; {} missing; the same command goes on"
    ends = [words.format(0, 0, 1), words.format(1, 1, 0), "1 runs done; under way: none; 0 missing"]

    class UntilSeen(Budget):
        end_s = property(lambda self: time.monotonic() + (9 if progress.exists() else 1000), lambda self, value: None)

    in_workers("""
        if step == 1:
            asked, stop = [], signal.getsignal(signal.SIGUSR1)
            signal.signal(signal.SIGUSR1, lambda *arguments: (stop(*arguments), asked.append(True)))
        while step == 2 and not asked:
            wait()
    """)
    monkeypatch.setattr(__main__, "Budget", UntilSeen)
    for number, end in enumerate(ends):
        progress = checkpoint_folder(smoke("p_loss", number), tmp_path) / "progress.json"
        assert run(tmp_path, "--method=p_loss", "--workers=1", "--budget-minutes=60") == 0
        said = capfd.readouterr()
        assert "crashed" not in said.err and said.out.endswith(f"budget of 60 minutes: {end}\n")
        assert (f"granular/p_loss/seed {number - 1}: resumed from step 2" in said.err) == (number > 0)
    for seed in (0, 1):
        found = read_run(folder_of(smoke("p_loss", seed), tmp_path))
        assert_same(found, train(smoke("p_loss", seed), tmp_path / "whole"))
    assert litter(tmp_path) == []


@pytest.mark.parametrize("deaf", [False, True])
def test_a_worker_that_has_nothing_to_keep_or_does_not_stop_is_ended_in_time(tmp_path, monkeypatch, capfd, deaf):
    """Path probabilities and starting workers end at the signal; one that ignores it, before the budget is over."""
    budget, started = Budget(math.inf, 0.9), []

    def popen(command, **options):
        trap = "trap '' USR1; " if deaf else ""
        started.append(subprocess.Popen(["sh", "-c", f"{trap}exec sleep 100"], **options))
        budget.end_s = time.monotonic() + 3
        return started[-1]

    monkeypatch.setattr(jobs, "subprocess", SimpleNamespace(Popen=popen, DEVNULL=subprocess.DEVNULL))
    pool = Pool(tmp_path, "cpu", workers=1)
    assert ensure_runs(["granular"], ["p_loss"], [0, 1], "smoke", tmp_path, budget=budget, pool=pool) == []
    left_s = budget.end_s - time.monotonic()
    assert [process.poll() for process in started] == [-(signal.SIGTERM if deaf else signal.SIGUSR1)]
    assert [(c.method, c.seed) for c in budget.left] == [("p_loss", 1), ("p_loss", 0)]
    assert -2 < left_s < (0.9 / 5 if deaf else 3)
    assert "crashed" not in capfd.readouterr().err and not list(tmp_path.rglob("*.log"))


def test_the_budget_begins_with_the_command(tmp_path, monkeypatch, capfd):
    """Its imports included: of 10 minutes that began 9.6 minutes ago nothing is left to start a run in."""
    monkeypatch.setattr(Pool, "start", lambda *_: pytest.fail("started"))
    arguments = ["run", "--profile", "smoke", "--output", str(tmp_path), "--task", "granular", "--method", "p_loss"]
    assert main([*arguments, "--budget-minutes", "10"], started_s=time.monotonic() - 9.6 * 60) == 0
    assert "budget of 10 minutes: 0 runs done; under way: none; 2 missing" in capfd.readouterr().out
    assert main([*arguments, f"--budget-minutes={2.9 * STOP_S['smoke'] / 60}"]) == 0
    assert "; 2 missing; none is started in the last 30 s" in capfd.readouterr().out


def command(*arguments, flags=(), env=None, **options):
    words = [sys.executable, *flags, "-m", "replication", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | (env or {})
    return subprocess.run(words, env=environment, capture_output=True, timeout=300, **options)


def test_warnings_as_errors_an_unwritable_home_and_another_locale_change_nothing(tmp_path):
    """The whole overview, letter by letter; the home does not exist, the locale's encoding is ASCII."""
    usual = command("status", cwd=ROOT)
    odd = {"HOME": "/proc/no-home", "XDG_CACHE_HOME": "/proc/no-cache", "MPLCONFIGDIR": ""}
    odd |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    found = command("status", cwd=tmp_path, flags=["-W", "error"], env=odd)
    assert usual.returncode == found.returncode == 0, found.stderr.decode(errors="replace")
    assert len(usual.stdout) > 1000 and usual.stdout == found.stdout


def test_output_that_is_not_utf_8_has_signs_replaced(tmp_path, monkeypatch):
    """`compare` writes ± and ‰; latin-1 has the first one only."""
    synthetic.write_all(tmp_path, ["p_loss"])
    said = io.TextIOWrapper(io.BytesIO(), "latin-1")
    monkeypatch.setattr(sys, "stdout", said)
    assert main(["compare", "--output", str(tmp_path)]) == 0
    said.flush()
    text = said.buffer.getvalue().decode("latin-1")
    assert "±" in text and "?" in text and "Table" in text


def test_relative_folders_mean_the_same_in_every_process(tmp_path):
    """`TR808_DIR=drums` and --output out, from a folder that is not the project: the worker reads these sounds, and
    only these."""
    (tmp_path / "drums").mkdir()
    for n, name in enumerate(["BD", "SD", "Tom", "OH", "CH"] * 8):
        sound = np.random.default_rng(n).standard_normal(22050) * np.exp(-np.arange(22050) / 3000) / 10
        soundfile.write(tmp_path / "drums" / f"{name} {n:02}.wav", sound, 44100, subtype="FLOAT")
    arguments = ["--task=tr808_micro", "--method=mss_linear", "--seeds=0", "--profile=smoke", "--output=out"]
    found = command("run", *arguments, cwd=tmp_path, env={"TR808_DIR": "drums"})
    assert found.returncode == 0, found.stderr
    record = read_run(run_folder("smoke", "tr808_micro", "mss_linear", 0, tmp_path / "out"))
    assert record.ok and re.fullmatch("recordings [0-9a-f]{16}", record.config["sounds"])
