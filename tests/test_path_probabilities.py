"""Path probabilities as a record: what they are computed from, in parts, resumed after a kill, read, refused."""

import hashlib
import json
import re

import numpy as np
import pandas as pd
import pytest
import synthetic_records as synthetic
import torch

from replication.checkpoints import checkpoint_folder
from replication.data import meso_seeds
from replication.path_probabilities import (
    compute_importance,
    importance_table,
    path_probabilities,
    recorded_importance,
    saved_curvature,
)
from replication.problem import Problem
from replication.records import BrokenRecord, config_hash, run_folder, write_text_atomic
from replication.status import kept_of, states
from replication.tasks import TASKS, TR808, grid, importance_config, make_config
from replication.trainer import train, train_steps

TASK = "chirplet_slow_slow"
N_PATHS = {"granular": 35, TASK: 21}  # of the smoke profile

pytestmark = pytest.mark.usefixtures("one_thread")


def scrapl(seed=0, task=TASK, **changes):
    return make_config(task, "scrapl", seed, "smoke", **changes)


def folder_of(output, task=TASK):
    return run_folder("smoke", task, "theta_importance", 0, output)


@pytest.mark.parametrize("task, n_batches", [("granular", 2), (TASK, 1)])
def test_they_are_those_of_the_start_of_training(tmp_path, importances, task, n_batches, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a relative output folder stays where it was when the call began
    assert compute_importance(task, "smoke", "here", watch=lambda: monkeypatch.chdir("/")) == "done"
    assert folder_of(tmp_path / "here", task).exists()
    (call,) = importances
    run = Problem(scrapl(task=task))
    weights = list(run.encoder.parameters())
    assert all(map(torch.equal, call["params"], weights)) and len(call["params"]) == len(weights) > 10
    batches = run.data.batches("train", 4, 0, 0)[:n_batches]
    assert len(call["inputs"]) == len(call["synthesize"]) == n_batches
    run.encoder.eval()
    for step, (x, synthesize, items) in enumerate(zip(call["inputs"], call["synthesize"], batches), 1):
        assert torch.equal(x, run.x[items])
        theta = run.data.theta[items]
        assert torch.equal(synthesize(theta), run.synth(theta, meso_seeds(0, step, 4)))
        theta_hat = call["encode"](x)
        assert torch.equal(theta_hat, run.encoder(run.encoder.features(x))) and theta_hat.requires_grad
    assert call["paths"] == list(range(N_PATHS[task])) and call["loss"].n_paths == N_PATHS[task]


def test_the_record_and_the_runs_that_draw_from_it(tmp_path, importances):
    compute_importance(TASK, "smoke", tmp_path)
    folder, columns = folder_of(tmp_path), "path_idx n2 n_fr rate scale spin curvature_am curvature_fm probability"
    assert sorted(path.name for path in folder.iterdir()) == ["probabilities.csv", "run.json"]
    table = pd.read_csv(folder / "probabilities.csv")
    assert list(table.columns) == columns.split()
    for row, path in zip(table.itertuples(index=False), importances[0]["loss"].jtfs.paths, strict=True):
        assert (row.path_idx, row.n2, row.n_fr, row.spin) == (path.index, path.n2, path.n_fr, path.spin)
        assert abs(row.rate - path.rate) < 1e-9 and abs(row.scale - path.scale) < 1e-8
    i = np.arange(N_PATHS[TASK])
    expected = ((1 + i) / (1 + i).sum() + (2 + i) / (2 + i).sum()) / 2
    assert np.abs(table["curvature_am"] - (1 + i)).max() < 1e-12
    assert np.abs(table["probability"] - expected).max() < 1e-9
    info, config = json.loads((folder / "run.json").read_text()), importance_config(TASK, "smoke")
    assert info["config_hash"] == config_hash(config.flat) and info["method"] == "theta_importance"
    assert "lr" not in info["config"] and info["config"]["importance_examples"] == 4
    assert recorded_importance(TASK, "smoke", tmp_path).equals(table)
    assert recorded_importance("granular", "smoke", tmp_path) == "no record yet"

    assert compute_importance(TASK, "smoke", tmp_path) == "done" and len(importances) == 1  # not computed again
    probs, digest = path_probabilities(scrapl(7, lr=0.5), tmp_path)  # seeds and learning rates share them
    assert abs(probs.sum() - 1) < 1e-12 and np.abs(probs.numpy() - expected).max() < 1e-9
    drawn = list(train_steps(scrapl(1), tmp_path))
    run = train(scrapl(1), tmp_path)  # is there already
    assert run.ok and torch.equal(drawn[0].loss.probs, probs) and run.info["probabilities_sha256"] == digest
    assert hashlib.sha256((folder / "probabilities.csv").read_bytes()).hexdigest() == digest


def test_runs_without_their_probabilities_are_refused(tmp_path):
    command = f"python -m replication importance --task {TASK} --profile smoke"
    with pytest.raises(ValueError, match=f"missing path probabilities .*: run {command}"):
        train(scrapl(1), tmp_path)
    folder = synthetic.write_importance(tmp_path, TASK)
    stale = f"stale path probabilities .*: delete {re.escape(str(folder))}, then run {command}"
    with pytest.raises(ValueError, match=stale):
        train(scrapl(1, channels=5), tmp_path)
    with pytest.raises(ValueError, match="another configuration: delete that folder to compute it again"):
        compute_importance(TASK, "smoke", tmp_path, channels=5)
    file = folder / "probabilities.csv"
    file.write_text(file.read_text().replace(",1,", ",2,", 1))
    broken = f"probabilities.csv: expected 21 rows .* delete the folder .* and run: {command}"
    for call in (train, importance_table):
        with pytest.raises(BrokenRecord, match=broken):
            call(scrapl(1), tmp_path)
    assert not run_folder("smoke", TASK, "scrapl", 1, tmp_path).exists()
    with pytest.raises(ValueError, match="importance_examples must be a multiple of batch_size = 4, got 6"):
        scrapl(importance_examples=6)


def test_in_parts_and_resumed_after_a_kill(tmp_path, importances):
    config = importance_config(TASK, "smoke")
    assert compute_importance(TASK, "smoke", tmp_path, paths=range(10)) == "10 of 21 paths"
    assert compute_importance(TASK, "smoke", tmp_path, paths=[10, 12]) == "12 of 21 paths"
    calls = []

    def kill():
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # three paths are saved
        compute_importance(TASK, "smoke", tmp_path, watch=kill)
    assert sorted(saved_curvature(config, tmp_path)) == [*range(15)] and kept_of(config, tmp_path) == "15 paths"
    assert compute_importance(TASK, "smoke", tmp_path) == "done"
    assert importances[-1]["paths"] == list(range(15, 21))
    assert (importance_table(scrapl(), tmp_path)["curvature_am"] == np.arange(1, 22)).all()
    assert not checkpoint_folder(config, tmp_path).exists()
    for wrong, got in (([], "none"), (range(19, 40), "21, 22, 23")):
        with pytest.raises(ValueError, match=f"paths must be numbers from 0 to 20, got {got}"):
            compute_importance(TASK, "smoke", tmp_path, paths=wrong)


def test_calls_at_the_same_time_may_share_paths(tmp_path, importances, monkeypatch):
    """A call of paths 0 to 14 begins while one of 10 to 20 is at work: both compute 10 to 14, all are recorded once."""
    said = []

    def other_meanwhile():
        if not said:
            said.append("")
            said.append(compute_importance(TASK, "smoke", tmp_path, paths=range(15)))

    assert compute_importance(TASK, "smoke", tmp_path, paths=range(10, 21), watch=other_meanwhile) == "done"
    assert said[1] == "15 of 21 paths"
    assert [call["paths"] for call in importances] == [list(range(10, 21)), list(range(15))]
    assert (importance_table(scrapl(), tmp_path)["curvature_am"] == np.arange(1, 22)).all()


def test_saved_curvature_that_is_broken_or_of_another_configuration_is_refused(tmp_path, importances):
    compute_importance(TASK, "smoke", tmp_path, paths=range(5))
    file = checkpoint_folder(importance_config(TASK, "smoke"), tmp_path) / "path_3.json"
    good = file.read_text()
    for damaged, message in (
        (good[:-20], "path_3.json is no file of a path's curvature .*: delete it"),
        (good.replace("4.0", "-4.0"), r"path_3.json is no file .*curvature \[-4.0, 5.0\]"),
        (good.replace('hash": "', 'hash": "0'), "path_3.json holds curvature of another configuration"),
    ):
        write_text_atomic(file, damaged)
        with pytest.raises(ValueError, match=message):
            compute_importance(TASK, "smoke", tmp_path)
    file.unlink()
    assert compute_importance(TASK, "smoke", tmp_path) == "done" and importances[-1]["paths"] == [3, *range(5, 21)]


@pytest.mark.parametrize("profile", ["smoke", "quick", "paper"])
def test_every_task_samples_from_whole_batches(profile):
    for task in TASKS:
        config, drums = importance_config(task, profile), task in TR808
        n = config.importance_examples
        n_train = 425 if drums and profile == "paper" else len(config.data().train)  # 681 sounds take a minute
        assert n % config.batch_size == 0 and n <= n_train and config in states([config], "/nowhere")
        assert profile != "paper" or n == (320 if task == "granular" else 16 if drums else 32)
        assert all(c.importance_examples == (n if c.method == "scrapl" else None) for c in grid(task, profile))
