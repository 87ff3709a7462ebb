"""The grid of experiments: the paper's hyperparameters as literals, what it refuses, methods and tasks of one's own."""

import sys
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import mse_loss

from replication import tasks
from replication.tasks import METHODS, NOT_RUN, PROFILES, TASKS, grid, make_config, methods_of, seeds_of
from scrapl_lib.losses import JTFSLoss, SCRAPLLoss, p_loss
from scrapl_lib.optim import PSAGA, PAdam
from scrapl_lib.synths import GranularSynth

PAPER = {  # paper, Table 10: the granular task
    **{"sample_rate_hz": 8192, "n_samples": 32768, "n_grains": 64, "grain_samples": 4096, "slope_hop": 256},
    **{"grid_size": 32, "n_synth_seeds": 5, "J": 12, "Q1": 8, "Q2": 2, "J_fr": 3, "Q_fr": 2, "weight_decay": 0.01},
    **{"cqt_octaves": 5, "cqt_hop": 256, "channels": 128, "pools": ((2, 2),) * 5, "dense": 64, "dropout": 0.5},
    **{"epochs": 200, "batch_size": 32, "accumulate": 1, "lr": 1e-5, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8},
}
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


@pytest.mark.parametrize("method", TRAINED_BY)
def test_paper_profile_has_the_hyperparameters_of_the_paper(method):
    assert list(TRAINED_BY) == list(methods_of("granular")) == [m for m in METHODS if m not in tasks.BEYOND]
    config = make_config("granular", method, 0, "paper")
    expected = PAPER | ({"batch_size": 6, "accumulate": 5} if method == "jtfs" else {})
    assert {name: config.flat[name] for name in PAPER} == expected
    assert (config.loss, config.optimizer, config.gradient_scale) == TRAINED_BY[method]
    assert config.transform() == {"shape": 32768, "J": 12, "Q1": 8, "Q2": 2, "J_fr": 3, "Q_fr": 2}


def test_paper_profile_has_the_sizes_of_the_paper():
    config = make_config("granular", "scrapl_no_theta_is", 0, "paper")
    encoder, data = config.encoder(), config.data()
    assert sum(w.numel() for w in encoder.parameters()) == 604_106 and len(list(encoder.parameters())) == 28
    assert len(data) == 5120 and config.n_audio_test >= len(data.test)  # audio distances over the whole test fold
    assert config.epochs * len(data.batches("train", config.batch_size)) == 19_200
    jtfs = make_config("granular", "jtfs", 0, "paper")
    assert all(len(batch) == 30 for batch in data.batches("train", jtfs.batch_size * jtfs.accumulate))
    assert seeds_of("p_loss", "paper") == list(range(20)) and seeds_of("jtfs", "paper") == [0]
    assert len(seeds_of("jtfs", "paper", "tr808_meso")) == 4 and len(seeds_of("scrapl", "paper", "tr808_micro")) == 40


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


@pytest.mark.parametrize(
    ("task", "am_hz", "fm_oct_per_s"),  # as run
    [
        ("chirplet_slow_slow", (0.9899, 1.9799), (0.5, 1.0)),
        ("chirplet_slow_moderate", (0.9899, 1.9799), (2.0, 4.0)),
        ("chirplet_fast_moderate", (3.9598, 7.9196), (2.0, 4.0)),
        ("chirplet_fast_fast", (3.9598, 7.9196), (8.0, 16.0)),
    ],
)
def test_chirplets_of_the_paper_and_of_the_quick_profile(task, am_hz, fm_oct_per_s):
    """Quick: a lower sample rate; rates and seconds stay, wavelets at the chirp's frequency are as long."""
    methods = ("scrapl", "scrapl_no_theta_is")
    assert task in tasks.CHIRPLETS and len(tasks.CHIRPLETS) == 4 and methods_of(task) == methods
    unused = ("n_grains", "grain_samples", "slope_hop")
    expected = PAPER | {"f0_hz": 512.0, "bandwidth_oct": 2.0, "max_shift": 2048, "epochs": 50, "lr": 1e-4}
    expected |= {"am_hz": am_hz, "fm_oct_per_s": fm_oct_per_s} | dict.fromkeys(unused)
    for method in methods:
        config, quick = (make_config(task, method, 0, profile) for profile in ("paper", "quick"))
        assert {name: config.flat.get(name) for name in expected} == expected
        assert (config.loss, config.optimizer, config.gradient_scale) == TRAINED_BY[method]
        assert seeds_of(method, "paper", task) == list(range(20)) and len(seeds_of(method, "quick", task)) >= 5
    synth, data = config.synth(), config.data()
    assert [(p.min, p.max) for p in synth.parameters] == [am_hz, fm_oct_per_s]
    assert (synth.f0_hz, synth.bandwidth_oct, synth.max_shift, synth.n_samples) == (512, 2, 2048, 32768)
    assert not synth.window_gradient
    assert len(data) == 5120 and config.epochs * len(data.batches("train", config.batch_size)) == 4_800
    assert quick.synth().parameters == synth.parameters and quick.sample_rate_hz < config.sample_rate_hz
    for c in (quick, config):
        seconds = [n / c.sample_rate_hz for n in (c.n_samples, c.max_shift, 2**c.J)]
        assert seconds == [4, 0.25, 0.5] and c.f0_hz / c.Q1 == 64 and c.f0_hz < c.sample_rate_hz / 2


