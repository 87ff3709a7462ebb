"""One run: what it computes, that a stopped one ends as if it had not been, and everything that may be wrong on
disk."""

import functools
import hashlib
import math
import os
import re
import time
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import synthetic_records as synthetic
import torch
from conftest import folder_of, smoke

from replication import problem
from replication.checkpoints import checkpoint_folder, save_checkpoint
from replication.data import meso_seeds
from replication.evaluate import evaluate
from replication.jobs import Budget, Pool, ensure_runs
from replication.problem import default_workers, make_deterministic
from replication.records import BrokenRecord, config_hash, read_run
from replication.status import kept_of, states
from replication.tasks import METHODS, NOT_RUN, make_config
from replication.trainer import LOOK_EVERY, RunFailed, Training, fit, train, train_steps

RUNNABLE = [method for method in METHODS if method not in NOT_RUN]
EPOCH, LAST = 3, 9  # steps of an epoch and of a run in the smoke profile
PARAMETER_ERRORS = ["theta_synth_l1", "theta_density_l1", "theta_slope_l1"]

pytestmark = pytest.mark.usefixtures("one_thread")


def state_of(config, output):
    return states([config], output)[config]


def digest(weights):
    assert len(weights) > 10
    return hashlib.sha256(b"".join(w.numpy().tobytes() for w in weights.values())).hexdigest()


def run_with_stops(config, output, stops=()):
    """Train, left at each of the steps and resumed in a new Training, checkpoints after every step.

    Returns what the record does not round or hold (exact history without wall_s, hash of the best weights), with the
    bytes of test.csv; and the steps taken, one by one."""
    stops, steps, finished = list(stops), [], False
    while not finished:
        finished = True
        for run in train_steps(config, output, checkpoint_every_s=0):
            steps.append(run.step)
            if run.step in stops:
                stops.remove(run.step)
                finished = False
                break
    tested = (folder_of(config, output) / "test.csv").read_bytes()
    return ([row[:4] for row in run.history], digest(run.best_weights), tested), steps


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    @functools.cache
    def result(config):
        found, steps = run_with_stops(config, tmp_path_factory.mktemp("uninterrupted"))
        history, _, tested = found
        assert steps == [*range(1, LAST + 1)] and len(history) == 4 * 4 + 3 and len(tested.splitlines()) > 5
        return found

    return result


@pytest.mark.parametrize("method", ["mss_random", "scrapl_plain", "scrapl_padam", "scrapl_no_theta_is"])
def test_a_stopped_run_ends_as_if_it_had_not_been(tmp_path, uninterrupted, method, capsys):
    """Stopped before any checkpoint, mid-epoch, right after a validation, after its checkpoint, at the end."""
    config, stops = smoke(method, dropout=0.5), [1, 2, EPOCH, EPOCH + 1, LAST - 1, LAST]
    found, steps = run_with_stops(config, tmp_path, stops)
    assert found == uninterrupted(config)
    assert steps == sorted([*range(1, LAST + 1), *stops])  # each took up where its last checkpoint was
    assert capsys.readouterr().err.count("resumed from step") == len(stops) - 1
    run = read_run(folder_of(config, tmp_path))
    assert run.history["wall_s"].is_monotonic_increasing and run.info["train_step_ms"]["n"] == LAST - 1
    assert not checkpoint_folder(config, tmp_path).exists()


def test_a_run_asked_to_stop_writes_a_checkpoint_as_soon_as_its_steps_are_looked_at(tmp_path, uninterrupted):
    """Steps are looked at as seldom as on CUDA: 1, 2 and 3, an epoch's end, are timed, 4 is not, 5 is because of the
    stop."""
    config, steps = smoke(dropout=0.5), []
    for run in train_steps(config, tmp_path):
        run.look_every = LOOK_EVERY["cuda"]
        run.stopping = run.step == 4 or run.stopping
        steps.append(run.step)
    assert steps == [1, 2, 3, 4, 5] and kept_of(config, tmp_path) == "step 5"
    assert state_of(config, tmp_path) == "missing"
    assert run_with_stops(config, tmp_path) == (uninterrupted(config), [6, 7, 8, 9])
    assert read_run(folder_of(config, tmp_path)).info["train_step_ms"]["n"] == LAST - 1


