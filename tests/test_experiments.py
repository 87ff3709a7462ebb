"""The grid of experiments: the paper's hyperparameters as literals, and every name and type it must refuse."""

import sys

import pytest

from replication import tasks as experiments
from replication.records import config_hash
from replication.tasks import (
    CHIRPLETS,
    METHODS,
    NOT_RUN,
    PROFILES,
    TASKS,
    by_worth,
    grid,
    importance_config,
    make_config,
    methods_of,
    seeds_of,
)

PAPER = {  # paper, sections 3, 5, 6 and 7: the granular task
    "sample_rate_hz": 8192,
    "n_samples": 32768,
    "n_grains": 64,
    "grain_samples": 4096,
    "slope_hop": 256,
    "grid_size": 32,
    "n_synth_seeds": 5,
    "J": 12,
    "Q1": 8,
    "Q2": 2,
    "J_fr": 3,
    "Q_fr": 2,
    "cqt_octaves": 5,
    "cqt_hop": 256,
    "channels": 128,
    "pools": ((2, 2), (2, 2), (2, 2), (2, 2), (2, 2)),
    "dense": 64,
    "dropout": 0.5,
    "epochs": 200,
    "batch_size": 32,
    "accumulate": 1,
    "lr": 1e-5,
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-8,
    "weight_decay": 0.01,
}
TRAINED_BY = {  # method: loss, optimizer, gradient scale
    "p_loss": ("p_loss", "adamw", 1.0),
    "jtfs": ("jtfs", "adamw", 1e8),
    "scrapl": ("scrapl", "psaga", 1e8),
    "scrapl_no_theta_is": ("scrapl", "psaga", 1e8),
    "scrapl_padam": ("scrapl", "padam", 1e8),
    "scrapl_plain": ("scrapl", "adamw", 1e8),
    "mss_linear": ("mss_linear", "adamw", 1.0),
    "mss_log_linear": ("mss_log_linear", "adamw", 1.0),
    "mss_revisited": ("mss_revisited", "adamw", 1.0),
    "mss_random": ("mss_random", "adamw", 1.0),
    "ms_clap": ("ms_clap", "adamw", 1.0),
    "panns_wavegram_logmel": ("panns_wavegram_logmel", "adamw", 1.0),
}


@pytest.mark.parametrize("method", TRAINED_BY)
def test_paper_profile_has_the_hyperparameters_of_the_paper(method):
    assert list(METHODS) == list(TRAINED_BY)
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


def test_quick_profile_keeps_proportions_and_asks_for_enough_seeds():
    config = make_config("granular", "p_loss", 0, "quick")
    assert config.grain_samples / config.slope_hop == 4096 / 256  # the slope stays as audible
    assert len(seeds_of("p_loss", "quick")) >= 5 and len(seeds_of("jtfs", "quick")) >= 3


CHIRPLET_RANGES = {  # as run
    "chirplet_slow_slow": ((0.9899, 1.9799), (0.5, 1.0)),
    "chirplet_slow_moderate": ((0.9899, 1.9799), (2.0, 4.0)),
    "chirplet_fast_moderate": ((3.9598, 7.9196), (2.0, 4.0)),
    "chirplet_fast_fast": ((3.9598, 7.9196), (8.0, 16.0)),
}
CHIRPLET = {"f0_hz": 512.0, "bandwidth_oct": 2.0, "max_shift": 2048, "epochs": 50, "lr": 1e-4}


@pytest.mark.parametrize("task", CHIRPLETS)
@pytest.mark.parametrize("method", ["scrapl", "scrapl_no_theta_is"])
def test_paper_profile_has_the_chirplets_of_the_paper(task, method):
    assert tuple(CHIRPLET_RANGES) == tuple(CHIRPLETS) == TASKS[1:-2] and set(methods_of(task)) == {
        "scrapl",
        "scrapl_no_theta_is",
    }
    config = make_config(task, method, 0, "paper")
    am_hz, fm_oct_per_s = CHIRPLET_RANGES[task]
    expected = PAPER | CHIRPLET | {"am_hz": am_hz, "fm_oct_per_s": fm_oct_per_s}
    for granular in ("n_grains", "grain_samples", "slope_hop"):
        del expected[granular]
        assert granular not in config.flat
    assert {name: config.flat[name] for name in expected} == expected
    assert (config.loss, config.optimizer, config.gradient_scale) == TRAINED_BY[method]
    synth, data = config.synth(), config.data()
    assert [(p.min, p.max) for p in synth.parameters] == [am_hz, fm_oct_per_s]
    assert (synth.f0_hz, synth.bandwidth_oct, synth.max_shift, synth.n_samples) == (512, 2, 2048, 32768)
    assert not synth.window_gradient
    assert len(data) == 5120 and config.epochs * len(data.batches("train", config.batch_size)) == 4_800
    assert seeds_of(method, "paper") == list(range(20))


