"""What several test files share."""

import io
import os
import textwrap
from collections import Counter

import pytest
import torch

from replication import path_probabilities
from replication.jobs import Pool
from replication.records import ROOT, run_folder
from replication.tasks import make_config
from replication.trainer import train


def pytest_collection_modifyitems(items):
    """Tests marked `cuda` are skipped where there is no CUDA device."""
    if not torch.cuda.is_available():
        for item in (item for item in items if item.get_closest_marker("cuda")):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


TINY = dict(shape=512, J=5, Q1=2, Q2=1, J_fr=2, Q_fr=1)  # a JTFS of 21 paths: 3 rates of 7


def noise(*shape, seed=0, dtype=torch.float64):
    """Normal numbers of a seed; in float32 the same ones, rounded."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def relative_error(found, expected):
    """Largest absolute difference, in units of the largest expected value."""
    found, expected = (torch.as_tensor(values).detach() for values in (found, expected))
    assert found.shape == expected.shape and expected.numel() and expected.abs().max() > 0
    return float((found - expected).abs().max() / expected.abs().max())


def through_file(state, **options):
    """The state as torch.load reads it from a file, without pickles."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True, **options)


def smoke(method="scrapl_no_theta_is", seed=0, **changes):
    """The config of a granular run at toy size: three epochs of three steps."""
    return make_config("granular", method, seed, "smoke", **changes)


def folder_of(config, output):
    return run_folder(config.profile, config.task, config.method, config.seed, output)


def assert_same(found, whole):
    """Two records of one smoke run: the same bits but for times."""
    assert found.ok and len(found.history) == 19 and len(found.test) > 5
    assert found.history.drop(columns="wall_s").equals(whole.history.drop(columns="wall_s"))
    assert found.test.equals(whole.test)


@pytest.fixture(scope="module")
def one_thread():
    """As workers have: results are the same bits for the same number of threads only."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def computed_here(monkeypatch):
    """Missing runs are computed in this process instead of in workers; lists (method, seed) of them."""
    configs = []

    def run(self, missing, budget=None):
        for config in missing:
            configs.append((config.method, config.seed))
            train(config, self.output, self.device)

    monkeypatch.setattr(Pool, "run", run)
    return configs


FAULTY = """
import os, pathlib, signal, sys, time
if "--worker" in sys.orig_argv and "--seeds" in sys.orig_argv:
    from replication import trainer
    trainer.CHECKPOINT_EVERY_S = 0
    def wait():
        time.sleep(0.02)
    seed, steps = int(sys.orig_argv[sys.orig_argv.index("--seeds") + 1]), trainer.Training.steps
    def faulty(run):
        for step in steps(run):
{fault}
            yield step
    trainer.Training.steps = faulty
"""


@pytest.fixture
def in_workers(monkeypatch, tmp_path_factory):
    """`in_workers(text)`: every training process started from here executes `text` after each step and before its
    checkpoint; it knows seed, step, run and `wait()`. Checkpoints come after every step."""

    def use(text):
        folder = tmp_path_factory.mktemp("site")
        (folder / "sitecustomize.py").write_text(FAULTY.format(fault=textwrap.indent(textwrap.dedent(text), " " * 12)))
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(ROOT)]))

    return use


@pytest.fixture
def importances(monkeypatch):
    """`curvature_by_path` without its arithmetic: 1 + path and 2 + path for the two parameters. Lists its calls."""
    calls = []

    def fake(loss, encode, synthesize, inputs, params, n_iter, tol, *, paths, report):
        weights = [w.detach().clone() for w in params]
        calls.append(dict(loss=loss, encode=encode, synthesize=synthesize, inputs=inputs, params=weights, paths=paths))
        for path in paths:
            report("curvature", 1, 1)
            yield path, torch.tensor([1.0 + path, 2.0 + path], dtype=torch.float64)

    monkeypatch.setattr(path_probabilities, "curvature_by_path", fake)
    return calls


def pytest_terminal_summary(terminalreporter):
    """After the whole suite: the twelve faults by name, and what became of their tests."""
    outcomes = [
        (report.nodeid.split("[")[0].rsplit("/")[-1], outcome)
        for outcome in ("passed", "failed", "error", "skipped")
        for report in terminalreporter.getreports(outcome)
        if report.when != "teardown"
    ]
    if any(test.startswith("test_faults.py") and outcome == "passed" for test, outcome in outcomes):
        from test_faults import FAULTS

        terminalreporter.section("faults")
        for fault, tests in FAULTS.items():
            counts = Counter(outcome for test, outcome in outcomes if test in tests)
            words = ", ".join(f"{n} {outcome}" for outcome, n in counts.items())
            terminalreporter.write_line(f"{fault}: {words or 'not run'}")
