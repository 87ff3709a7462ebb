"""The grid of experiments: the hyperparameters that are printed, what it refuses, methods and tasks of one's own."""

import json
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import mse_loss

from replication import tasks
from replication.published import HYPERPARAMETERS
from replication.tasks import METHODS, NOT_RUN, PROFILES, TASKS, grid, make_config, methods_of, seeds_of
from scrapl_lib.losses import JTFSLoss, SCRAPLLoss, p_loss
from scrapl_lib.optim import PSAGA, PAdam
from scrapl_lib.synths import GranularSynth

OTHERS = ("mss_linear", "mss_log_linear", "mss_revisited", "mss_random", "ms_clap", "panns_wavegram_logmel")
TRAINED_BY = {  # method: loss, optimizer, gradient scale
    "p_loss": ("p_loss", "adamw", 1.0),
    "jtfs": ("jtfs", "adamw", 1e8),
    "scrapl": ("scrapl", "psaga", 1e8),
    "scrapl_no_theta_is": ("scrapl", "psaga", 1e8),
    "scrapl_padam": ("scrapl", "padam", 1e8),
    "scrapl_plain": ("scrapl", "adamw", 1e8),
    **{name: (name, "adamw", 1.0) for name in OTHERS},
}

N_QUICK = TASKS["granular"].sizes["quick"]["seeds"]


@pytest.mark.parametrize("task", ["granular", *tasks.CHIRPLETS, "tr808_meso"])
def test_the_paper_profile_runs_what_is_printed(task):
    """SCRAPL's config and what follows from it: sizes of transform, encoder and run."""
    config, printed = make_config(task, "scrapl", 0, "paper"), dict(HYPERPARAMETERS[TASKS[task].hyperparameters])
    ranges = {name: printed.pop(name) for name in list(printed) if name.split()[0] in ("slow", "moderate", "fast")}
    assert len(ranges) == 5 * (task in tasks.CHIRPLETS)
    if task in tasks.CHIRPLETS:
        _, am, fm = task.split("_")
        printed |= {"am_hz": ranges[f"{am} AM (Hz)"], "fm_oct_per_s": ranges[f"{fm} FM (octaves/s)"]}
    found = json.loads(json.dumps(config.flat | config.derived()))  # tuples as lists
    assert {name: found.get(name) for name in printed} == printed
    assert task != "tr808_meso" or found["n_weights"] == 724_642  # as the authors' code has


def test_methods_differ_in_loss_and_optimizer_alone():
    """JTFS also in its batches, of 6, 5 of them accumulated."""
    assert list(TRAINED_BY) == list(methods_of("granular")) == [m for m in METHODS if m not in tasks.BEYOND]
    own = {"method", "loss", "optimizer", "gradient_scale", "importance_examples"}
    scrapl = make_config("granular", "scrapl", 0, "paper").flat
    for method, trained_by in TRAINED_BY.items():
        config = make_config("granular", method, 0, "paper")
        assert (config.loss, config.optimizer, config.gradient_scale) == trained_by
        differing = {name for name in scrapl if config.flat.get(name) != scrapl[name]}
        assert differing - own == ({"batch_size", "accumulate"} if method == "jtfs" else set())
        assert (config.batch_size, config.accumulate) == ((6, 5) if method == "jtfs" else (32, 1))
    assert config.n_audio_test >= len(config.data().test) > 0  # audio distances over the whole test fold
    assert seeds_of("jtfs", "paper") == [0] and len(seeds_of("jtfs", "paper", "tr808_meso")) == 4
    assert {methods_of(task) for task in tasks.CHIRPLETS} == {("scrapl", "scrapl_no_theta_is")}


def test_transforms_and_synthesizers_are_those_that_a_config_names():
    transform = {"shape": 44100, "J": 12, "Q1": 8, "Q2": 2, "J_fr": 5, "Q_fr": 2, "T": 2048, "F": 1, "log1p": True}
    assert make_config("tr808_meso", "scrapl", 0, "paper").transform() == transform
    config = make_config("chirplet_slow_moderate", "scrapl", 0, "paper")
    synth = config.synth()
    assert [(p.min, p.max) for p in synth.parameters] == [config.am_hz, config.fm_oct_per_s]
    assert (synth.f0_hz, synth.bandwidth_oct, synth.max_shift, synth.n_samples) == (512, 2, 2048, 32768)
    assert not synth.window_gradient