@pytest.mark.parametrize("task", CHIRPLETS)
def test_quick_chirplets_keep_rates_and_seconds(task):
    """At a lower sample rate; wavelets at the chirp's frequency are as long as the paper's."""
    config, paper = (make_config(task, "scrapl_no_theta_is", 0, name) for name in ("quick", "paper"))
    assert config.synth().parameters == paper.synth().parameters and config.sample_rate_hz < paper.sample_rate_hz
    for c in (config, paper):
        seconds = [n / c.sample_rate_hz for n in (c.n_samples, c.max_shift, 2**c.J)]
        assert seconds == [4, 0.25, 0.5] and c.f0_hz / c.Q1 == 64 and c.f0_hz < c.sample_rate_hz / 2
    assert len(seeds_of("scrapl", "quick")) >= 5


def test_records_of_the_granular_task_stay_valid():
    """A field that does not apply is None and left out of the hash; the hashes are those of committed records."""
    known = {
        "p_loss": "97d93c49dc9e187c2b37e10fd4ee620e02258e3214d27a107958dd45d4b9c57e",
        "scrapl_padam": "e77d74cc0b416664f399341e9810546896308853dcd34166c0575a31ea5965b5",
    }
    assert {method: config_hash(make_config("granular", method, 0, "quick").flat) for method in known} == known


@pytest.mark.parametrize("profile", PROFILES)
def test_grid_holds_every_method_that_can_be_run(profile):
    found = {(c.method, c.seed) for c in grid("granular", profile)}
    assert found == {(m, s) for m in METHODS if m not in NOT_RUN for s in seeds_of(m, profile)}
    assert {m for m, _ in found} == {
        "p_loss",
        "jtfs",
        "scrapl",
        "scrapl_no_theta_is",
        "scrapl_padam",
        "scrapl_plain",
        "mss_linear",
        "mss_log_linear",
        "mss_revisited",
        "mss_random",
    }
    some = grid("granular", profile, ["jtfs", "p_loss"], [3, 1])
    assert [(c.method, c.seed) for c in some] == [("jtfs", 3), ("jtfs", 1), ("p_loss", 3), ("p_loss", 1)]


def test_configs_are_told_apart_by_their_hash():
    base = make_config("granular", "p_loss", 0, "smoke")
    others = [
        make_config("granular", "p_loss", 1, "smoke"),
        make_config("granular", "jtfs", 0, "smoke"),
        make_config("granular", "p_loss", 0, "quick"),
        make_config("granular", "p_loss", 0, "smoke", lr=2e-3),
    ]
    assert len({config_hash(config.flat) for config in [base, *others]}) == 5
    assert config_hash(base.flat) == config_hash(make_config("granular", "p_loss", 0, "smoke").flat)