def test_jtfs_references_are_transformed_once_and_rightly():
    """Loss and gradient of a step against those from the references' audio, to 1e-5."""
    run = Training(smoke("jtfs"))
    items, seeds = run.data.train[:3], torch.arange(3)
    loss = run.batch_loss(items, seeds)
    expected = run.loss(run.synth(run.encoder(run.features[items]), seeds), run.x[items])
    assert expected > 0 and abs(float((loss / expected).detach()) - 1) < 1e-5
    for found, grad in zip(*(torch.autograd.grad(x, [*run.encoder.parameters()]) for x in (loss, expected))):
        assert grad.norm() > 0 and (found - grad).norm() <= 1e-5 * grad.norm()
    assert run.S[run.data.val].isfinite().all() and run.S[run.data.test].isnan().all()


@pytest.mark.parametrize(
    "task, method", [("tr808_micro", "jtfs"), ("tr808_micro", "mss_random"), ("tr808_meso", "scrapl_no_theta_is")]
)
def test_drums_are_trained_without_their_parameters(tmp_path, task, method):
    """A stopped run ends as if it had not been; what is tested is not shifted."""
    config = make_config(task, method, 0, "smoke", epochs=2)
    assert run_with_stops(config, tmp_path / "whole")[0] == run_with_stops(config, tmp_path, [2, 4])[0]
    run, data = read_run(folder_of(config, tmp_path)), config.data()
    features = ("loudness", "spectral_centroid", "spectral_flatness")
    names = [f"{part}_{feature}_l1" for part in ("transient", "decay") for feature in features]
    assert list(run.test["metric"]) == ["jtfs_distance", "mss_log_linear_distance", *names, "frechet_log_mel"]
    assert np.isfinite(run.test["value"]).all() and (run.test["value"] > 0).all()
    assert set(run.history["metric"]) == {"loss"} and len(run.history) == 2 + 3  # of training, and of validation
    heard, kinds = run.info["heard"], {data.kinds[item] for item in data.test.tolist()}
    assert {data.kinds[data.names.index(name)] for name in heard} == kinds and len(heard) == len(kinds)
    assert all(len(theta) == 14 and min(theta) > 0 and max(theta) < 1 for theta in heard.values())
    fresh, tested = Training(config), []
    render = fresh.synth.render
    fresh.synth.render = lambda theta, shift: tested.append(shift) or render(theta, shift)
    assert list(evaluate(fresh, [])[1]["heard"]) == list(heard)
    assert sum(map(len, tested)) == len(data.test) > 1 and not any(shift.any() for shift in tested)
    shifts = fresh.synth.draw(meso_seeds(0, 1, 50))[0]
    assert (shifts.unique().numel() > 20) == (task == "tr808_meso") and not fresh.x[..., : config.common_delay].any()


def test_the_learning_rate_falls_in_a_line():
    run = Training(make_config("tr808_micro", "mss_linear", 0, "smoke", lr=1e-3, lr_end=1e-4, epochs=2))
    rates = [run.optimizer.param_groups[0]["lr"] for _ in run.steps()]
    assert len(rates) > 4 and np.allclose(rates, np.linspace(1e-3, 1e-4, len(rates)), rtol=1e-12, atol=0)


@pytest.mark.parametrize("method", ["mss_random", "scrapl_no_theta_is"])
def test_on_a_cpu_the_deterministic_bits_are_the_usual_ones(tmp_path, uninterrupted, method, monkeypatch):
    """The run's identity does not know of the flag, its record does."""
    config, cudnn, matmul = smoke(method, dropout=0.5), torch.backends.cudnn, torch.backends.cuda.matmul
    usual = uninterrupted(config)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    before = cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32
    cudnn.benchmark = cudnn.allow_tf32 = matmul.allow_tf32 = True
    try:
        make_deterministic("cpu")
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8" and torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert not (cudnn.benchmark or cudnn.allow_tf32 or matmul.allow_tf32)
        assert run_with_stops(config, tmp_path)[0] == usual
    finally:
        torch.use_deterministic_algorithms(False)
        cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = before
    info = read_run(folder_of(config, tmp_path)).info
    assert info["deterministic"] is True and info["config_hash"] == config_hash(config.flat)


