"""The command line and the worker processes behind it: exit codes, messages, kills, crashes, Ctrl-C."""

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace
from unittest.mock import Mock

import pandas as pd
import psutil
import pytest
import torch

from replication import __main__, records
from replication import trainer as training
from replication.__main__ import _seeds, main
from replication.records import IMPORTANCE, ROOT, read_run, run_folder
from replication.tasks import METHODS, NOT_RUN, make_config
from replication.trainer import STOP_S, Budget, checkpoint_folder, ensure_runs, train

pytestmark = pytest.mark.usefixtures("one_thread")


def folder_of(method, seed, output):
    return run_folder("smoke", "granular", method, seed, output)


def run(output, *arguments):
    return main(["run", "--profile", "smoke", "--output", str(output), *arguments])


# ---- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, seeds",
    [("0-4", [0, 1, 2, 3, 4]), ("0,2", [0, 2]), ("3", [3]), ("7,0-2", [7, 0, 1, 2]), ("1,0-2,1", [1, 0, 2])],
)
def test_seeds(text, seeds):
    assert _seeds(text) == seeds


@pytest.mark.parametrize(
    "text, message",
    [
        (text, f"seeds are numbers and ranges such as 0-4 or 0,2,5; got {text!r}")
        for text in ("", "a", "0,", "1-", "-1", "0-1-2", "1.5", "0..4", "0 1")
    ]
    + [
        ("0-99999999999", "'0-99999999999' is more than a million seeds"),
        ("4-0", "the range '4-0' is empty; write the smaller number first"),
        ("1,4-2", "the range '4-2' is empty"),
    ],
)
def test_bad_seeds_are_refused(tmp_path, text, message, capsys):
    with pytest.raises(SystemExit) as refused:
        run(tmp_path, "--seeds", text)
    assert refused.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0", "-5", "nan", "inf", "1e999", "soon", ""])