@pytest.mark.parametrize(
    "names, changes, error, message",
    [
        (("granula", "p_loss", 0, "smoke"), {}, ValueError, "unknown task 'granula': did you mean 'granular'"),
        (
            ("granular", "scrapl_adam", 0, "smoke"),
            {},
            ValueError,
            "unknown method 'scrapl_adam': did you mean 'scrapl_padam'",
        ),
        (("granular", "p_loss", 0, "smok"), {}, ValueError, "unknown profile 'smok': did you mean 'smoke'"),
        (("granular", "p_loss", 0, "zzz"), {}, ValueError, "unknown profile 'zzz': valid are smoke, quick, paper"),
        (("granular", "p_loss", -1, "smoke"), {}, ValueError, r"seed must be an integer from 0 to 2\^32 - 1, got -1"),
        (("granular", "p_loss", 2**32, "smoke"), {}, ValueError, "seed must be an integer .* got 4294967296"),
        (("granular", "p_loss", 1.0, "smoke"), {}, ValueError, "seed must be an integer .* got 1.0"),
        (("granular", "p_loss", True, "smoke"), {}, ValueError, "seed must be an integer .* got True"),
        (
            ("granular", "p_loss", 0, "smoke"),
            {"epoch": 3},
            ValueError,
            "unknown config field 'epoch': did you mean 'epochs'",
        ),
        (("granular", "p_loss", 0, "smoke"), {"epochs": 2.0}, TypeError, "epochs must be int, got 2.0"),
        (("granular", "p_loss", 0, "smoke"), {"epochs": True}, TypeError, "epochs must be int, got True"),
        (("granular", "p_loss", 0, "smoke"), {"lr": "fast"}, TypeError, "lr must be float, got 'fast'"),
        (("granular", "p_loss", 0, "smoke"), {"n_grains": 2.0}, TypeError, "n_grains must be int or NoneType, got 2.0"),
        (
            ("granular", "p_loss", 0, "smoke"),
            {"am_hz": [1.0, 2.0]},
            TypeError,
            r"am_hz must be tuple or NoneType, got \[1.0",
        ),
        (
            ("chirplet_slow", "p_loss", 0, "smoke"),
            {},
            ValueError,
            "unknown task 'chirplet_slow': did you mean 'chirplet_slow_slow'",
        ),
        (("granular", "p_loss", 0, "smoke"), {"pools": [[2, 2]]}, TypeError, "pools must be tuple, got"),
        (
            ("granular", "p_loss", 0, "smoke"),
            {"loss": "mss_log"},
            ValueError,
            "unknown loss 'mss_log': did you mean 'mss_log_linear'",
        ),
        (
            ("granular", "p_loss", 0, "smoke"),
            {"optimizer": "adam"},
            ValueError,
            "unknown optimizer 'adam': did you mean 'padam'",
        ),
        (("granular", "p_loss", 0, "smoke"), {"epochs": -1}, ValueError, "epochs must be at least 1, got -1"),
        (("granular", "scrapl", 0, "smoke"), {"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        (("tr808_meso", "scrapl", 0, "smoke"), {"max_shift": -1}, ValueError, "max_shift must be at least 0, got -1"),
        (("granular", "scrapl_padam", 0, "smoke"), {"accumulate": 2}, ValueError, "accumulate must be 1 with padam"),
    ],
)
def test_config_refuses(names, changes, error, message):
    with pytest.raises(error, match=message):
        make_config(*names, **changes)


@pytest.mark.parametrize("method, reason", NOT_RUN.items())
def test_a_method_that_is_not_run_is_taken_by_name_if_its_model_loads(method, reason, monkeypatch):
    assert seeds_of(method, "paper") == []
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "msclap", None)  # import fails, as without the extra
        patch.setitem(sys.modules, "panns_AT_inference", None)
        says = rf"method {method!r} is not run: {reason}: {method} needs .* could not be loaded .*\[embeddings\].*downloaded once"
        with pytest.raises(ValueError, match=says):
            grid("granular", "smoke", [method])
    loaded = []
    monkeypatch.setattr(experiments, "EmbeddingLoss", lambda *arguments: loaded.append(arguments))
    assert method not in {c.method for c in grid("granular", "quick")} and not loaded
    assert [(c.method, c.seed) for c in grid("granular", "quick", [method])] == [(method, seed) for seed in range(5)]
    assert [c.seed for c in grid("granular", "quick", [method], [7])] == [7] and not grid(
        "granular", "quick", [method], []
    )
    assert loaded == [(method, 8192)] * 2


@pytest.mark.parametrize(
    "task, profile, methods", [("x", "smoke", None), ("granular", "x", None), ("granular", "smoke", ["x"])]
)
def test_grid_refuses_unknown_names(task, profile, methods):
    with pytest.raises(ValueError, match="unknown (task|profile|method) 'x'"):
        grid(task, profile, methods)


def test_order_of_worth(monkeypatch):
    """One seed of every cell, then the next; cheap before dear; path probabilities, and what they cost, with the first run
    that waits for them. Costs in units of a granular SCRAPL run: tr808 0.045, chirplet 0.25, each times the method's."""
    monkeypatch.delenv("TR808_DIR", raising=False)
    chirplet, drums = "chirplet_slow_slow", "tr808_micro"
    states = {
        ("granular", "jtfs", 0): "missing",
        ("granular", "scrapl", 1): "missing",
        ("granular", "scrapl", 0): "missing",
        ("granular", "theta_importance", 0): "missing",
        ("granular", "scrapl_plain", 1): "missing",
        ("granular", "scrapl_plain", 0): "missing",
        ("granular", "mss_linear", 0): "failed",  # has no value of its cell to show
        ("granular", "mss_linear", 1): "missing",
        ("granular", "p_loss", 0): "done",
        ("granular", "p_loss", 2): "missing",
        ("granular", "p_loss", 1): "missing",
        ("granular", "mss_random", 0): "stale",
        (chirplet, "scrapl_no_theta_is", 0): "missing",
        (chirplet, "scrapl", 0): "missing",
        (chirplet, "theta_importance", 0): "done",
        (drums, "scrapl", 5): "missing",
        (drums, "jtfs", 7): "missing",
    }
    expected = [
        (drums, "scrapl", 5),  # 0.045
        (chirplet, "scrapl_no_theta_is", 0),  # 0.25
        (chirplet, "scrapl", 0),
        ("granular", "mss_linear", 1),  # 0.3
        (drums, "jtfs", 7),  # 11 x 0.045
        ("granular", "scrapl_plain", 0),  # 1
        ("granular", "theta_importance", 0),
        ("granular", "scrapl", 0),  # 1 + 1
        ("granular", "jtfs", 0),  # 11
        ("granular", "p_loss", 1),  # the second round: 0.15
        ("granular", "scrapl_plain", 1),
        ("granular", "scrapl", 1),
        ("granular", "p_loss", 2),
    ]

    def config(task, method, seed):
        return (
            importance_config(task, "paper")
            if method == "theta_importance"
            else make_config(task, method, seed, "paper")
        )

    found = by_worth({config(*key): state for key, state in states.items()})
    assert [(c.task, c.method, c.seed) for c in found] == expected
    assert by_worth({}) == []
