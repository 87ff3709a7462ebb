"""The grid of experiments, task x method x seed, at the size of a profile; one flat, frozen config per run.

smoke  toy size, everything in minutes on two cores; its numbers mean nothing
quick  a reduced problem for a laptop, on which the paper's ordering shows
paper  the hyperparameters of the paper (Tables 10 to 12), for a CUDA GPU

A new method is an entry of `METHODS`, a new task one of data_tasks/tasks.toml: docs/adding.md.
"""

import functools
import hashlib
import os
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import UnionType
from typing import Any, get_origin

import torch
from torch import Tensor

from scrapl_lib.checks import check_name
from scrapl_lib.losses import JTFSLoss, SCRAPLLoss, p_loss
from scrapl_lib.optim import PSAGA, PAdam
from scrapl_lib.synths import ChirpletSynth, GranularSynth, SnareSynth

from . import circuit_808
from .baselines import EmbeddingLoss, MSSLoss, WeightsUnavailable
from .data import COUNTS, OneShots, ThetaGrid, audio_files, recordings_folder
from .encoder import Encoder
from .records import IMPORTANCE, ROOT

PROFILES = ("smoke", "quick", "paper")
CIRCUIT = f"circuit-model corpus, version {circuit_808.VERSION}"
OPTIMIZERS = {"adamw": torch.optim.AdamW, "padam": PAdam, "psaga": PSAGA}
# what the path probabilities of theta-importance sampling do not depend on
_TRAINING = "optimizer epochs accumulate lr lr_end beta1 beta2 eps weight_decay gradient_scale n_audio_test".split()


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
            value = getattr(self, field.name)
            kinds = field.type.__args__ if isinstance(field.type, UnionType) else (field.type,)
            kinds = tuple(get_origin(kind) or kind for kind in kinds)
            if not isinstance(value, kinds) or isinstance(value, bool):
                raise TypeError(f"{field.name} must be {' or '.join(kind.__name__ for kind in kinds)}, got {value!r}")
            least = 0 if field.name in ("seed", "max_shift", "common_delay") else 1
            if isinstance(value, int) and value < least:
                raise ValueError(f"{field.name} must be at least {least}, got {value}")
        check_name("loss", self.loss, dict.fromkeys(method.loss for method in METHODS.values()))
        check_name("optimizer", self.optimizer, OPTIMIZERS)
        if (n := self.importance_examples or 0) % self.batch_size:
            raise ValueError(f"importance_examples must be a multiple of batch_size = {self.batch_size}, got {n}")
        if self.accumulate > 1 and self.optimizer != "adamw":
            why = "every part of a step would draw a path of its own"
            raise ValueError(f"accumulate must be 1 with {self.optimizer}: {why}")

    @property
    def flat(self) -> dict[str, object]:
        """The config as the record keeps it, without fields that are None: they do not apply, and a new kind of run may
        bring fields of its own without making older records stale."""
        unused = _TRAINING if self.method == IMPORTANCE else ()
        return {name: value for name, value in asdict(self).items() if value is not None and name not in unused}

    def synth(self) -> GranularSynth | ChirpletSynth | SnareSynth:
        """The task's synthesizer."""
        return TASKS[self.task].make_synth(self)

    def data(self) -> ThetaGrid | OneShots:
        """The task's parameters and synthesizer seeds; or its sounds, which start without the common delay and are
        split by the run's seed."""
        return TASKS[self.task].make_data(self)

    def encoder(self) -> Encoder:
        """A new encoder; its weights come from torch's global generator."""
        sound = (self.sample_rate_hz, self.n_samples, self.synth().n_params)
        return Encoder(*sound, self.cqt_octaves, self.cqt_hop, self.channels, self.pools, self.dense, self.dropout)

    def make_loss(self, probs: Tensor | None = None) -> Callable:
        """The run's loss, a function of (x_hat, x); of (theta_hat, theta) for "p_loss". probs: `Method.theta_is`."""
        method = next(method for method in METHODS.values() if method.loss == self.loss)
        return method.make_loss(self, *([] if probs is None else [probs]))

    def make_optimizer(self, weights: Iterable[torch.nn.Parameter], loss: Callable) -> torch.optim.Optimizer:
        """The run's optimizer of `weights`; P-Adam and P-SAGA read the drawn path from `loss`."""
        options = {"lr": self.lr, "betas": (self.beta1, self.beta2), "eps": self.eps, "weight_decay": self.weight_decay}
        return OPTIMIZERS[self.optimizer](weights, *([] if self.optimizer == "adamw" else [loss]), **options)

    def transform(self) -> dict[str, int | bool]:
        """Arguments of SCRAPLLoss and JTFSLoss; those that are theirs by default are left out."""
        names = ("J", "Q1", "Q2", "J_fr", "Q_fr", "T", "F")
        sizes = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return {"shape": self.n_samples} | sizes | ({"log1p": True} if self.rho == "log1p" else {})

    def derived(self) -> dict[str, int]:
        """What follows from the config and is worth knowing: sizes of the transform, of the encoder, of the run."""
        known = self.sounds == CIRCUIT  # without rendering them
        n_train = OneShots.sizes(sum(_circuit_counts(self).values()))[0] if known else len(self.data().train)
        return {
            "T": self.T or 2**self.J,
            "F": self.F or 2**self.J_fr,
            "n_paths": SCRAPLLoss(**self.transform()).n_paths,
            "n_weights": sum(weight.numel() for weight in self.encoder().parameters()),
            "n_steps": self.epochs * (n_train // (self.batch_size * self.accumulate)),
            "n_seeds": len(seeds_of(self.method, self.profile, self.task)),
        }


# ---- methods --------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Method:
    """A way to train the encoder, and how tables and figures show it.

    style: colour (Okabe & Ito, Tol), marker and line in every figure.
    make_loss: takes a `RunConfig` and returns the loss. loss: its name, by default the method's own; methods that
        differ in optimizer or path probabilities only share a loss.
    theta_is: whether it draws by the recorded path probabilities of theta-importance sampling, (P,) float64;
        `make_loss` then takes them, too.
    tables: the paper's tables it stands in; it is run on the tasks that have them. Empty: beyond the paper, and run
        when asked for by name.
    optimizer: of `OPTIMIZERS`. gradient_scale: multiplies a loss whose gradient is below Adam's eps; not with log1p.
    step_cost: of a step relative to a SCRAPL step, roughly, to order runs and tell the time left.
    not_run: why it is not run unless asked for by name.
    """

    name: str
    label: str
    style: tuple[str, str, str]
    make_loss: Callable[[RunConfig], Callable]
    tables: tuple[int, ...] = (1,)
    optimizer: str = "adamw"
    loss: str = ""
    gradient_scale: float = 1.0
    step_cost: float = 0.3
    theta_is: bool = False
    not_run: str = ""

    def __post_init__(self) -> None:
        self.loss = self.loss or self.name


def _scrapl(c: RunConfig, probs: Tensor | None = None, draw: str | Sequence[Sequence[int]] = "path") -> SCRAPLLoss:
    """A SCRAPL loss; a draw is as probable as its paths together."""
    loss = SCRAPLLoss(**c.transform(), seed=c.seed, draw=draw)
    if probs is not None:
        loss.probs = torch.stack([probs[list(paths)].sum() for paths in loss.draws])
    return loss


def _subset(c: RunConfig, probs: Tensor | None = None) -> SCRAPLLoss:
    """Always the same tenth of the paths, the most probable ones: a pruned scattering graph."""
    if probs is None:
        raise ValueError(f"{c.method} takes the paths of largest probability: give those of theta-importance sampling")
    return _scrapl(c, draw=[sorted(torch.topk(probs, max(1, len(probs) // 10)).indices.tolist())])


def _four_paths(c: RunConfig) -> SCRAPLLoss:
    """As many groups as paths, each of four paths, each path in four of them, put together at random by the run's
    seed."""
    n, generator = SCRAPLLoss(**c.transform()).n_paths, torch.Generator().manual_seed(c.seed)
    order, shifts = (torch.randperm(n, generator=generator) for _ in range(2))
    return _scrapl(c, draw=torch.stack([order.roll(int(shift)) for shift in shifts[:4]], dim=1).tolist())


_JTFS = {"make_loss": lambda c: JTFSLoss(**c.transform()), "gradient_scale": 1e8, "step_cost": 11.0}
_SCRAPL = {"make_loss": _scrapl, "loss": "scrapl", "gradient_scale": 1e8, "step_cost": 1.0}
_PSAGA = {"tables": (1, 2, 3, 4), "optimizer": "psaga"}
_BEYOND = {"tables": (), "gradient_scale": 1e8}
_RATE = _SCRAPL | {"make_loss": functools.partial(_scrapl, draw="rate"), "loss": "scrapl_rate", "step_cost": 1.5}
_MSS = {"make_loss": lambda c: MSSLoss(c.loss), "tables": (1, 4)}
_EMBEDDING = {
    "make_loss": lambda c: EmbeddingLoss(c.loss, c.sample_rate_hz),
    "not_run": "weights unavailable",  # nor is their package installed with the rest
}
_METHODS = (  # in display order
    Method("p_loss", "P-loss", ("#000000", "*", "-"), lambda c: p_loss, (1, 2), step_cost=0.15),
    Method("jtfs", "JTFS", ("#0072B2", "s", "-"), tables=(1, 2, 4), **_JTFS),
    Method("scrapl", "SCRAPL", ("#D55E00", "o", "-"), theta_is=True, **_SCRAPL | _PSAGA),
    Method("scrapl_no_theta_is", "SCRAPL (no θ-IS)", ("#E69F00", "p", "--"), **_SCRAPL | _PSAGA),
    Method("scrapl_padam", "SCRAPL (P-Adam)", ("#CC79A7", "D", "-."), tables=(2,), optimizer="padam", **_SCRAPL),
    Method("scrapl_plain", "SCRAPL (plain)", ("#882255", "P", ":"), tables=(2,), **_SCRAPL),
    Method("mss_linear", "MSS linear", ("#009E73", "^", "-"), **_MSS),
    Method("mss_log_linear", "MSS log + linear", ("#56B4E9", "v", "--"), **_MSS),
    Method("mss_revisited", "MSS revisited", ("#999933", "<", "-."), **_MSS),
    Method("mss_random", "MSS random", ("#332288", ">", ":"), **_MSS),
    Method("ms_clap", "MS-CLAP", ("#999999", "X", "--"), **_EMBEDDING),
    Method("panns_wavegram_logmel", "PANNs Wavegram-Logmel", ("#661100", "d", "-."), **_EMBEDDING),
    # beyond the paper: what else a draw may take
    Method("scrapl_rate", "SCRAPL by rate (no θ-IS)", ("#117733", "h", "--"), **_RATE | _PSAGA | _BEYOND),
    Method("scrapl_rate_theta_is", "SCRAPL by rate", ("#44AA99", "H", "-"), theta_is=True, **_RATE | _PSAGA | _BEYOND),
    Method("scrapl_rate_plain", "SCRAPL by rate (plain)", ("#88CCEE", "8", ":"), **_RATE | _BEYOND),
    Method("scrapl_subset", "fixed tenth of the paths", ("#AA4499", "x", "-."), _subset, theta_is=True, **_BEYOND),
    Method("scrapl_k4", "SCRAPL (four paths a draw)", ("#DDCC77", "+", "--"), _four_paths, **_PSAGA | _BEYOND),
)
METHODS = {method.name: method for method in _METHODS}
BEYOND = tuple(method.name for method in _METHODS if not method.tables)
NOT_RUN = {method.name: method.not_run for method in _METHODS if method.not_run}


# ---- tasks ----------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Task:
    """A problem of sound matching, and where the paper has it.

    label: what tables call it. kind: "granular", "chirplet" or "tr808". condition: what published_tables.csv calls it.
    tables: the paper's tables of its results, by which `methods_of` finds its methods. hyperparameters: theirs.
    make_synth, make_data: take a `RunConfig` and return its synthesizer and its data.
    sizes: by profile, the fields of `RunConfig` that differ from its defaults, `seeds`, their number, and `only`, such
        fields of single methods.
    """

    name: str
    label: str
    kind: str
    condition: str
    tables: list[int]
    hyperparameters: str
    make_synth: Callable[[RunConfig], Any]
    make_data: Callable[[RunConfig], Any]
    sizes: dict[str, dict[str, Any]]

    def fields(self, method: str, profile: str) -> dict[str, Any]:
        """`sizes` of a profile with those of one method."""
        sizes = dict(self.sizes[profile])
        only = sizes.pop("only", {})
        return sizes | only.get(method, {})

    def seeds(self, method: str, profile: str) -> list[int]:
        """The seeds of a method in a profile."""
        return list(range(self.fields(method, profile)["seeds"]))


def _theta_grid(c: RunConfig) -> ThetaGrid:
    return ThetaGrid(c.grid_size, c.synth().n_params, c.n_synth_seeds)


def _circuit_counts(c: RunConfig) -> dict[str, int]:
    return {kind: max(1, round(n * c.n_sounds / sum(COUNTS.values()))) for kind, n in COUNTS.items()}


def _one_shots(c: RunConfig) -> OneShots:
    n_samples = c.n_samples - c.common_delay
    if c.sounds != CIRCUIT:
        return OneShots.from_folder(None, c.sample_rate_hz, n_samples, c.seed)
    return OneShots.from_circuit(_circuit_counts(c), c.sample_rate_hz, n_samples, c.seed, cache=ROOT / "cache")


_SYNTHS = {
    "granular": lambda c: GranularSynth(c.sample_rate_hz, c.n_samples, c.n_grains, c.grain_samples, c.slope_hop),
    "chirplet": lambda c: ChirpletSynth(
        c.am_hz, c.fm_oct_per_s, c.sample_rate_hz, c.n_samples, c.f0_hz, c.bandwidth_oct, c.max_shift
    ),
    "tr808": lambda c: SnareSynth(c.sample_rate_hz, c.n_samples, c.common_delay, c.max_shift),
}
_DATA = {"granular": _theta_grid, "chirplet": _theta_grid, "tr808": _one_shots}


def _read_tasks() -> dict[str, Task]:
    """The tasks of data_tasks/tasks.toml. A field of the task itself goes before its kind's, and that before the
    granular one."""

    def frozen(value: Any) -> Any:
        return tuple(map(frozen, value)) if isinstance(value, list) else value

    kinds = tomllib.loads((Path(__file__).parent / "data_tasks" / "tasks.toml").read_text(encoding="utf-8"))
    tasks = {}
    for name, task in kinds.pop("tasks").items():
        kind, own, sizes = kinds[task["kind"]], task.pop("own", {}), {}
        for profile in PROFILES:
            # `only` is of its own kind's methods
            size = kinds["granular"][profile] | {"only": {}} | dict.fromkeys(kind["unused"]) | kind[profile] | own
            sizes[profile] = {field: frozen(value) for field, value in size.items()}
        about = {field: kind[field] for field in ("tables", "hyperparameters")}
        about |= {"make_synth": _SYNTHS[task["kind"]], "make_data": _DATA[task["kind"]], "sizes": sizes}
        tasks[name] = Task(name, **task, **about)
    return tasks


TASKS = _read_tasks()
CHIRPLETS = {name: task for name, task in TASKS.items() if task.kind == "chirplet"}
TR808 = {name: task for name, task in TASKS.items() if task.kind == "tr808"}


# ---- the grid -------------------------------------------------------------------------------------------------------


@functools.cache
def _recordings(folder: Path) -> str:
    """What a config says of a folder of recordings: a hash of the names and contents that are read, not its place."""
    digest = hashlib.sha256()
    for name, path in audio_files(folder)[0].items():
        digest.update(name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return f"recordings {digest.hexdigest()[:16]}"


def make_config(task: str, method: str, seed: int, profile: str, **changes: object) -> RunConfig:
    """The config of one run; `changes` replace single fields, for experiments of your own (records get stale).

    Raises: ValueError for unknown names, with the nearest valid one; TypeError for a field of the wrong type.
    """
    check_name("task", task, TASKS)
    check_name("method", method, METHODS)
    check_name("profile", profile, PROFILES)
    for name in changes:
        check_name("config field", name, (field.name for field in fields(RunConfig)))
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"seed must be an integer from 0 to 2^32 - 1, got {seed!r}")
    size, chosen = TASKS[task].fields(method, profile), METHODS[method]
    del size["seeds"]
    if not chosen.theta_is:
        del size["importance_examples"]
    if "n_sounds" in size:
        recorded = bool(os.environ.get("TR808_DIR"))
        size |= {"sounds": _recordings(recordings_folder()), "n_sounds": None} if recorded else {"sounds": CIRCUIT}
    if size.get("rho") is None:
        size["gradient_scale"] = chosen.gradient_scale
    return replace(RunConfig(profile, task, method, seed, chosen.loss, chosen.optimizer, **size), **changes)


def importance_config(task: str, profile: str, **changes: object) -> RunConfig:
    """The path probabilities that runs of all seeds draw from, as a config: they come from the initial weights of
    seed 0. `changes` as in `make_config`."""
    return replace(make_config(task, "scrapl", 0, profile, **changes), method=IMPORTANCE)


def methods_in(*tables: int) -> tuple[str, ...]:
    """The methods that stand in one of the paper's `tables`, in display order."""
    return tuple(name for name, method in METHODS.items() if set(method.tables) & set(tables))


def methods_of(task: str) -> tuple[str, ...]:
    """The methods that the paper runs on a task, in display order; `grid` takes others when they are asked for."""
    return methods_in(*TASKS[check_name("task", task, TASKS)].tables)


def seeds_of(method: str, profile: str, task: str = "granular") -> list[int]:
    """The seeds of a method in a profile; none for a method that is not run."""
    return [] if method in NOT_RUN else TASKS[task].seeds(method, profile)


def grid(
    task: str, profile: str, methods: Iterable[str] | None = None, seeds: Iterable[int] | None = None
) -> list[RunConfig]:
    """The configs of a task's runs, by method and seed: all of the profile, or those asked for.

    A method of NOT_RUN must be asked for by name; its pretrained model is then loaded here, and its weights downloaded
    if this is their first use, so that no run is started that cannot load it.

    Raises: ValueError for unknown names, and for a method whose model cannot be loaded, with the reason and what to do.
    """
    suited, configs = methods_of(task), []
    check_name("profile", profile, PROFILES)
    seeds = None if seeds is None else list(seeds)
    for method in [name for name in suited if name not in NOT_RUN] if methods is None else methods:
        check_name("method", method, METHODS)
        if METHODS[method].loss == "p_loss" and TASKS[task].kind == "tr808":
            why = "needs to know theta, which sounds of drums do not tell"
            raise ValueError(f"method {method!r} {why}: {task} takes {', '.join(suited)}")
        chosen = TASKS[task].seeds(method, profile) if seeds is None else seeds
        wanted = [make_config(task, method, seed, profile) for seed in chosen]
        if method in NOT_RUN and wanted:
            try:
                wanted[0].make_loss()
            except WeightsUnavailable as error:
                raise ValueError(f"method {method!r} is not run: {NOT_RUN[method]}: {error}") from error
        configs += wanted
    return configs


def needs(config: RunConfig) -> RunConfig | None:
    """The path probabilities that a run draws from, as a config; they need none themselves."""
    if config.method == IMPORTANCE or not METHODS[config.method].theta_is:
        return None
    return replace(config, method=IMPORTANCE, seed=0, loss="scrapl", optimizer=METHODS["scrapl"].optimizer)


def step_cost(method: str) -> float:
    """Rough cost of a step of a method, or of path probabilities, relative to a SCRAPL step."""
    return 1.0 if method == IMPORTANCE else METHODS[method].step_cost


def run_cost(config: RunConfig) -> float:
    """Rough cost of a run: samples heard times `step_cost`. Recordings count as many as the paper's."""
    grid_items = config.grid_size and config.grid_size**2 * config.n_synth_seeds
    n_items = grid_items or config.n_sounds or sum(COUNTS.values())
    return config.epochs * n_items * config.n_samples * step_cost(config.method)


def by_worth(found: dict[RunConfig, str]) -> list[RunConfig]:
    """The missing ones of `found` (run -> its state on disk), in the order in which a limited time is best spent.

    One seed of every task and method, then a second one of each, and so on; within such a round the cheap before the
    dear, by `run_cost`. Path probabilities that are missing count too, and come right before the first run that needs
    them.
    """

    def missing(*configs: RunConfig | None) -> list[RunConfig]:
        return [config for config in configs if found.get(config) == "missing"]

    seeds, worth = Counter((c.task, c.method) for c, state in found.items() if state == "done"), {}
    for c in sorted((c for c in missing(*found) if c.method != IMPORTANCE), key=lambda c: c.seed):
        worth[c] = (seeds[c.task, c.method], sum(map(run_cost, missing(needs(c), c))))
        seeds[c.task, c.method] += 1
    return list(dict.fromkeys(each for c in sorted(worth, key=worth.get) for each in missing(needs(c), c)))