def test_losses_and_optimizers_are_those_that_a_config_names():
    def made(method, **changes):
        config = make_config("granular", method, 3, "smoke", **changes)
        loss = config.make_loss()
        return loss, config.make_optimizer([torch.nn.Parameter(torch.ones(2))], loss)

    loss, adamw = made("jtfs", lr=0.5)
    group = adamw.param_groups[0]
    assert isinstance(loss, JTFSLoss) and isinstance(adamw, torch.optim.AdamW)
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.5, (0.9, 0.999), 1e-8, 0.01)
    for method, kind in (("scrapl", PSAGA), ("scrapl_padam", PAdam), ("scrapl_plain", torch.optim.AdamW)):
        loss, optimizer = made(method)
        assert isinstance(loss, SCRAPLLoss) and type(optimizer) is kind
    draws = [[made("scrapl_plain")[0].draw() for _ in range(9)] for _ in range(2)]
    assert draws[0] == draws[1]  # by the run's seed
    assert made("p_loss")[0] is p_loss and made("mss_random")[0].name == "mss_random"


@pytest.mark.parametrize("profile", PROFILES)
def test_grid_holds_every_method_that_can_be_run(profile):
    found = [(c.method, c.seed) for c in grid("granular", profile)]
    assert found == [(m, s) for m in TRAINED_BY if m not in NOT_RUN for s in seeds_of(m, profile)]
    assert set(TRAINED_BY) - {m for m, _ in found} == {"ms_clap", "panns_wavegram_logmel"} == set(NOT_RUN)
    some = grid("granular", profile, ["jtfs", "p_loss"], [3, 1])
    assert [(c.method, c.seed) for c in some] == [("jtfs", 3), ("jtfs", 1), ("p_loss", 3), ("p_loss", 1)]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"epoch": 3}, ValueError, "unknown config field 'epoch': did you mean 'epochs'"),
        ({"epochs": 2.0}, TypeError, "epochs must be int, got 2.0"),
        ({"epochs": True}, TypeError, "epochs must be int, got True"),
        ({"am_hz": [1.0, 2.0]}, TypeError, r"am_hz must be tuple or NoneType, got \[1.0"),
        ({"loss": "mss_log"}, ValueError, "unknown loss 'mss_log': did you mean 'mss_log_linear'"),
        ({"optimizer": "adam"}, ValueError, "unknown optimizer 'adam': did you mean 'padam'"),
        ({"importance_examples": 6}, ValueError, "must be a multiple of batch_size = 4, got 6"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"max_shift": -1}, ValueError, "max_shift must be at least 0, got -1"),
        ({"accumulate": 2}, ValueError, "accumulate must be 1 with padam"),
    ],
)
def test_config_refuses(changes, error, message):
    """Unknown names and seeds: test_cli."""
    with pytest.raises(error, match=message):
        make_config("granular", "scrapl_padam", 0, "smoke", **changes)


def test_grid_refuses_what_needs_a_theta_that_nobody_knows():
    with pytest.raises(ValueError, match="'p_loss' needs to know theta.*tr808_micro takes jtfs, scrapl, "):
        grid("tr808_micro", "smoke", ["p_loss"])


@pytest.mark.parametrize("method", NOT_RUN)
def test_a_method_that_is_not_run_is_taken_by_name_if_its_model_loads(method, monkeypatch):
    """If it does not: test_cli."""
    assert seeds_of(method, "paper") == []
    loaded = []
    monkeypatch.setattr(tasks, "EmbeddingLoss", lambda *arguments: loaded.append(arguments))
    assert method not in {c.method for c in grid("granular", "quick")} and not loaded
    assert [(c.method, c.seed) for c in grid("granular", "quick", [method])] == [
        (method, seed) for seed in range(N_QUICK)
    ]
    assert [c.seed for c in grid("granular", "quick", [method], [7])] == [7]
    assert not grid("granular", "quick", [method], [])
    assert loaded == [(method, 8192)] * 2