def test_quick_profile_keeps_proportions_and_asks_for_enough_seeds():
    config = make_config("granular", "p_loss", 0, "quick")
    assert config.grain_samples / config.slope_hop == 4096 / 256  # the slope stays as audible
    assert config.n_grains * config.grain_samples / config.n_samples == 64 * 4096 / 32768  # as many grains at a time
    assert len(seeds_of("p_loss", "quick")) >= 3 and len(seeds_of("jtfs", "quick")) >= 3


@pytest.mark.parametrize("profile", PROFILES)
def test_grid_holds_every_method_that_can_be_run(profile):
    found = [(c.method, c.seed) for c in grid("granular", profile)]
    assert found == [(m, s) for m in TRAINED_BY if m not in NOT_RUN for s in seeds_of(m, profile)]
    assert set(TRAINED_BY) - {m for m, _ in found} == {"ms_clap", "panns_wavegram_logmel"} == set(NOT_RUN)
    some = grid("granular", profile, ["jtfs", "p_loss"], [3, 1])
    assert [(c.method, c.seed) for c in some] == [("jtfs", 3), ("jtfs", 1), ("p_loss", 3), ("p_loss", 1)]


PLACE = ("granular", "p_loss", 0, "smoke")


@pytest.mark.parametrize(
    ("names", "changes", "error", "message"),
    [
        (("granula", *PLACE[1:]), {}, ValueError, "unknown task 'granula': did you mean 'granular'"),
        (("granular", "scrapl_adam", 0, "smoke"), {}, ValueError, "unknown method .* did you mean 'scrapl_padam'"),
        ((*PLACE[:3], "zzz"), {}, ValueError, "unknown profile 'zzz': valid are smoke, quick, paper"),
        (("granular", "p_loss", -1, "smoke"), {}, ValueError, r"seed must be an integer from 0 to 2\^32 - 1, got -1"),
        (("granular", "p_loss", 2**32, "smoke"), {}, ValueError, "seed must be an integer .* got 4294967296"),
        (("granular", "p_loss", True, "smoke"), {}, ValueError, "seed must be an integer .* got True"),
        (PLACE, {"epoch": 3}, ValueError, "unknown config field 'epoch': did you mean 'epochs'"),
        (PLACE, {"epochs": 2.0}, TypeError, "epochs must be int, got 2.0"),
        (PLACE, {"epochs": True}, TypeError, "epochs must be int, got True"),
        (PLACE, {"n_grains": 2.0}, TypeError, "n_grains must be int or NoneType, got 2.0"),
        (PLACE, {"am_hz": [1.0, 2.0]}, TypeError, r"am_hz must be tuple or NoneType, got \[1.0"),
        (PLACE, {"loss": "mss_log"}, ValueError, "unknown loss 'mss_log': did you mean 'mss_log_linear'"),
        (PLACE, {"optimizer": "adam"}, ValueError, "unknown optimizer 'adam': did you mean 'padam'"),
        (PLACE, {"importance_examples": 6}, ValueError, "must be a multiple of batch_size = 4, got 6"),
        (PLACE, {"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        (("tr808_meso", "scrapl", 0, "smoke"), {"max_shift": -1}, ValueError, "max_shift must be at least 0, got -1"),
        (("granular", "scrapl_padam", 0, "smoke"), {"accumulate": 2}, ValueError, "accumulate must be 1 with padam"),
    ],
)
def test_config_refuses(names, changes, error, message):
    with pytest.raises(error, match=message):
        make_config(*names, **changes)


def test_grid_refuses_what_needs_a_theta_that_nobody_knows():
    with pytest.raises(ValueError, match="'p_loss' needs to know theta.*tr808_micro takes jtfs, scrapl, "):
        grid("tr808_micro", "smoke", ["p_loss"])


@pytest.mark.parametrize("method, reason", NOT_RUN.items())
def test_a_method_that_is_not_run_is_taken_by_name_if_its_model_loads(method, reason, monkeypatch):
    assert seeds_of(method, "paper") == []
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "msclap", None)  # import fails, as without the extra
        patch.setitem(sys.modules, "panns_AT_inference", None)
        says = rf"method {method!r} is not run: {reason}: {method} needs .* could not be loaded .*\[embeddings\].*once"
        with pytest.raises(ValueError, match=says):
            grid("granular", "smoke", [method])
    loaded = []
    monkeypatch.setattr(tasks, "EmbeddingLoss", lambda *arguments: loaded.append(arguments))
    assert method not in {c.method for c in grid("granular", "quick")} and not loaded
    assert [(c.method, c.seed) for c in grid("granular", "quick", [method])] == [(method, seed) for seed in range(3)]
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
    assert [config.seed for config in configs] == seeds_of("mine", "quick") == list(range(3))
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