def test_a_budget_that_is_no_length_of_time_is_refused(tmp_path, monkeypatch, text, capsys):
    monkeypatch.setattr(__main__, "ensure_runs", lambda *_: pytest.fail("started"))
    with pytest.raises(SystemExit) as refused:
        run(tmp_path, f"--budget-minutes={text}")
    said = f"a budget is a positive number of minutes such as 25 or 7.5; got {text!r}"
    assert refused.value.code == 2 and said in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["run", "--profile", "papr"], "unknown profile 'papr': did you mean 'paper'"),
        (["run", "--task", "granulr"], "unknown task 'granulr': did you mean 'granular'"),
        (["run", "--method", "p_loss,mss_lin"], "unknown method 'mss_lin': did you mean 'mss_linear'"),
        (["importance", "--task", "granulr"], "unknown task 'granulr': did you mean 'granular'"),
        (
            ["importance", "--profile", "smoke", "--task", "granular", "--paths", "30-35"],
            "paths must be numbers from 0 to 34, got 35",
        ),
        (
            ["run", "--method", "ms_clap"],
            "method 'ms_clap' is not run: weights unavailable: ms_clap needs a pretrained model",
        ),
        (["run", "--seeds", "5000000000"], "seed must be an integer from 0 to 2^32 - 1, got 5000000000"),
        (["run", "--workers", "0"], "workers must be at least 1, got 0"),
        (["run", "--device", "gpu", "--profile", "smoke"], "unknown device 'gpu': use cpu, cuda or cuda:<n>"),
        (["status", "--profile", "quik"], "unknown profile 'quik': did you mean 'quick'"),
        (["compare", "--profile", "quik"], "unknown profile 'quik': did you mean 'quick'"),
        (["notebook", "-p", "epochs"], "-p takes name=value, got 'epochs'"),
    ],
)
def test_bad_input_is_refused_in_one_line(tmp_path, monkeypatch, arguments, message, capsys):
    monkeypatch.setattr(training, "_run_all", lambda *_: pytest.fail("started"))
    monkeypatch.setitem(sys.modules, "msclap", None)  # import fails, as without the extra
    assert main([*arguments, "--output", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {message}") and len(said.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
@pytest.mark.parametrize("arguments", [["--profile", "paper"], ["--device", "cuda"]])
def test_cuda_without_cuda_is_refused(tmp_path, arguments, capsys):
    assert main(["run", "--output", str(tmp_path), *arguments]) == 2
    assert "this PyTorch sees 0 CUDA devices; use --device cpu" in capsys.readouterr().err


def test_an_output_that_is_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert (
        main(
            [
                "run",
                "--profile",
                "smoke",
                "--task",
                "granular",
                "--method",
                "p_loss",
                "--output",
                str(tmp_path / "file"),
            ]
        )
        == 2
    )
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("error: ") and str(tmp_path / "file") in said and "Traceback" not in said


def test_a_reader_who_has_seen_enough_ends_the_command(monkeypatch):
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # is put back afterwards
    monkeypatch.setattr(__main__, "_status", Mock(side_effect=BrokenPipeError))
    assert main(["status"]) == 128 + signal.SIGPIPE


# ---- exit codes and status ------------------------------------------------------------------------------------------


def test_an_embedding_loss_is_trained_when_asked_for_by_name(tmp_path, computed_here, monkeypatch, capsys):
    """With a stand-in of the package's shape: energies of 21 parts."""

    class Clap:
        def __init__(self, version, use_cuda):
            self.clap = torch.nn.Module()
            self.clap.audio_encoder = torch.nn.Module()
            self.clap.audio_encoder.forward = lambda audio: (audio.unflatten(1, (21, -1)).square().mean(2), None)

    monkeypatch.setitem(sys.modules, "msclap", SimpleNamespace(CLAP=Clap))
    assert run(tmp_path, "--method", "ms_clap", "--seeds", "1") == 0
    assert computed_here == [("ms_clap", 1)] and "1 of 1 runs finished, 0 failed" in capsys.readouterr().out
    assert main(["status", "--profile", "smoke", "--output", str(tmp_path)]) == 0
    assert "not run: weights unavailable" in capsys.readouterr().out


def rows(said):
    """The status matrix: method -> words of its row."""
    lines = [line.split() for line in said.split("\n\n")[1].splitlines()]
    return {line[0]: line[1:] for line in lines if line[0] in {*METHODS, IMPORTANCE}}


def test_status_matrix(tmp_path, monkeypatch, capsys):
    """Records of 1 h, 2 h and 0.5 h (failed) of P-loss, and one of MSS linear whose last process took 1 h, all of its steps 6 h.
    An hour of P-loss is 1 / 0.15 of SCRAPL, one of MSS 1 / 0.3: by the three finished runs SCRAPL takes 40 / 3 h."""
    monkeypatch.delenv("TR808_DIR", raising=False)

    def write(task, method, seed, minutes, steps_s=60.0, status="ok", **changes):
        monkeypatch.setattr(records, "utc_now", lambda: f"2026-01-01T{12 + minutes // 60}:{minutes % 60:02}:00+00:00")
        history = pd.DataFrame([(9, "val", "loss", 1.0, steps_s)], columns=records.COLUMNS["history.csv"])
        records.write_run(
            run_folder("paper", task, method, seed, tmp_path),
            status=status,
            start_utc="2026-01-01T12:00:00+00:00",
            config=make_config(task, method, seed, "paper", **changes).flat,
            history=history,
            test=pd.DataFrame([], columns=records.COLUMNS["test.csv"]),
            device="cpu",
            threads=1,
            train_step_ms=None,
        )

    write("granular", "p_loss", 0, 60)
    write("granular", "p_loss", 1, 120)
    write("granular", "p_loss", 2, 30, status="failed:nonfinite")
    write("granular", "mss_linear", 0, 60, steps_s=6 * 3600)
    write("granular", "mss_random", 0, 60, lr=0.5)
    write("chirplet_slow_moderate", "scrapl", 19, 15)
    write("tr808_meso", "jtfs", 3, 66)
    assert main(["status", "--profile", "paper", "--output", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    heads = [line.split() for line in said.split("\n\n")[1].splitlines()[:2]]
    assert heads == [
        ["granular", "chirplet", "tr808"],
        [*"slow_slow slow_moderate fast_moderate fast_fast micro meso".split()],
    ]
    unknown, drums = ["0/0/20", "0+?"], ["0/0/40", "0+?"]
    assert rows(said) == {
        "p_loss": ["2/1/17", "3.50+25.50"],
        "jtfs": ["0/0/1", "0+147", "0/0/4", "0+?", "1/0/3", "1.10+3.30"],
        "scrapl": ["0/0/20", "0+267", *unknown, "1/0/19", "0.25+4.75", *unknown, *unknown, *drums, "0/0/40", "0+4.00"],
        "scrapl_no_theta_is": [
            "0/0/20",
            "0+267",
            *unknown,
            "0/0/20",
            "0+5.00",
            *unknown,
            *unknown,
            *drums,
            "0/0/40",
            "0+4.00",
        ],
        "scrapl_padam": ["0/0/20", "0+267"],
        "scrapl_plain": ["0/0/20", "0+267"],
        "mss_linear": ["1/0/19", "6.00+114", *drums, "0/0/40", "0+1.20"],
        "mss_log_linear": ["0/0/20", "0+80.00", *drums, "0/0/40", "0+1.20"],
        "mss_revisited": ["0/0/20", "0+80.00", *drums, "0/0/40", "0+1.20"],
        "mss_random": ["0/0/19+1", "stale", "0+76.00", *drums, "0/0/40", "0+1.20"],
        "ms_clap": ["not", "run"],
        "panns_wavegram_logmel": ["not", "run"],
        "theta_importance": [
            "0/0/1",
            "0+13.33",
            "0/0/1",
            "0+?",
            "0/0/1",
            "0+0.25",
            *["0/0/1", "0+?"] * 3,
            "0/0/1",
            "0+0.10",
        ],
    }
    # 25.5 + 146.7 + 4 x 266.7 + 114 + 80 + 80 + 76 + 13.3; chirplet 4.75 + 5 + 0.25; drums 3.3 + 2 x 4 + 4 x 1.2 + 0.1. Unknown: three
    # chirplet tasks of 41, the micro drums' 4 + 6 x 40 + 1
    assert "in all 5 done, 1 failed, 1 stale, 829 missing; 10.85 hours spent, 1628 to go and 368 times ?" in said
    assert f"ms_clap not run: {NOT_RUN['ms_clap']}" in said


def test_status_and_exit_codes(tmp_path, computed_here, monkeypatch, capsys):
    def counts():
        assert main(["status", "--profile", "smoke", "--output", str(tmp_path)]) == 0
        return {method: words[0] for method, words in rows(capsys.readouterr().out).items()}

    found = counts()
    assert found["p_loss"] == found["scrapl"] == "0/0/2" and found[IMPORTANCE] == "0/0/1"

    assert run(tmp_path, "--method", "p_loss,p_loss", "--task", "granular,granular") == 0
    assert computed_here == [("p_loss", 0), ("p_loss", 1)]
    assert "2 of 2 runs finished, 0 failed, in " in capsys.readouterr().out
    assert counts()["p_loss"] == "2/0/0"

    # a failed run is a result: the command has done what it can
    with monkeypatch.context() as patch:
        patch.setattr(training.Training, "_check_finite", Mock(side_effect=training.RunFailed("nonfinite")))
        assert run(tmp_path, "--method", "mss_linear", "--seeds", "1", "--task", "granular") == 0
    assert "0 of 1 runs finished, 1 failed" in (said := capsys.readouterr().out)
    assert "granular/mss_linear/seed 1: failed:nonfinite" in said
    assert counts()["mss_linear"] == "0/1/1"

    # a stale one is not
    train(make_config("granular", "mss_random", 0, "smoke", lr=2e-3), tmp_path)
    assert run(tmp_path, "--method", "mss_random", "--seeds", "0", "--task", "granular") == 1
    said = capsys.readouterr()
    assert "0 of 1 runs finished" in said.out and "stale, not used" in said.err
    assert counts()["mss_random"] == "0/0/1+1"

    (folder_of("p_loss", 0, tmp_path) / "test.csv").write_text("metric,value,unit\n")
    for arguments in (["status"], ["run", "--method", "p_loss"]):
        assert main([*arguments, "--profile", "smoke", "--output", str(tmp_path)]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: broken record ") and "test.csv: expected" in said and "delete the folder" in said


def test_importance_in_parts(tmp_path, monkeypatch, capsys):
    asked = []

    def compute(task, profile, output, device, paths, watch):
        asked.append((task, profile, output, device, paths, watch))
        return "100 of 315 paths"

    monkeypatch.setattr(__main__, "compute_importance", compute)
    assert (
        main(["importance", "--task", "granular,chirplet_fast_fast", "--output", str(tmp_path), "--paths", "0-2,7"])
        == 0
    )
    assert asked == [
        (task, "quick", tmp_path, "cpu", [0, 1, 2, 7], None) for task in ("granular", "chirplet_fast_fast")
    ]
    assert "path probabilities of granular, profile quick: 100 of 315 paths" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["importance", "--paths", "x"])
    assert "paths are numbers and ranges such as" in capsys.readouterr().err


# ---- worker processes -----------------------------------------------------------------------------------------------

FAULTY = """
import functools, os, signal, sys
sys.path.insert(0, os.getcwd())
from scrapl_lib import __main__, training
__main__.train = functools.partial(training.train, checkpoint_every_s=0)
seed, batch_loss = sys.argv[sys.argv.index("--seeds") + 1], training.Training._batch_loss
def faulty(self, *args, **options):
    loss = batch_loss(self, *args, **options)
    if self.step == 5 and self.encoder.training:
        if seed == "0":
            return loss * float("nan")
        if seed == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("a bug")
    return loss
training.Training._batch_loss = faulty
sys.exit(__main__.main(sys.argv[1:]))
"""


def test_a_killed_or_crashed_worker_costs_its_own_run_only(tmp_path, monkeypatch, capfd):
    method = "scrapl_no_theta_is"
    faulty = tmp_path / "faulty.py"
    faulty.write_text(FAULTY)

    def config(seed):
        return make_config("granular", method, seed, "smoke")

    def popen(command, **options):
        assert command[:3] == [sys.executable, "-m", "replication"]
        return subprocess.Popen([sys.executable, str(faulty), *command[3:]], **options)

    def ask():
        return {run.seed: run for run in ensure_runs(["granular"], [method], range(3), "smoke", tmp_path, workers=1)}

    with monkeypatch.context() as patch:
        patch.setattr(training, "subprocess", SimpleNamespace(Popen=popen, DEVNULL=subprocess.DEVNULL))
        runs = ask()
    assert {seed: run.status.split(",")[0] for seed, run in runs.items()} == {0: "failed:nonfinite at step 5"}
    said = capfd.readouterr().err
    logs = {seed: checkpoint_folder(config(seed), tmp_path).with_suffix(".log") for seed in range(3)}
    assert f"granular/{method}/seed 1 crashed (exit status -9: nothing in its log); log: {logs[1]}" in said
    assert f"granular/{method}/seed 2 crashed (exit status 1: ValueError: a bug); log: {logs[2]}" in said
    assert "Traceback" in logs[2].read_text() and logs[1].exists() and not logs[0].exists()
    named = f"granular/{method}/seed 1, granular/{method}/seed 2"
    assert f"2 of 3 runs crashed: {named}; the same command tries them again" in said

    failed = folder_of(method, 0, tmp_path) / "run.json"
    before = failed.read_bytes()
    runs = ask()
    assert {seed: run.ok for seed, run in runs.items()} == {0: False, 1: True, 2: True}
    said = capfd.readouterr().err
    assert all(f"granular/{method}/seed {seed}: resumed from step 4" in said for seed in (1, 2))
    assert failed.read_bytes() == before  # not tried again
    whole = train(config(1), tmp_path / "uninterrupted")
    assert (runs[1].history.drop(columns="wall_s") == whole.history.drop(columns="wall_s")).all(axis=None)
    assert len(whole.test) > 5 and runs[1].test.equals(whole.test)
    assert not [path for path in (tmp_path / "checkpoints").rglob("*") if path.is_file() and path.suffix != ".lock"]


FAST = """
import os, sys
sys.path.insert(0, os.getcwd())
import torch
from replication import __main__, path_probabilities
def fake(loss, encode, synthesize, inputs, params, *_, paths, **__):
    yield from ((path, torch.ones(2, dtype=torch.float64)) for path in paths)
path_probabilities.curvature_by_path = fake
sys.exit(__main__.main(sys.argv[1:]))
"""


def test_workers_make_the_probabilities_first(tmp_path, monkeypatch, capfd):
    task, script, started = "chirplet_fast_fast", tmp_path / "fast.py", []
    script.write_text(FAST)

    def popen(command, **options):
        started.append(command[3])
        return subprocess.Popen([sys.executable, str(script), *command[3:]], **options)

    monkeypatch.setattr(training, "subprocess", SimpleNamespace(Popen=popen, DEVNULL=subprocess.DEVNULL))
    (run,) = ensure_runs([task], ["scrapl"], [1], "smoke", tmp_path, workers=1)
    assert run.ok and started == ["importance", "run"] and "crashed" not in capfd.readouterr().err
    assert not [path for path in (tmp_path / "checkpoints").rglob("*") if path.is_file() and path.suffix != ".lock"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_stopping_the_command_ends_its_workers(tmp_path, number, request, capfd):
    config = make_config("granular", "jtfs", 0, "smoke")  # the slowest: some seconds of training
    arguments = [
        "run",
        "--task",
        "granular",
        "--method",
        "jtfs",
        "--seeds",
        "0",
        "--profile",
        "smoke",
        "--output",
        str(tmp_path),
    ]
    command = subprocess.Popen(
        [sys.executable, "-m", "replication", *arguments],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    progress, deadline = checkpoint_folder(config, tmp_path) / "progress.json", time.monotonic() + 120
    while not progress.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    (worker,) = psutil.Process(command.pid).children()
    command.send_signal(number)
    said = command.communicate(timeout=60)[1]
    assert command.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL)
    psutil.wait_procs([worker], timeout=60)
    assert not worker.is_running()
    record = folder_of("jtfs", 0, tmp_path)
    assert not record.exists()
    if number == signal.SIGINT:
        assert "stopped; the same command goes on from the checkpoints" in said and "Traceback" not in said
        request.getfixturevalue("computed_here")
        assert main(arguments) == 0
        assert "1 of 1 runs finished, 0 failed" in capfd.readouterr().out and read_run(record).ok
    else:
        log = checkpoint_folder(config, tmp_path).with_suffix(".log")
        assert "stopped: the process that started this worker is gone" in log.read_text()


# ---- budgets --------------------------------------------------------------------------------------------------------

HELD = """
import os, signal, sys, time
sys.path.insert(0, os.getcwd())
from scrapl_lib import __main__, training
asked, train_step = [], training.Training._train_step
def held(self, items):
    if self.step == 0:
        stop = signal.getsignal(signal.SIGUSR1)
        signal.signal(signal.SIGUSR1, lambda *arguments: (stop(*arguments), asked.append(True)))
    train_step(self, items)
    while self.step == 2 and not asked:
        time.sleep(0.02)
training.Training._train_step = held
sys.exit(__main__.main(sys.argv[1:]))
"""


class UntilSeen:
    """A budget that is about to end as soon as a worker's progress is there: however slow the machine, the worker is at a step."""

    def __init__(self, config, output):
        self.file, self.stop_s, self.left = checkpoint_folder(config, output) / "progress.json", 10.0, []

    @property
    def end_s(self):
        return time.monotonic() + (9 if self.file.exists() else 1000)


def workers_are(monkeypatch, *command):
    """In place of `python -m replication ...`; returns the processes."""
    started = []

    def popen(asked, **options):
        started.append(subprocess.Popen([*command, *asked[3:]], **options))
        return started[-1]

    monkeypatch.setattr(training, "subprocess", SimpleNamespace(Popen=popen, DEVNULL=subprocess.DEVNULL))
    return started


def test_a_grid_stopped_by_its_budget_twice_ends_as_if_it_had_not_been(tmp_path, monkeypatch, capfd):
    configs = [make_config("granular", "p_loss", seed, "smoke") for seed in (0, 1)]
    (tmp_path / "held.py").write_text(HELD)

    def ask(until=None):
        """What the command says last, its log, and how many workers it started. until: the run whose progress ends the budget; each
        worker waits at step 2 for that."""
        with monkeypatch.context() as patch:
            started = workers_are(patch, sys.executable, str(tmp_path / "held.py")) if until else []
            if until:
                patch.setattr(__main__, "Budget", lambda end_s, stop_s: UntilSeen(until, tmp_path))
            arguments = ["--task", "granular", "--method", "p_loss", "--workers", "1", "--budget-minutes", "60"]
            assert run(tmp_path, *arguments) == 0
        said = capfd.readouterr()
        assert "crashed" not in said.err
        return said.out.splitlines()[-1], said.err, len(started)

    said, _, n = ask(configs[0])
    assert n == 1 and said.endswith(
        "0 runs done; under way: granular/p_loss/seed 0 at step 2; 1 missing; the same command goes on"
    )
    said, log, n = ask(configs[1])
    assert n == 2 and "granular/p_loss/seed 0: resumed from step 2" in log
    assert said.endswith(
        "1 runs done; under way: granular/p_loss/seed 1 at step 2; 0 missing; the same command goes on"
    )
    said, log, _ = ask()
    assert said == "budget of 60 minutes: 1 runs done; under way: none; 0 missing"
    assert "granular/p_loss/seed 1: resumed from step 2" in log
    for config in configs:
        whole, found = train(config, tmp_path / "whole"), read_run(folder_of("p_loss", config.seed, tmp_path))
        assert found.ok and len(found.history) == 19 and len(found.test) > 5
        assert found.history.drop(columns="wall_s").equals(whole.history.drop(columns="wall_s")) and found.test.equals(
            whole.test
        )
        of_this_call = {
            "start_utc",
            "end_utc",
            "peak_memory_mb",
            "train_step_ms",
            "files",
            "record_sha256",
            "code_version",
        }
        assert {*found.info} == {*whole.info} and len({*whole.info} - of_this_call) > 8
        assert all(found.info[key] == value for key, value in whole.info.items() if key not in of_this_call)
    assert not [path for path in (tmp_path / "checkpoints").rglob("*") if path.is_file() and path.suffix != ".lock"]


@pytest.mark.parametrize("deaf", [False, True])
def test_a_worker_that_has_nothing_to_keep_or_does_not_stop_is_ended_in_time(tmp_path, monkeypatch, capfd, deaf):
    """Path probabilities and starting workers end at the signal; one that ignores it, before the budget is over."""

    class FromNow(Budget):
        end = None

        @property
        def end_s(self):
            self.end = self.end or time.monotonic() + 3
            return self.end

        @end_s.setter
        def end_s(self, value):
            pass

    budget, trap = FromNow(0.0, 0.9), "trap '' USR1; " if deaf else ""
    started = workers_are(monkeypatch, "sh", "-c", f"{trap}exec sleep 100")
    assert ensure_runs(["granular"], ["p_loss"], [0, 1], "smoke", tmp_path, workers=1, budget=budget) == []
    left_s = budget.end_s - time.monotonic()
    assert [process.poll() for process in started] == [-(signal.SIGTERM if deaf else signal.SIGUSR1)]
    assert [(c.method, c.seed) for c in budget.left] == [("p_loss", 1), ("p_loss", 0)]
    assert -2 < left_s < (0.9 / 5 if deaf else 3)
    assert "crashed" not in capfd.readouterr().err and not list(tmp_path.rglob("*.log"))


@pytest.mark.parametrize("parts_left, n_started", [(2.9, 0), (30.0, 1)])
def test_no_run_is_started_that_cannot_come_to_a_checkpoint(tmp_path, monkeypatch, parts_left, n_started, capfd):
    started = workers_are(monkeypatch, "true")
    budget = Budget(time.monotonic() + parts_left * 100, 100.0)
    ensure_runs(["granular"], ["p_loss"], [0], "smoke", tmp_path, budget=budget)
    assert len(started) == n_started and len(budget.left) == 1 - n_started
    if not n_started:
        assert (
            run(tmp_path, "--task", "granular", "--method", "p_loss", f"--budget-minutes={2.9 * STOP_S['smoke'] / 60}")
            == 0
        )
        said = capfd.readouterr().out.splitlines()[-1]
        assert (
            said.endswith("0 runs done; under way: none; 2 missing; none is started in the last 30 s") and started == []
        )


def test_a_crash_within_a_budget_is_no_success(tmp_path, monkeypatch, capfd):
    workers_are(monkeypatch, "false")
    assert run(tmp_path, "--task", "granular", "--method", "p_loss", "--seeds", "0", "--budget-minutes", "60") == 1
    said = capfd.readouterr()
    assert "seed 0 crashed (exit status 1" in said.err and "0 runs done; under way: none; 1 missing" in said.out
    assert __main__.parser().parse_args(["run", "--budget-minutes", "7.5"]).budget_minutes == 7.5


def test_the_budget_begins_with_the_command(tmp_path, monkeypatch, capfd):
    """Its imports included: of 10 minutes that began 9.6 minutes ago nothing is left to start a run in."""
    monkeypatch.setattr(training, "Worker", lambda *_: pytest.fail("started"))
    arguments = ["run", "--profile", "smoke", "--output", str(tmp_path), "--task", "granular", "--method", "p_loss"]
    assert main([*arguments, "--budget-minutes", "10"], started_s=time.monotonic() - 9.6 * 60) == 0
    assert "budget of 10 minutes: 0 runs done; under way: none; 2 missing" in capfd.readouterr().out


KILLED = """
import functools, os, subprocess, sys, time
from types import SimpleNamespace
sys.path.insert(0, os.getcwd())
from scrapl_lib import __main__, training
if "--worker" in sys.argv:
    watch, train_step, hold = training.watch_parent(), training.Training._train_step, int(os.environ["HOLD"])
    __main__.train = functools.partial(training.train, checkpoint_every_s=0)
    def held(self, items):
        if self.step == hold:
            print("standing", flush=True)
        while self.step == hold:
            time.sleep(0.02)
            watch()
        train_step(self, items)
    training.Training._train_step = held
else:
    def popen(command, **options):
        return subprocess.Popen([sys.executable, __file__, *command[3:]], **options)
    training.subprocess = SimpleNamespace(Popen=popen, DEVNULL=subprocess.DEVNULL)
sys.exit(__main__.main(sys.argv[1:]))
"""


def test_a_run_killed_twice_under_a_budget_and_finished_ends_as_if_it_had_not_been(tmp_path):
    """`run --budget-minutes` as a process: first it is killed (at step 3), then its worker (at step 6); the third call finishes the
    run, with the history and the test values of one that was left alone. Seed 0; the same bits."""
    method, script = "scrapl_no_theta_is", tmp_path / "killed.py"
    config = make_config("granular", method, 0, "smoke")
    script.write_text(KILLED)
    arguments = [
        "run",
        "--task",
        "granular",
        "--method",
        method,
        "--seeds",
        "0",
        "--profile",
        "smoke",
        "--output",
        str(tmp_path),
        "--workers",
        "1",
        "--budget-minutes",
        "60",
    ]
    log = checkpoint_folder(config, tmp_path).with_suffix(".log")

    def start(hold, *words):
        environment = os.environ | {"HOLD": str(hold)}
        return subprocess.Popen(
            [sys.executable, *words, *arguments],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )

    for hold, kill_worker in ((3, False), (6, True)):
        command, deadline = start(hold, str(script)), time.monotonic() + 300
        while not (log.exists() and "standing" in log.read_text()):
            assert time.monotonic() < deadline and command.poll() is None
            time.sleep(0.05)
        (worker,) = psutil.Process(command.pid).children()
        (worker if kill_worker else command).kill()
        said = command.communicate(timeout=120)[0]
        psutil.wait_procs([worker], timeout=120)
        assert not worker.is_running() and training.kept_of(config, tmp_path) == f"step {hold}"
        if kill_worker:
            assert command.returncode == 1 and "crashed (exit status -9" in said and f"seed 0 at step {hold}" in said
            assert "resumed from step 3" in log.read_text()
        else:
            assert command.returncode == -signal.SIGKILL
            log.unlink()
    command = start(-1, "-m", "replication")
    said = command.communicate(timeout=300)[0]
    assert command.returncode == 0 and "resumed from step 6" in said and "1 of 1 runs finished, 0 failed" in said
    whole, found = train(config, tmp_path / "whole"), read_run(folder_of(method, 0, tmp_path))
    assert found.ok and len(found.history) == 19 and len(found.test) > 5
    assert found.history.drop(columns="wall_s").equals(whole.history.drop(columns="wall_s")) and found.test.equals(
        whole.test
    )