def test_methods_beyond_the_paper_draw_what_they_say():
    """Draws, their probabilities (sums over paths), optimizers, and the one record of probabilities that all share."""
    config = {method: make_config("granular", method, 3, "smoke") for method in ("scrapl", *tasks.BEYOND)}
    paths = config["scrapl"].make_loss()
    p = paths.n_paths
    probs = torch.arange(1.0, p + 1, dtype=torch.float64) / (p * (p + 1) / 2)
    by_rate, drawn = config["scrapl_rate_theta_is"].make_loss(probs), config["scrapl"].make_loss(probs)
    assert by_rate.draws == tuple(paths.jtfs.groups["rate"]) and 1 < by_rate.n_paths < p
    for i, group in enumerate(by_rate.draws):
        assert abs(by_rate.probs[i] - sum(probs[path] for path in group)) < 1e-12
    assert (drawn.probs - probs).abs().max() < 1e-12
    (top,) = config["scrapl_subset"].make_loss(probs).draws
    assert top == tuple(range(p - p // 10, p)) and len(top) >= 1
    four = config["scrapl_k4"].make_loss()
    assert len(four.draws) == p and {len(set(group)) for group in four.draws} == {4}
    assert all(sum(path in group for group in four.draws) == 4 for path in range(p))
    assert four.draws == config["scrapl_k4"].make_loss().draws != replace(config["scrapl_k4"], seed=4).make_loss().draws
    kinds = {"scrapl_rate": "psaga", "scrapl_rate_theta_is": "psaga", "scrapl_rate_plain": "adamw"}
    kinds |= {"scrapl_subset": "adamw", "scrapl_k4": "psaga"}
    assert {method: config[method].optimizer for method in tasks.BEYOND} == kinds
    needed = {method: tasks.needs(c) for method, c in config.items()}
    shared = tasks.importance_config("granular", "smoke")
    assert [m for m, c in needed.items() if c] == ["scrapl", "scrapl_rate_theta_is", "scrapl_subset"]
    assert {c for c in needed.values() if c} == {shared} and tasks.needs(shared) is None
    with pytest.raises(ValueError, match="scrapl_subset takes the paths of largest probability"):
        config["scrapl_subset"].make_loss()
    assert not set(tasks.BEYOND) & {c.method for task in TASKS for c in grid(task, "smoke")}


def test_a_method_of_ones_own_is_one_object(monkeypatch):
    """What docs/adding.md adds; test_tables_figures shows it in tables and figures."""
    mine = tasks.Method("mine", "Mine", ("#123456", "h", "-"), lambda config: mse_loss)
    monkeypatch.setitem(METHODS, "mine", mine)
    assert methods_of("granular")[-1] == "mine" and "mine" not in methods_of("tr808_meso")
    configs = [config for config in grid("granular", "quick") if config.method == "mine"]
    assert [config.seed for config in configs] == seeds_of("mine", "quick") == list(range(N_QUICK))
    assert (configs[0].loss, configs[0].optimizer, configs[0].gradient_scale) == ("mine", "adamw", 1.0)
    assert configs[0].make_loss() is mse_loss


def test_a_task_of_ones_own_is_one_object(monkeypatch):
    granular = TASKS["granular"]
    sizes = {profile: granular.sizes[profile] | {"n_grains": 1} for profile in PROFILES}
    made = {"make_synth": lambda c: GranularSynth(c.sample_rate_hz, 2048, 1, 512, 32), "make_data": granular.make_data}
    mine = tasks.Task("one_grain", "one grain", "granular", "one_grain", [1], "table_10", **made, sizes=sizes)
    monkeypatch.setitem(TASKS, "one_grain", mine)
    config = grid("one_grain", "smoke", ["jtfs"])[0]
    assert config.n_grains == 1 and config.synth().n_samples == 2048 and len(config.data()) == 25


def test_order_of_worth(monkeypatch):
    """One seed of every cell, then the next; cheap before dear; path probabilities, and what they cost, with the first
    run that waits for them. Costs in units of a granular SCRAPL run: tr808 0.045, chirplet 0.25, each times the
    method's. A cell whose run failed has no value to show yet."""
    monkeypatch.delenv("TR808_DIR", raising=False)
    first = """tr808_micro/scrapl/5 chirplet_slow_slow/scrapl_no_theta_is/0 chirplet_slow_slow/scrapl/0
        granular/mss_linear/1 tr808_micro/jtfs/7 granular/scrapl_plain/0 granular/theta_importance/0 granular/scrapl/0
        granular/jtfs/0"""  # 0.045, 0.25, 0.25, 0.3, 11 x 0.045, 1, 1 + 1, 11
    second = "granular/p_loss/1 granular/scrapl_plain/1 granular/scrapl/1"
    expected = [*first.split(), *second.split(), "granular/p_loss/2"]
    states = dict.fromkeys(sorted(expected, reverse=True), "missing")
    states |= {"granular/mss_linear/0": "failed", "granular/p_loss/0": "done", "granular/mss_random/0": "stale"}
    states |= {"chirplet_slow_slow/theta_importance/0": "done"}

    def config(place):
        task, method, seed = place.split("/")
        importance = method == "theta_importance"
        return tasks.importance_config(task, "paper") if importance else make_config(task, method, int(seed), "paper")

    found = tasks.by_worth({config(place): state for place, state in states.items()})
    assert [f"{c.task}/{c.method}/{c.seed}" for c in found] == expected
    assert tasks.by_worth({}) == []