@pytest.mark.cuda
@pytest.mark.parametrize("method", ["p_loss", "mss_linear", "scrapl_no_theta_is"])
def test_cuda_and_cpu_agree(tmp_path, method):
    """A smoke run without dropout, in full float32 on both: the first validation to 1e-3 of its value, which no step
    has touched; errors of theta after 9 steps to 5 permille. (Tolerances not yet seen on a GPU.)"""
    runs = []
    for device in ("cpu", "cuda"):
        pool = Pool(tmp_path / device, device, deterministic=True)
        runs += ensure_runs(["granular"], [method], [0], "smoke", tmp_path / device, pool=pool)
    assert runs[1].info["device"] == "cuda" and len(runs[0].history) == len(runs[1].history) == 19
    first = [run.history.query("step == 0")["value"].to_numpy() for run in runs]
    assert len(first[0]) == 4 and np.abs(first[1] / first[0] - 1).max() < 1e-3
    errors = [run.test.query("metric in @PARAMETER_ERRORS")["value"].to_numpy() for run in runs]
    assert len(errors[0]) == 3 and np.abs(errors[1] - errors[0]).max() < 5


@pytest.mark.parametrize("memory_gib, cores, workers", [(4, 16, 1), (24, 16, 3), (139, 16, 4), (139, 2, 2)])
def test_how_many_runs_share_a_gpu(monkeypatch, memory_gib, cores, workers):
    gpu = SimpleNamespace(total_memory=memory_gib * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(problem, "n_cores", lambda: cores)
    assert default_workers("cuda:1") == workers and default_workers("cpu") == cores


def one_byte_flipped(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def of_another_configuration(path):
    other = Training(smoke(lr=2e-3))
    other.step = int(path.stem.removeprefix("step_"))
    save_checkpoint(other, path.parent)


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "empty": lambda path: path.write_bytes(b""),
    "one byte flipped": one_byte_flipped,
    "without its hash": lambda path: path.with_suffix(".sha256").unlink(),
    "of another configuration": of_another_configuration,
}


@pytest.mark.parametrize("damage, n_damaged", [(damage, 1 + n % 2) for n, damage in enumerate(DAMAGE)])
def test_a_damaged_checkpoint_is_said_and_not_used(tmp_path, uninterrupted, damage, n_damaged, capsys):
    """The newer one of those of steps 4 and 5, or both; and what a writer left that was killed goes."""
    folder = checkpoint_folder(smoke(), tmp_path)
    for run in train_steps(smoke(), tmp_path, checkpoint_every_s=0):
        if run.step == 6:
            break
    names = [f"step_0000000{step}.{kind}" for step in (4, 5) for kind in ("pt", "sha256")]
    assert sorted(path.name for path in folder.glob("step_*")) == names
    (folder / ".step_00000006.pt.0123.tmp").write_bytes(b"killed while writing")
    damaged = sorted(folder.glob("*.pt"))[-n_damaged:]
    for path in damaged:
        DAMAGE[damage](path)
    capsys.readouterr()
    resumed = next(train_steps(smoke(), tmp_path)).step
    assert resumed == (5 if n_damaged == 1 else 1) and not list(folder.glob(".*"))
    said = capsys.readouterr().err
    assert all(f"checkpoint {path} is not used: " in said for path in damaged)
    assert said.count("is not used") == n_damaged and said.count("resumed from step 4") == 2 - n_damaged
    found, steps = run_with_stops(smoke(), tmp_path, [resumed + 2])
    assert found == uninterrupted(smoke())
    assert steps == [*range(resumed, resumed + 3), *range(resumed + 2, LAST + 1)]  # new ones outlive those refused


def infinite_slope(loss, run):
    w = next(run.encoder.parameters())
    return loss + (w - w.detach()).sum().sqrt()  # + 0, with an infinite gradient


def out_of_memory(*_):
    raise torch.OutOfMemoryError("no room\nfor 2 GiB")


@pytest.mark.parametrize(
    "change, why",
    [
        (lambda loss, run: loss * math.nan, "nonfinite at step 5, path {}: loss nan, largest gradient nan"),
        (infinite_slope, r"nonfinite at step 5, path {}: loss 0\.\d+, largest gradient inf"),
        (out_of_memory, "out of memory: no room"),
        (Mock(side_effect=MemoryError), "out of memory: MemoryError"),
    ],
)
def test_a_run_that_cannot_go_on_fails_for_good_and_the_next_goes_on(tmp_path, monkeypatch, computed_here, change, why):
    """What is wrong takes the place of the training loss of seed 0 at step 5."""
    true, drawn, method = Training.batch_loss, [], smoke().method

    def batch_loss(self, *args, **options):
        loss = true(self, *args, **options)
        if (self.config.seed, self.step) != (0, 5) or not self.encoder.training:
            return loss
        drawn.append(self.loss.path_idx)
        return change(loss, self)

    monkeypatch.setattr(Training, "batch_loss", batch_loss)
    for _ in range(2):
        run, other = ensure_runs(["granular"], [method], [0, 1], "smoke", tmp_path)
        assert re.fullmatch(f"failed:{why}".format(*drawn), run.status) and other.ok
        assert set(run.history["step"]) == {0, EPOCH} and np.isfinite(run.history["value"]).all() and run.test.empty
    assert train(smoke(), tmp_path).status == run.status and state_of(smoke(), tmp_path) == "failed"
    assert computed_here == [(method, 0), (method, 1)] and len(drawn) == 1  # tried once
    assert not checkpoint_folder(smoke(), tmp_path).exists()


def test_where_only_some_steps_are_looked_at_the_failure_names_them_all():
    run = Training(smoke())
    run.step, run.loss.path_idx = 40, 7
    with pytest.raises(RunFailed, match="nonfinite at one of steps 21 to 40: loss inf"):
        run.check_finite(torch.tensor(math.inf), 20)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_asked_for_without_cuda_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(Pool, "run", lambda *_: pytest.fail("started"))
    for ask in (
        lambda: ensure_runs(["granular"], ["p_loss"], [0], "smoke", tmp_path, device="cuda"),
        lambda: ensure_runs(["granular"], ["p_loss"], [0], "paper", tmp_path),  # whose default is cuda
        lambda: train(smoke("p_loss"), tmp_path, device="cuda"),
    ):
        with pytest.raises(ValueError, match="device 'cuda' asked for, but this PyTorch sees 0 CUDA devices"):
            ask()
    assert not list(tmp_path.iterdir())


def test_only_what_is_missing_is_computed_once_and_deleting_a_folder_asks_again(tmp_path, computed_here):
    def ask(*seeds):
        del computed_here[:]
        runs = ensure_runs(["granular", "granular"], ["p_loss", "p_loss"], seeds, "smoke", tmp_path)
        assert [run.seed for run in runs] == sorted({*seeds}) and all(run.ok for run in runs)
        return [seed for _, seed in computed_here]

    assert ask(0) == [0] and ask(1, 0, 1) == [1] and ask(0, 1) == []
    for path in folder_of(smoke("p_loss"), tmp_path).iterdir():
        path.unlink()
    assert ask(0, 1) == [0]


def test_the_dearest_run_comes_first_but_with_a_budget_the_most_worthwhile(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(Pool, "run", lambda self, missing, budget: asked.append([(c.method, c.seed) for c in missing]))
    train(smoke("p_loss"), tmp_path)
    for budget in (None, Budget(math.inf, 10.0)):
        ensure_runs(["granular"], ["p_loss", "mss_linear"], [1, 0], "smoke", tmp_path, budget=budget)
    mss = [("mss_linear", 0), ("mss_linear", 1)]
    assert asked == [[*mss, ("p_loss", 1)], [mss[0], ("p_loss", 1), mss[1]]]


def test_a_stale_or_broken_record_is_said_not_used_and_not_deleted(tmp_path, computed_here, capsys):
    old, config = train(smoke("p_loss", lr=2e-3), tmp_path), smoke("p_loss")
    folder = folder_of(config, tmp_path)
    ask_for_it = functools.partial(ensure_runs, ["granular"], ["p_loss"], [0], "smoke", tmp_path)
    assert state_of(config, tmp_path) == "stale" and ask_for_it() == [] and computed_here == []
    assert f"stale, not used: {folder} was made with another configuration; delete it" in capsys.readouterr().err
    with pytest.raises(ValueError, match="holds a record of another configuration: delete that folder"):
        train(config, tmp_path)
    assert read_run(folder).info == old.info
    history = folder / "history.csv"
    history.write_text("\n".join(history.read_text().splitlines()[:-1]) + "\n")
    for ask in (ask_for_it, lambda: train(config, tmp_path)):
        with pytest.raises(BrokenRecord, match="history.csv: expected 19 rows .* found 18 rows"):
            ask()
    assert computed_here == []


def test_of_two_processes_on_one_run_one_computes_and_the_other_waits(tmp_path):
    """The second, a worker, starts from another folder and is told of a relative one."""
    config, pool = smoke("p_loss"), Pool(os.path.relpath(tmp_path), "cpu")
    for run in train_steps(config, tmp_path):
        if run.step == 2:
            other = pool.start(config)
            while "another process computes" not in other.words():
                assert other.status() is None
                time.sleep(0.05)
    record = folder_of(config, tmp_path) / "run.json"
    before = record.read_bytes()
    while other.status() is None:
        time.sleep(0.05)
    assert other.status() == 0 and "waiting for it" in other.words()
    assert record.read_bytes() == before and len(list(tmp_path.glob("results/**/run.json"))) == 1
    assert not checkpoint_folder(config, tmp_path).exists()


@pytest.mark.parametrize("method", RUNNABLE)
def test_a_record_has_every_row_and_its_summaries_follow_from_the_history(tmp_path, method):
    synthetic.write_importance(tmp_path)
    run = train(smoke(method), tmp_path)
    expected = {(step, "val", metric) for step in range(0, LAST + 1, EPOCH) for metric in [*PARAMETER_ERRORS, "loss"]}
    expected |= {(step, "train", "loss") for step in range(EPOCH, LAST + 1, EPOCH)}
    assert len(run.history) == len(expected)
    assert set(zip(run.history["step"], run.history["split"], run.history["metric"])) == expected
    assert np.isfinite(run.history[["value", "wall_s"]]).all(axis=None) and (run.history["value"] > 0).all()
    assert run.history["wall_s"].is_monotonic_increasing and run.history["wall_s"][0] == 0
    val = run.history.query("split == 'val'").pivot(index="step", columns="metric", values="value")
    assert (val["theta_synth_l1"] - (val["theta_density_l1"] + val["theta_slope_l1"]) / 2).abs().max() < 1e-5
    variation = val["theta_synth_l1"].iloc[1:].diff().abs().sum() / 3  # from epoch to epoch, over the number of epochs
    assert abs(run.value("val_total_variation") - variation) < 1e-5
    units = dict.fromkeys([*PARAMETER_ERRORS, "val_total_variation"], "permille")
    units |= {"jtfs_distance": "1", "mss_log_linear_distance": "1"}
    steps = dict(zip(run.test["metric"], run.test["unit"])).items() - units.items()  # convergence, tested below
    assert {unit for _, unit in steps} <= {"steps"} and len(run.test) == len(units) + len(steps)
    assert (run.test.loc[run.test["unit"] != "steps", "value"] > 0).all() and run.ok
    timing = run.info["train_step_ms"]
    assert timing["n"] == LAST - 1 and 0 < timing["q25"] <= timing["median"] <= timing["q75"]
    assert run.info["config_hash"] == config_hash(smoke(method).flat) and run.info["device"] == "cpu"
    assert run.info["threads"] == 1 and run.info["peak_memory_mb"] > 50


def test_convergence_steps_are_each_parameters_own():
    run = Training(make_config("chirplet_slow_slow", "scrapl_no_theta_is", 0, "smoke"))
    curves = {"theta_synth_l1": [200, 150, 99, 90], "theta_am_l1": [300, 200, 100, 80]}
    curves["theta_fm_l1"] = [100, 100.1, 98, 100]
    history = [(10 * i, "val", m, v, 0.0) for m, values in curves.items() for i, v in enumerate(values)]
    found = evaluate(run, history + [(5, "train", m, 1.0, 0.0) for m in curves])[0].set_index("metric")["value"]
    steps = {"val_convergence_steps": 20, "theta_am_convergence_steps": 20, "theta_fm_convergence_steps": 0}
    assert {name: found[name] for name in steps} == steps and abs(found["val_total_variation"] - (51 + 9) / 3) < 1e-9
    assert {"theta_synth_l1", "theta_am_l1", "theta_fm_l1"} < set(found.index)
    never = [(10 * i, "val", m, 101.0, 0.0) for m in curves for i in range(3)]
    assert not [name for name in evaluate(run, never)[0]["metric"] if "convergence" in name]


def listen(method, seed=0):
    """A finished run: its Training, items and synthesizer seeds of each training batch, all seeds it rendered with."""
    run = Training(smoke(method, seed))
    synth, true, batches, rendered = run.synth, run.batch_loss, [], []

    def batch_loss(items, seeds, **options):
        batches.extend([(items.tolist(), seeds.tolist())] * run.encoder.training)
        return true(items, seeds, **options)

    def render(theta, seeds):
        rendered.append(seeds.tolist())
        return synth(theta, seeds)

    render.parameters = synth.parameters
    run.synth, run.batch_loss = render, batch_loss
    assert len(list(run.steps())) == LAST
    evaluate(run, run.history)
    return run, batches, rendered


def test_methods_share_weights_and_data_order_and_reconstructions_never_have_the_seeds_of_the_data():
    """Initial weights show in the errors of the first validation."""
    heard = [listen(method) for method in ("p_loss", "jtfs", "mss_random", "scrapl_padam")]
    batches, other_seed = heard[0][1], listen("p_loss", seed=1)
    assert len(batches) == LAST and all(theirs == batches for _, theirs, _ in heard)
    assert all(theirs != ours for theirs, ours in zip(other_seed[1], batches))
    errors = [
        tuple(value for step, _, metric, value, _ in run.history if step == 0 and metric != "loss")
        for run, *_ in [*heard, other_seed]
    ]
    assert len(errors[0]) == 3 and len({*errors[:-1]}) == 1 and errors[-1] != errors[0]
    epochs = [sum((items for items, _ in batches[start : start + EPOCH]), []) for start in range(0, LAST, EPOCH)]
    assert len({tuple(epoch) for epoch in epochs}) == 3 and all(len(set(epoch)) == 12 for epoch in epochs)

    run, _, rendered = heard[-1]
    train_seeds = {seed for _, seeds in batches for seed in seeds}
    assert len(train_seeds) == LAST * 4
    *val, test = [part for part in rendered if train_seeds.isdisjoint(part)]
    assert len(val) == 4 * 2 and val[:2] * 4 == val and len(test) == 4  # every validation has the same
    assert set(sum(rendered, [])).isdisjoint(run.data.seed.tolist())


@pytest.mark.parametrize("task, method", [("granular", "mss_random"), ("tr808_meso", "scrapl_no_theta_is")])
def test_validation_leaves_the_training_as_it_is_and_drops_nothing_out(monkeypatch, task, method):
    def outcome():
        run, paths = Training(make_config(task, method, 0, "smoke", dropout=0.5)), []
        run.loss.register_forward_hook(
            lambda loss, *_: paths.append(getattr(loss, "path_idx", 0)) if run.encoder.training else None
        )
        assert len(list(run.steps())) == len(paths) > 5
        _, keys, position, *_ = np.random.get_state()
        return paths, digest(run.weights()), torch.get_rng_state().tolist(), keys.tolist(), position

    found = outcome()
    monkeypatch.setattr(Training, "validate", lambda self: None)
    assert found == outcome() and (len(set(found[0])) > 3) == (method != "mss_random")


def test_the_validation_loss_of_scrapl_is_that_of_one_path_per_batch():
    """Paths drawn by the run's seed from the sampling probabilities, the references' transforms kept from one
    validation to the next."""
    run = Training(smoke("scrapl_no_theta_is", seed=3))

    def found():
        run.validate()
        return run.history[-1][3]

    first, generator = found(), torch.Generator().manual_seed(3)
    paths = torch.multinomial(run.loss.probs, 2, replacement=True, generator=generator).tolist()
    batches, total = run.data.batches("val", 4), 0.0
    assert len(batches) == 2
    with torch.no_grad():
        for number, (items, path) in enumerate(zip(batches, paths)):
            x_hat = run.synth(run.estimate(items), meso_seeds(3, number, len(items), "val"))
            total += float(run.loss(x_hat, run.x[items], path_idx=path)) * len(items)
    assert first > 0 and abs(first - total / len(run.data.val)) < 1e-9 * first and found() == first
    run.x[run.data.val] = 0
    assert found() == first


def test_the_weights_of_the_lowest_validation_loss_are_tested(tmp_path):
    config, seen = smoke("p_loss", seed=2, grid_size=6, lr=0.05, epochs=6), {}
    for run in train_steps(config, tmp_path):
        seen[run.step] = run.weights()
    losses = {step: value for step, split, metric, value, _ in run.history if (split, metric) == ("val", "loss")}
    best = min(losses, key=losses.get)
    assert len(losses) == 7 and 0 < best < run.n_steps  # not simply the last
    run.encoder.load_state_dict(seen[best])
    with torch.no_grad():
        error = (run.encoder.eval()(run.features[run.data.test]) - run.data.theta[run.data.test]).abs().mean(0) * 1000
    tested = read_run(folder_of(config, tmp_path)).test.set_index("metric")["value"]
    assert len(error) == 2 and abs(tested[PARAMETER_ERRORS[1:]].to_numpy() - error.numpy()).max() < 1e-3


def test_train_loss_is_the_mean_since_the_last_validation():
    run, losses = Training(smoke("scrapl_plain")), []
    run.loss.register_forward_hook(lambda *call: losses.append(float(call[-1])) if run.encoder.training else None)
    assert len(list(run.steps())) == len(losses) == LAST
    logged = [value for _, split, metric, value, _ in run.history if (split, metric) == ("train", "loss")]
    means = [sum(losses[start : start + EPOCH]) / EPOCH for start in range(0, LAST, EPOCH)]
    assert len(logged) == 3 and max(abs(a - b) / b for a, b in zip(logged, means)) < 1e-6  # float32; true, not scaled


def test_the_gradient_is_scaled_for_scattering_methods():
    def gradient(scale):
        run = Training(smoke("scrapl_plain", gradient_scale=scale))
        next(run.steps())
        return torch.cat([w.grad.flatten() for w in run.encoder.parameters()]).double()

    true, scaled = gradient(1.0), gradient(smoke("scrapl_plain").gradient_scale)
    assert 0 < true.abs().max() < 1e-3
    assert (scaled / 1e8 - true).abs().max() < 1e-5 * true.abs().max()  # float32


def test_accumulated_parts_make_the_step_of_the_whole_batch():
    def weights(**changes):
        run = fit(smoke("mss_linear", epochs=1, **changes))
        assert "val_total_variation" not in set(evaluate(run, run.history)[0]["metric"])  # it takes two epochs
        return run.n_steps, torch.cat([w.flatten() for w in run.encoder.parameters()]).detach()

    (n, whole), (n_parts, parts) = weights(batch_size=4), weights(batch_size=2, accumulate=2)
    assert n == n_parts == EPOCH
    assert (whole - parts).abs().max() < 1e-5  # three steps of 1e-3; float32 sums in another order
