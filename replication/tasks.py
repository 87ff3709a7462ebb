"""The grid of experiments: task x method x seed, at the size of a profile; one flat, frozen config per run.

smoke  toy size, everything in minutes on two cores; its numbers mean nothing
quick  a reduced problem for a laptop, on which the paper's ordering shows
paper  the hyperparameters of the paper (section 7, Tables 10 to 12), for a CUDA GPU
"""

import functools
import hashlib
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import UnionType
from typing import get_origin

from scrapl_lib.checks import check_name
from scrapl_lib.losses import SCRAPLLoss
from scrapl_lib.synths import ChirpletSynth, GranularSynth, SnareSynth

from . import circuit_808
from .baselines import EmbeddingLoss, WeightsUnavailable
from .data import COUNTS, OneShots, ThetaGrid, audio_files
from .encoder import Encoder
from .records import IMPORTANCE, ROOT

SLOW_AM, FAST_AM = (0.9899, 1.9799), (3.9598, 7.9196)  # Hz, as run; the paper's text has 2.8 to 8.4 for the fast one
SLOW_FM, MODERATE_FM, FAST_FM = (
    (0.5, 1.0),
    (2.0, 4.0),
    (8.0, 16.0),
)  # octaves per second; the text has 4 to 12 for the last
CHIRPLETS = {  # task: ranges of AM and FM rate
    "chirplet_slow_slow": (SLOW_AM, SLOW_FM),
    "chirplet_slow_moderate": (SLOW_AM, MODERATE_FM),
    "chirplet_fast_moderate": (FAST_AM, MODERATE_FM),
    "chirplet_fast_fast": (FAST_AM, FAST_FM),
}
TR808 = {"tr808_micro": False, "tr808_meso": True}  # task: whether reconstructions are shifted in time
TASKS = ("granular", *CHIRPLETS, *TR808)
CIRCUIT = f"circuit-model corpus, version {circuit_808.VERSION}"
RECORDINGS_HZ = 44100  # of the files in TR808_DIR, whatever the profile's own rate
PROFILES = ("smoke", "quick", "paper")
# method -> (loss, optimizer), in display order
METHODS = {
    "p_loss": ("p_loss", "adamw"),
    "jtfs": ("jtfs", "adamw"),
    "scrapl": ("scrapl", "psaga"),
    "scrapl_no_theta_is": ("scrapl", "psaga"),
    "scrapl_padam": ("scrapl", "padam"),
    "scrapl_plain": ("scrapl", "adamw"),
    "mss_linear": ("mss_linear", "adamw"),
    "mss_log_linear": ("mss_log_linear", "adamw"),
    "mss_revisited": ("mss_revisited", "adamw"),
    "mss_random": ("mss_random", "adamw"),
    "ms_clap": ("ms_clap", "adamw"),
    "panns_wavegram_logmel": ("panns_wavegram_logmel", "adamw"),
}
NOT_RUN = {  # unless asked for by name: their losses need a package and weights that are not installed with the rest
    "ms_clap": "weights unavailable",
    "panns_wavegram_logmel": "weights unavailable",
}
SCATTERING = ("jtfs", "scrapl")
# what the path probabilities of theta-importance sampling do not depend on
_TRAINING = (
    "optimizer",
    "epochs",
    "accumulate",
    "lr",
    "lr_end",
    "beta1",
    "beta2",
    "eps",
    "weight_decay",
    "gradient_scale",
    "n_audio_test",
)
SAMPLERS = ("scrapl_no_theta_is", "scrapl")  # the methods that the paper runs on the chirplet tasks


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides the outcome of a run, but for the machine. Lengths are in samples; the defaults are the
    paper's granular task; what is None does not apply to the task."""

    profile: str
    task: str
    method: str
    seed: int
    loss: str
    optimizer: str
    # sound
    sample_rate_hz: int = 8192
    n_samples: int = 32768
    n_grains: int | None = 64
    grain_samples: int | None = 4096
    slope_hop: int | None = 256
    am_hz: tuple[float, float] | None = None
    fm_oct_per_s: tuple[float, float] | None = None
    f0_hz: float | None = None
    bandwidth_oct: float | None = None
    max_shift: int | None = None
    common_delay: int | None = None
    # data
    grid_size: int | None = 32
    n_synth_seeds: int | None = 5
    sounds: str | None = None  # CIRCUIT, or "recordings" and a hash of them
    n_sounds: int | None = None
    # scattering transform
    J: int = 12
    Q1: int = 8
    Q2: int = 2
    J_fr: int = 3
    Q_fr: int = 2
    T: int | None = None
    F: int | None = None
    rho: str | None = None  # "log1p"; None: identity
    # encoder
    cqt_octaves: int = 5
    cqt_hop: int = 256
    channels: int = 128
    pools: tuple[tuple[int, int], ...] = ((2, 2),) * 5
    dense: int = 64
    dropout: float = 0.5
    # training
    epochs: int = 200
    batch_size: int = 32
    accumulate: int = 1
    lr: float = 1e-5
    lr_end: float | None = None  # reached linearly, step by step
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    gradient_scale: float = 1.0
    importance_examples: int | None = None
    # test
    n_audio_test: int = 1024

    def __post_init__(self) -> None:
        for field in fields(self):
            value, kinds = (
                getattr(self, field.name),
                field.type.__args__ if isinstance(field.type, UnionType) else (field.type,),
            )
            kinds = tuple(get_origin(kind) or kind for kind in kinds)
            if not isinstance(value, kinds) or isinstance(value, bool):
                raise TypeError(f"{field.name} must be {' or '.join(kind.__name__ for kind in kinds)}, got {value!r}")
            if isinstance(value, int) and value < (
                least := int(field.name not in ("seed", "max_shift", "common_delay"))
            ):
                raise ValueError(f"{field.name} must be at least {least}, got {value}")
        check_name("loss", self.loss, dict.fromkeys(loss for loss, _ in METHODS.values()))
        check_name("optimizer", self.optimizer, dict.fromkeys(optimizer for _, optimizer in METHODS.values()))
        if self.importance_examples is not None and (
            self.importance_examples < 1 or self.importance_examples % self.batch_size
        ):
            raise ValueError(
                f"importance_examples must be a multiple of batch_size = {self.batch_size}, got {self.importance_examples}"
            )
        if self.accumulate > 1 and self.optimizer != "adamw":
            raise ValueError(
                f"accumulate must be 1 with {self.optimizer}: every part of a step would draw a path of its own"
            )

    @property
    def flat(self) -> dict[str, object]:
        """The config as the record keeps it; fields that are None do not apply to the run and are left out, so that a new
        kind of run may bring fields of its own without making older records stale."""
        unused = _TRAINING if self.method == IMPORTANCE else ()
        return {name: value for name, value in asdict(self).items() if value is not None and name not in unused}

    def synth(self) -> GranularSynth | ChirpletSynth | SnareSynth:
        """The task's synthesizer."""
        if self.task in TR808:
            return SnareSynth(self.sample_rate_hz, self.n_samples, self.common_delay, self.max_shift)
        if self.task in CHIRPLETS:
            return ChirpletSynth(
                self.am_hz,
                self.fm_oct_per_s,
                self.sample_rate_hz,
                self.n_samples,
                self.f0_hz,
                self.bandwidth_oct,
                self.max_shift,
            )
        return GranularSynth(self.sample_rate_hz, self.n_samples, self.n_grains, self.grain_samples, self.slope_hop)

    def data(self) -> ThetaGrid | OneShots:
        """The task's parameters, synthesizer seeds and folds; or its sounds, which start without the common delay, and their
        split, which is the seed's own."""
        if self.task in TR808:
            n_samples = self.n_samples - self.common_delay
            if self.sounds != CIRCUIT:
                return OneShots.from_folder(None, self.sample_rate_hz, n_samples, self.seed, file_rate_hz=RECORDINGS_HZ)
            return OneShots.from_circuit(
                self._counts(), self.sample_rate_hz, n_samples, self.seed, cache=ROOT / "cache"
            )
        return ThetaGrid(self.grid_size, self.synth().n_params, self.n_synth_seeds)

    def _counts(self) -> dict[str, int]:
        return {kind: max(1, round(n * self.n_sounds / sum(COUNTS.values()))) for kind, n in COUNTS.items()}

    def encoder(self) -> Encoder:
        """A new encoder; its weights come from torch's global generator."""
        return Encoder(
            self.sample_rate_hz,
            self.n_samples,
            self.synth().n_params,
            self.cqt_octaves,
            self.cqt_hop,
            self.channels,
            self.pools,
            self.dense,
            self.dropout,
        )

    def derived(self) -> dict[str, int]:
        """What follows from the config and is worth knowing beside it: sizes of the transform, of the encoder, of the run."""
        known = self.sounds == CIRCUIT  # without rendering them
        n_train = OneShots.sizes(sum(self._counts().values()))[0] if known else len(self.data().train)
        steps = self.epochs * (n_train // (self.batch_size * self.accumulate))
        n_weights = sum(weight.numel() for weight in self.encoder().parameters())
        n_paths = SCRAPLLoss(**self.transform()).n_paths
        return {
            "T": self.T or 2**self.J,
            "F": self.F or 2**self.J_fr,
            "n_paths": n_paths,
            "n_weights": n_weights,
            "n_steps": steps,
            "n_seeds": len(seeds_of(self.method, self.profile, self.task)),
        }

    def transform(self) -> dict[str, int | bool]:
        """Arguments of SCRAPLLoss and JTFSLoss; those that are theirs by default are left out."""
        arguments = {
            "shape": self.n_samples,
            "J": self.J,
            "Q1": self.Q1,
            "Q2": self.Q2,
            "J_fr": self.J_fr,
            "Q_fr": self.Q_fr,
        }
        arguments |= {name: getattr(self, name) for name in ("T", "F") if getattr(self, name) is not None}
        return arguments | ({"log1p": True} if self.rho == "log1p" else {})


# Time is four times shorter and everything that has a duration with it, so that the slope (its unit is
# sample_rate / (12 slope_hop) / 4 octaves per second) stays as audible; fewer wavelets, weights and steps.
_QUICK = {
    "n_samples": 8192,
    "n_grains": 16,
    "grain_samples": 1024,
    "slope_hop": 64,
    "grid_size": 16,
    "n_synth_seeds": 3,
    "J": 10,
    "Q2": 1,
    "Q_fr": 1,
    "cqt_octaves": 4,
    "cqt_hop": 64,
    "channels": 32,
    "pools": ((2, 2),) * 4,
    "dense": 32,
    "dropout": 0.0,
    "epochs": 8,
    "batch_size": 8,
    "lr": 1e-3,
    "n_audio_test": 64,
}
_SMOKE = {
    "n_samples": 2560,
    "n_grains": 4,
    "grain_samples": 512,
    "slope_hop": 32,
    "grid_size": 5,
    "n_synth_seeds": 1,
    "J": 7,
    "Q1": 4,
    "Q2": 1,
    "J_fr": 2,
    "Q_fr": 1,
    "cqt_octaves": 2,
    "cqt_hop": 64,
    "channels": 4,
    "pools": ((2, 2),) * 3,
    "dense": 8,
    "dropout": 0.0,
    "epochs": 3,
    "batch_size": 4,
    "lr": 1e-3,
    "n_audio_test": 4,
}
# What sets the chirplet tasks apart. Rates and seconds are the paper's: the sample rate is eight times lower. The chirp lies an
# octave lower than the paper's, below the new Nyquist frequency; half the wavelets per octave are then as long as there.
_CHIRPLET = {
    "smoke": {"sample_rate_hz": 1024, "f0_hz": 256.0, "max_shift": 160, "J": 5},
    "quick": {
        "sample_rate_hz": 1024,
        "n_samples": 4096,
        "f0_hz": 256.0,
        "max_shift": 256,
        "J": 9,
        "Q1": 4,
        "J_fr": 2,
        "cqt_octaves": 2,
        "epochs": 12,
        "lr": 5e-4,
    },
    "paper": {"f0_hz": 512.0, "max_shift": 2048, "epochs": 50, "lr": 1e-4},
}
# What sets the TR-808 tasks apart. Quick: a quarter of the sample rate, 0.37 s; delays and averaging as long as the paper's.
_TR808 = {
    "smoke": {
        "sample_rate_hz": 8820,
        "n_samples": 4096,
        "common_delay": 320,
        "J": 5,
        "T": 64,
        "F": 1,
        "n_sounds": 20,
        "cqt_octaves": 3,
    },
    "quick": {
        "sample_rate_hz": 11025,
        "n_samples": 4096,
        "common_delay": 512,
        "J": 9,
        "T": 512,
        "F": 1,
        "n_sounds": 120,
        "cqt_octaves": 6,
        "pools": ((2, 2), (2, 2), (2, 2), (3, 3)),
        "epochs": 33,
        "batch_size": 4,
        "lr_end": 1e-4,
    },
    "paper": {
        "sample_rate_hz": 44100,
        "n_samples": 44100,
        "common_delay": 2048,
        "J_fr": 5,
        "T": 2048,
        "F": 1,
        "n_sounds": 681,
        "cqt_octaves": 9,
        "pools": ((2, 2), (2, 2), (2, 3), (3, 3), (3, 3)),
        "dense": 128,
        "dropout": 0.25,
        "epochs": 50,
        "batch_size": 8,
        "lr": 1e-4,
        "lr_end": 1e-5,
    },
}
_SIZES = {"smoke": _SMOKE, "quick": _QUICK, "paper": {}}
# examples from which theta-importance sampling takes its probabilities, in batches: granular, chirplet, TR-808
_IMPORTANCE_EXAMPLES = {"smoke": (8, 4, 4), "quick": (16, 8, 4), "paper": (320, 32, 16)}
# seeds per profile: (every method but JTFS, JTFS); the paper ran JTFS once, four times for the TR-808
_SEEDS = {"smoke": (2, 2), "quick": (5, 3), "paper": (20, 1)}
_TR808_SEEDS = {"smoke": (1, 1), "quick": (3, 3), "paper": (40, 4)}


# rough cost of a step relative to a SCRAPL step, for the order of runs and what is said of the time left
STEP_COST = {"jtfs": 11.0, "scrapl": 1.0, "p_loss": 0.15, IMPORTANCE: 1.0}
OTHER_STEP_COST = 0.3


@functools.cache
def _recordings(folder: str) -> str:
    """What a config says of a folder of recordings: a hash of what of it is read, names and contents, wherever it lies."""
    digest = hashlib.sha256()
    for name, path in audio_files(Path(folder).expanduser().resolve())[0].items():
        digest.update(name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return f"recordings {digest.hexdigest()[:16]}"


def make_config(task: str, method: str, seed: int, profile: str, **changes: object) -> RunConfig:
    """The config of one run; `changes` replace single fields (for experiments of your own: records then count as stale).

    Raises: ValueError for unknown names, with the nearest valid one; TypeError for a field of the wrong type.
    """
    check_name("task", task, TASKS)
    check_name("method", method, METHODS)
    check_name("profile", profile, PROFILES)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"seed must be an integer from 0 to 2^32 - 1, got {seed!r}")
    loss, optimizer = METHODS[method]
    size = _SIZES[profile]
    if task in CHIRPLETS:
        am_hz, fm_oct_per_s = CHIRPLETS[task]
        size = size | dict.fromkeys(("n_grains", "grain_samples", "slope_hop")) | _CHIRPLET[profile]
        size |= {"am_hz": am_hz, "fm_oct_per_s": fm_oct_per_s, "bandwidth_oct": 2.0}
    if task in TR808:
        not_used = ("n_grains", "grain_samples", "slope_hop", "grid_size", "n_synth_seeds")
        size = size | dict.fromkeys(not_used) | _TR808[profile] | {"rho": "log1p"}
        size["max_shift"] = size["common_delay"] if TR808[task] else 0
        if folder := os.environ.get("TR808_DIR"):
            size |= {"sounds": _recordings(folder), "n_sounds": None}
        else:
            size["sounds"] = CIRCUIT
    config = RunConfig(profile, task, method, seed, loss, optimizer, **size)
    if loss in SCATTERING and task not in TR808:
        config = replace(config, gradient_scale=1e8)
    if method == "scrapl":
        kind = 2 if task in TR808 else int(task in CHIRPLETS)
        config = replace(config, importance_examples=_IMPORTANCE_EXAMPLES[profile][kind])
    if loss == "jtfs" and profile == "paper" and task not in TR808:
        config = replace(config, batch_size=6, accumulate=5)
    for name in changes:
        check_name("config field", name, (field.name for field in fields(RunConfig)))
    return replace(config, **changes)


def importance_config(task: str, profile: str, **changes: object) -> RunConfig:
    """The path probabilities that the `scrapl` runs of all seeds draw from, as a config: what decides them, and their place
    among the runs. They come from the initial weights of seed 0; `changes` as in `make_config`."""
    return replace(make_config(task, "scrapl", 0, profile, **changes), method=IMPORTANCE)


def methods_of(task: str) -> tuple[str, ...]:
    """The methods that the paper runs on a task, in display order; `grid` takes others when they are asked for."""
    if check_name("task", task, TASKS) in TR808:
        return tuple(
            method for method, (loss, _) in METHODS.items() if loss.startswith("mss_") or method in ("jtfs", *SAMPLERS)
        )
    return SAMPLERS[::-1] if task in CHIRPLETS else tuple(METHODS)


def seeds_of(method: str, profile: str, task: str = "granular") -> list[int]:
    """The seeds of a method in a profile; none for a method that is not run."""
    return [] if method in NOT_RUN else _profile_seeds(method, profile, task)


def _profile_seeds(method: str, profile: str, task: str) -> list[int]:
    others, jtfs = (_TR808_SEEDS if task in TR808 else _SEEDS)[profile]
    return list(range(jtfs if METHODS[method][0] == "jtfs" else others))


def grid(
    task: str, profile: str, methods: Iterable[str] | None = None, seeds: Iterable[int] | None = None
) -> list[RunConfig]:
    """The configs of a task's runs, by method and seed: all of the profile, or those asked for.

    A method of NOT_RUN must be asked for by name; its pretrained model is then loaded here, and its weights downloaded if
    this is their first use, so that no run is started that cannot load it.

    Raises: ValueError for unknown names, and for a method whose model cannot be loaded, with the reason and what to do.
    """
    check_name("task", task, TASKS)
    check_name("profile", profile, PROFILES)
    configs = []
    seeds = None if seeds is None else list(seeds)
    for method in [name for name in methods_of(task) if name not in NOT_RUN] if methods is None else methods:
        check_name("method", method, METHODS)
        if task in TR808 and METHODS[method][0] == "p_loss":
            raise ValueError(
                f"method {method!r} needs to know theta, which sounds of drums do not tell: {task} takes {', '.join(methods_of(task))}"
            )
        wanted = [
            make_config(task, method, seed, profile)
            for seed in (_profile_seeds(method, profile, task) if seeds is None else seeds)
        ]
        if method in NOT_RUN and wanted:
            try:
                EmbeddingLoss(wanted[0].loss, wanted[0].sample_rate_hz)
            except WeightsUnavailable as error:
                raise ValueError(f"method {method!r} is not run: {NOT_RUN[method]}: {error}") from error
        configs += wanted
    return configs


def needs(config: RunConfig) -> RunConfig | None:
    """The path probabilities that a run draws from, as a config."""
    return replace(config, method=IMPORTANCE, seed=0) if config.method == "scrapl" else None


def step_cost(method: str) -> float:
    """Rough cost of a step of a method, or of path probabilities, relative to a SCRAPL step."""
    return STEP_COST.get(method if method == IMPORTANCE else METHODS[method][0], OTHER_STEP_COST)


def run_cost(config: RunConfig) -> float:
    """Rough cost of a run: samples heard times `step_cost`. Recordings count as many as the paper's."""
    n_items = (
        (config.n_sounds or sum(COUNTS.values()))
        if config.task in TR808
        else config.grid_size**2 * config.n_synth_seeds
    )
    return config.epochs * n_items * config.n_samples * step_cost(config.method)


def by_worth(found: dict[RunConfig, str]) -> list[RunConfig]:
    """The missing ones of `found`, a dict from run to its state on disk, in the order in which a limited time is best spent.

    One seed of every task and method, then a second one of each, and so on; within such a round the cheap before the dear, by
    `run_cost`, which counts path probabilities that are missing too. These come right before the first run that needs them.
    """
    seeds, worth = Counter((c.task, c.method) for c, state in found.items() if state == "done"), {}
    missing = [c for c, state in found.items() if state == "missing" and c.method != IMPORTANCE]
    for c in sorted(missing, key=lambda c: c.seed):
        worth[c] = (
            seeds[c.task, c.method],
            sum(run_cost(each) for each in (needs(c), c) if found.get(each) == "missing"),
        )
        seeds[c.task, c.method] += 1
    ordered = sorted(worth, key=worth.get)
    return list(dict.fromkeys(each for c in ordered for each in (needs(c), c) if found.get(each) == "missing"))
