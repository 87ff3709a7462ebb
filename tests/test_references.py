"""References that are computed once: their bits, the files that hold them, and the runs that take them from there."""

import errno
import multiprocessing
import os
import shutil
import time

import pytest
import torch
from conftest import smoke

from replication import files as kept_files
from replication import references
from replication.references import drawn, kept_references
from replication.status import progress_of
from replication.tasks import make_config
from replication.trainer import Training, train, train_steps
from scrapl_lib.losses import SCRAPLLoss

pytestmark = pytest.mark.usefixtures("one_thread")


def files(output):
    return sorted((output / "cache").glob("references_*.npy"))


@pytest.fixture
def computed(monkeypatch):
    """Lists the numbers of sounds whose paths are computed."""
    calls, true = [], references._all_paths
    monkeypatch.setattr(references, "_all_paths", lambda transform, x: calls.append(len(x)) or true(transform, x))
    return calls


@pytest.fixture
def training(monkeypatch):
    """A run whose 15 training sounds take four files."""
    monkeypatch.setattr(references, "PIECE", 4)
    return Training(smoke())


@pytest.mark.parametrize("profile", ["smoke", "quick"])
def test_they_have_the_bits_of_the_loss(tmp_path, profile):
    """Of single paths, whatever the batch; of groups to 1e-6, as these are computed together."""
    config = make_config("granular", "scrapl_no_theta_is", 0, profile)
    loss, by_rate = (SCRAPLLoss(**config.transform(), draw=draw) for draw in ("path", "rate"))
    data, items = config.data(), torch.tensor([9, 2, 5])
    x = config.synth()(data.theta[:10], data.seed[:10])
    kept = kept_references(loss.jtfs, x, torch.arange(1, 10), tmp_path, lambda share: None)
    assert sorted(kept) == list(range(1, 10))
    for path in range(loss.n_paths):
        S = loss.coefficients(x[items], path)
        assert S.abs().max() > 0 and torch.equal(drawn(kept, items, loss.draws[path]), S)
    for path in range(by_rate.n_paths):
        S, found = by_rate.coefficients(x[items], path), drawn(kept, items, by_rate.draws[path])
        assert len(by_rate.draws[path]) > 1 and found.shape == S.shape and (found - S).norm() < 1e-6 * S.norm()


def test_a_run_is_the_same_with_and_without_them(tmp_path, computed):
    """Without, with new ones, with those of another run: the same bits, the same draws."""
    found = []
    for kept in (False, True, True):
        run = Training(smoke(dropout=0.5))
        if kept:
            run.keep_references(tmp_path)
            assert sorted(run.kept) == run.data.train.tolist()
        paths = [run.loss.path_idx for _ in run.steps()]
        found.append((paths, [row[:4] for row in run.history], run.weights()))
    paths, history, weights = found[0]
    assert sum(computed) == 15 and len(paths) == 9 and len(set(paths)) > 1
    for again in found[1:]:
        assert again[:2] == (paths, history) and all(torch.equal(again[2][name], weights[name]) for name in weights)


def test_a_run_that_is_recorded_keeps_them_and_tells_how_many_there_are(tmp_path, computed, capsys):
    """Drums, and losses that draw nothing, have none."""
    train(smoke(), tmp_path)
    (path,), said = files(tmp_path), capsys.readouterr().err
    assert computed == [15] and "all paths of the references, " in said and "once for all runs" in said
    for config in (smoke("p_loss"), make_config("tr808_micro", "scrapl_no_theta_is", 0, "smoke", epochs=1)):
        train(config, tmp_path)
    other = smoke("scrapl_plain", 1)
    run = next(train_steps(other, tmp_path))
    assert sorted(run.kept) == run.data.train.tolist() and files(tmp_path) == [path] and computed == [15]
    assert progress_of(other, tmp_path) == (0.0, "")
    path.unlink()
    next(train_steps(other, tmp_path))
    assert progress_of(other, tmp_path) == (0.0, "scrapl_plain 1: references 100%")


def test_broken_files_are_made_again_and_the_others_are_not(tmp_path, training, computed, capsys, monkeypatch):
    """A bit flipped in the middle, in the hash at the end, truncated, empty; what a killed writer left goes."""
    monkeypatch.setattr(references, "PIECE", 3)
    training.keep_references(tmp_path)
    expected, paths = {item: S.clone() for item, S in training.kept.items()}, sorted(tmp_path.glob("*.npy"))
    written = [path.read_bytes() for path in paths]
    assert len(paths) == 5 and sum(computed) == 15
    flipped = [bytearray(content) for content in written[:2]]
    flipped[0][len(flipped[0]) // 2] ^= 1
    flipped[1][-1] ^= 1
    for path, content in zip(paths[:4], (*flipped, written[2][:-100], b""), strict=True):
        path.unlink()
        path.write_bytes(content)
    leftover = paths[0].with_name(f".{paths[0].name}.0123.tmp")
    leftover.write_bytes(b"killed while writing")
    computed.clear()
    capsys.readouterr()
    training.keep_references(tmp_path)
    assert len(computed) == 4 and [path.read_bytes() for path in paths] == written and not leftover.exists()
    said = capsys.readouterr().err
    assert all(f"{path} is not what was written there" in said for path in paths[:4]) and str(paths[4]) not in said
    assert all(torch.equal(S, expected[item]) for item, S in training.kept.items())


@pytest.mark.parametrize("change", ["sounds", "transform", "code", "threads"])
def test_what_decides_their_bits_names_the_files(tmp_path, training, change, monkeypatch):
    training.keep_references(tmp_path)
    if change == "sounds":
        training.x[training.data.train[0]] *= 2
    elif change == "transform":
        training.loss = SCRAPLLoss(**training.config.transform() | {"Q_fr": 2})
    elif change == "code":
        monkeypatch.setattr(references.inspect, "getsource", lambda module: "other")
    else:
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    training.keep_references(tmp_path)
    assert len(list(tmp_path.glob("*.npy"))) == (5 if change == "sounds" else 8)


def test_without_room_they_are_computed_in_every_step(tmp_path, training, computed, capsys, monkeypatch):
    """A tenth of what is free is not enough; or the disk is full all the same."""
    disk = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(references.shutil, "disk_usage", lambda path: disk._replace(free=1000))
    training.keep_references(tmp_path)
    assert training.kept == {} and not computed and not list(tmp_path.glob("*.npy"))
    assert "not made, as that is over 10% of what is free there" in capsys.readouterr().err
    monkeypatch.undo()

    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(kept_files, "write_bytes_atomic", full)
    training.keep_references(tmp_path)
    assert sorted(training.kept) == training.data.train.tolist()
    assert "cannot be written and is not kept: [Errno 28] No space left" in capsys.readouterr().err


def test_two_processes_at_once_compute_each_file_once(tmp_path, training, monkeypatch):
    fork, true = multiprocessing.get_context("fork"), references._all_paths
    begin, made = fork.Barrier(2), fork.SimpleQueue()

    def slow(transform, x):
        made.put(os.getpid())
        time.sleep(0.3)
        return true(transform, x)

    def keep():
        begin.wait(60)
        training.keep_references(tmp_path)

    monkeypatch.setattr(references, "_all_paths", slow)
    monkeypatch.setattr(references, "PIECE", 2)
    processes = [fork.Process(target=keep) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0, 0] and len(list(tmp_path.glob("*.npy"))) == 8
    pids = [made.get() for _ in range(8)]
    assert made.empty() and set(pids) == {process.pid for process in processes}  # they shared the work
    training.keep_references(tmp_path)
    assert made.empty() and sorted(training.kept) == training.data.train.tolist()
