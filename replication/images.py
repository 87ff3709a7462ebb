"""Matching pictures (beyond the paper): textures of strokes, an encoder, nine ways to train it, their records.

The counterpart of the granular task. An encoder estimates theta of a texture; the same synthesizer makes a texture of
it with strokes in other places; a loss compares the two pictures, and nobody tells the encoder the true theta.

A run is a function of its config; its record is one of `records`, in results/<profile>/images/<method>/seed_<n>/.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import pandas as pd
import torch
from torch import Tensor, nn

from scrapl_lib import PSAGA, Scattering2D, ScatteringLoss, SCRAPLLoss, theta_importance
from scrapl_lib.checks import check_name
from scrapl_lib.losses import p_loss
from scrapl_lib.synths import Parameter, Synth, uniform

from .baselines import magnitude
from .checkpoints import alone
from .data import meso_seeds
from .measures import theta_l1
from .records import (
    COLUMNS,
    IMPORTANCE,
    ROOT,
    Run,
    config_hash,
    read_record,
    read_run,
    run_folder,
    run_state,
    utc_now,
    write_record,
    write_run,
)
from .stats import holm, mean_ci95, paired_comparison

TASK = "images"
TEST_SEED = 10**6  # of the textures tested on: synthesizer seeds from here on, which no training has
DEVICE = "cpu"


@dataclass(eq=False)
class StrokeSynth(Synth):
    """Picture (batch, 1, size, size) of strokes at random places, scaled to a mean square of 1.

    theta[:, 0] is the density: how many of the strokes are seen. theta[:, 1] is the spread: the strokes' angles are
    uniform within +- spread of the horizontal, from nearly parallel ones to all directions. A stroke is a Gaussian bump
    of standard deviations `length` and `width` in pixels; what passes a border comes in at the other side.
    """

    size: int = 48
    n_strokes: int = 48
    length: float = 3.0
    width: float = 0.8

    parameters = (Parameter("density", 0.0, 1.0, ""), Parameter("spread", 0.05 * math.pi, 0.5 * math.pi, "rad"))
    n_params = len(parameters)

    @property
    def drawn(self) -> dict[str, tuple[tuple[int, ...], tuple[int, int] | None]]:
        return {"place": ((self.n_strokes, 2), None), "turn": ((self.n_strokes,), None)}

    def draw(self, seeds: Tensor) -> tuple[Tensor, ...]:
        """seeds (batch,) int64 -> centres in pixels (batch, n_strokes, 2), and turns in [-1, 1) (batch, n_strokes)."""
        u = uniform(seeds, 3 * self.n_strokes).view(len(seeds), self.n_strokes, 3)
        return self.size * u[..., :2], 2 * u[..., 2] - 1

    def signal(self, controls: list[Tensor], dtype: torch.dtype, *draws: Tensor) -> Tensor:
        (density, spread), (place, turn) = controls, draws
        # pixels near each centre, and their distances from it along and across the stroke
        reach = math.ceil(3 * self.length)
        pixel = place.floor().long()[..., None] + torch.arange(-reach, reach + 2, device=place.device)
        y, x = (pixel - place[..., None]).to(dtype).unbind(dim=2)  # (batch, strokes, pixels)
        angle = (spread.to(dtype) * turn.to(dtype))[..., None, None]
        along = angle.cos() * x[..., None, :] + angle.sin() * y[..., None]
        across = angle.cos() * y[..., None] - angle.sin() * x[..., None, :]
        bumps = torch.exp(-0.5 * ((along / self.length) ** 2 + (across / self.width) ** 2))
        # as the granular synthesizer: falls from the first stroke to the last, steeply so at low density
        density, rank = density.to(dtype), torch.arange(self.n_strokes, device=place.device) / self.n_strokes
        amplitude = torch.sigmoid(-2 * (1 - density) * self.n_strokes * (rank - 0.25 * density - 0.75 * density**2))
        rows, columns = (pixel % self.size).unbind(dim=2)
        at = (self.size * rows[..., None] + columns[..., None, :]).flatten(1)
        strokes = (amplitude[..., None, None] * bumps).flatten(1)
        picture = strokes.new_zeros(len(strokes), self.size**2).scatter_add(1, at, strokes)
        picture = picture / picture.square().mean(dim=1, keepdim=True).sqrt()
        return picture.unflatten(1, (self.size, self.size))


def magnitudes(x: Tensor, n: int) -> Tensor:
    """Fourier magnitudes of Hann-windowed patches of n x n pixels, n / 4 apart.

    x: (batch, 1, H, W) -> (batch, rows, columns, n, n / 2 + 1).
    """
    window = torch.hann_window(n, dtype=x.dtype, device=x.device)
    patches = x[:, 0].unfold(1, n, n // 4).unfold(2, n, n // 4)
    return magnitude(torch.fft.rfft2(patches * window[:, None] * window, norm="ortho"))


class PictureEncoder(nn.Module):
    """Pictures (batch, 1, H, W) -> theta (batch, 2) in (0, 1): a small network that sees mean magnitudes of patches.

    examples: pictures by whose mean and spread the magnitudes' logarithms are scaled.
    """

    def __init__(self, examples: Tensor, hidden: int = 32) -> None:
        super().__init__()
        self.mean, self.std = torch.zeros(()), torch.ones(())
        seen = self.features(examples)
        self.mean, self.std = seen.mean(dim=0), seen.std(dim=0) + 0.1
        self.layers = nn.Sequential(
            nn.Linear(seen.shape[1], hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, 2)
        )

    def features(self, x: Tensor) -> Tensor:
        """(batch, 1, H, W) -> (batch, numbers)."""
        seen = torch.cat([magnitudes(x, n).mean(dim=(1, 2)).flatten(1) for n in (8, 16)], dim=1)
        return (torch.log(seen + 0.01) - self.mean) / self.std

    def forward(self, x: Tensor) -> Tensor:
        return self.estimate(self.features(x))

    def estimate(self, features: Tensor) -> Tensor:
        """theta (batch, 2) of pictures whose features are known."""
        return self.layers(features).sigmoid()


class TextureScattering(Scattering2D):
    """Scattering averaged over the whole picture (as T = "global" does for sounds): where in it is no matter."""

    def path_group(self, x: Tensor, indices: Sequence[int]) -> Tensor:
        """(batch, paths, channels), also of the others' `path`."""
        return super().path_group(x, indices).mean(dim=(-2, -1))


class FourierLoss(nn.Module):
    """Multi-scale Fourier magnitudes: L1 of those of patches, mean over their sizes (as MSS linear).

    averaged: over the picture before they are compared, so that where in it is no matter.
    """

    def __init__(self, sizes: tuple[int, ...] = (8, 16, 32), averaged: bool = False) -> None:
        super().__init__()
        self.sizes, self.averaged = sizes, averaged

    def forward(self, x_hat: Tensor, x: Tensor) -> Tensor:
        """Pictures (batch, 1, H, W) -> scalar."""
        differences = [magnitudes(x_hat, n) - magnitudes(x, n) for n in self.sizes]
        if self.averaged:
            differences = [difference.mean(dim=(1, 2)) for difference in differences]
        return torch.stack([difference.abs().mean() for difference in differences]).mean()


# ---- runs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageConfig:
    """Everything that decides the outcome of a run, but for the machine."""

    profile: str
    method: str
    seed: int
    size: int = 48
    n_strokes: int = 48
    J: int = 3
    L: int = 4
    hidden: int = 32
    batch_size: int = 8
    n_steps: int = 200
    test_every: int = 20
    n_test: int = 128
    lr: float = 2e-3
    importance_examples: int = 8

    @property
    def flat(self) -> dict[str, object]:
        """The config as the record keeps it."""
        return asdict(self) | {"task": TASK}


SIZES = {
    "smoke": dict(size=24, n_strokes=4, J=2, L=2, hidden=4, batch_size=2, n_steps=4, test_every=2, n_test=4),
    "quick": {},
}
SIZES["smoke"]["importance_examples"] = 2
SEEDS = {"smoke": 2, "quick": 5}
METHODS = {  # label, colour and line of each
    "p_loss": ("P-loss (knows θ)", "#000000", "-"),
    "pixels": ("pixel L2", "#999999", "-"),
    "fourier": ("multi-scale Fourier", "#009E73", "--"),
    "fourier_mean": ("multi-scale Fourier, averaged", "#009E73", "-"),
    "scattering": ("full scattering", "#0072B2", "-"),
    "scrapl_plain": ("SCRAPL, Adam", "#882255", ":"),
    "scrapl_psaga": ("SCRAPL, P-SAGA", "#E69F00", "--"),
    "scrapl_theta_is": ("SCRAPL, P-SAGA, θ-IS", "#D55E00", "-"),
    "scrapl_scale": ("SCRAPL by scale, P-SAGA", "#CC79A7", "-."),
}


def image_config(method: str, seed: int, profile: str) -> ImageConfig:
    """The config of one run; profile "paper" is "quick": the paper has no images."""
    check_name("method", method, [*METHODS, IMPORTANCE])
    return ImageConfig(profile, method, seed, **SIZES[check_name("profile", profile, SIZES)])


def scattering(config: ImageConfig) -> TextureScattering:
    """The run's transform."""
    return TextureScattering((config.size, config.size), config.J, config.L)


def make_loss(config: ImageConfig) -> Callable[..., Tensor]:
    """The run's loss, a function of (x_hat, x); P-loss, of (theta_hat, theta)."""
    if config.method == "scattering":
        return ScatteringLoss(scattering(config))
    if config.method.startswith("fourier"):
        return FourierLoss(tuple(n for n in (8, 16, 32) if n <= config.size), config.method == "fourier_mean")
    if config.method in ("p_loss", "pixels"):
        return p_loss if config.method == "p_loss" else nn.MSELoss()
    draw = "scale" if config.method == "scrapl_scale" else "path"
    return SCRAPLLoss(transform=scattering(config), draw=draw, seed=config.seed)


class Matching:
    """One run in memory: encoder, synthesizer, loss; textures to test on. Initial weights depend on the seed alone."""

    def __init__(self, config: ImageConfig) -> None:
        self.config, self.synth = config, StrokeSynth(config.size, config.n_strokes)
        torch.manual_seed(config.seed)
        self.encoder = PictureEncoder(self.textures(0, 64)[1], config.hidden)
        self.loss = make_loss(config)
        self.test_theta, self.test_x = self.textures(TEST_SEED, config.n_test)
        self.test_seen = self.encoder.features(self.test_x)

    def textures(self, first: int, n: int) -> tuple[Tensor, Tensor]:
        """theta uniform in [0, 1]^2 and its textures, of the synthesizer seeds first ... first + n - 1."""
        seeds = torch.arange(first, first + n)
        theta = uniform(seeds + 2**40, 2).float()
        with torch.no_grad():
            return theta, self.synth(theta, seeds)

    def batch_loss(self, step: int) -> Tensor:
        """The loss of one batch of new textures, reconstructed with strokes in other places."""
        c = self.config
        theta, x = self.textures((c.seed + 1) * 10**8 + step * c.batch_size, c.batch_size)
        theta_hat = self.encoder(x)
        if c.method == "p_loss":
            return self.loss(theta_hat, theta)
        return self.loss(self.synth(theta_hat, meso_seeds(c.seed, step, c.batch_size)), x)

    @torch.no_grad()
    def errors(self) -> dict[str, float]:
        """Mean absolute error of each parameter on the test textures, per mille, and their mean."""
        density, spread = theta_l1(self.encoder.estimate(self.test_seen), self.test_theta).tolist()
        return {"theta_l1": (density + spread) / 2, "density_l1": density, "spread_l1": spread}

    def optimizer(self) -> torch.optim.Optimizer:
        """P-SAGA for SCRAPL but where its method says plain, else Adam."""
        own = isinstance(self.loss, SCRAPLLoss) and self.config.method != "scrapl_plain"
        weights, lr = self.encoder.parameters(), self.config.lr
        return PSAGA(weights, self.loss, lr=lr) if own else torch.optim.AdamW(weights, lr=lr)

    def update(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        """One training step; its loss."""
        optimizer.zero_grad()
        loss = self.batch_loss(step)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    def train(self, probs: Tensor | None = None) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Train to the end: history and test, as `records` wants them."""
        c, wall_s, history = self.config, 0.0, []
        if probs is not None:
            self.loss.probs = probs
        optimizer = self.optimizer()
        for step in range(c.n_steps + 1):
            if step % c.test_every == 0:
                history += [(step, "test", metric, value, wall_s) for metric, value in self.errors().items()]
            if step < c.n_steps:
                start_s = time.perf_counter()
                loss = self.update(optimizer, step)
                wall_s += time.perf_counter() - start_s
                history.append((step + 1, "train", "loss", loss, wall_s))
        test = [(metric, value, "per mille") for metric, value in self.errors().items()]
        test += [("step_ms", 1000 * wall_s / c.n_steps, "ms")]
        return pd.DataFrame(history, columns=COLUMNS["history.csv"]), pd.DataFrame(test, columns=COLUMNS["test.csv"])

    def importance(self) -> pd.DataFrame:
        """Probability and curvatures of every path at the present weights, a row per path."""
        theta, x = self.textures(10**7, self.config.importance_examples)
        loss, seeds = SCRAPLLoss(transform=scattering(self.config)), meso_seeds(self.config.seed, 0, len(x))
        found = theta_importance(
            loss, self.encoder, lambda theta: self.synth(theta, seeds), x, self.encoder.parameters(), tol=1e-2
        )
        table = pd.DataFrame([path._asdict() for path in loss.transform.paths]).astype("Int64")
        names = [f"curvature_{parameter.name}" for parameter in self.synth.parameters]
        return table.assign(**dict(zip(names, found.curvature.numpy())), probability=found.probs.numpy())


# ---- records --------------------------------------------------------------------------------------------------------


def folder_of(config: ImageConfig, output: Path = ROOT) -> Path:
    """Where the record of a run is, or belongs."""
    return run_folder(config.profile, TASK, config.method, config.seed, output)


def state_of(config: ImageConfig, output: Path = ROOT) -> str:
    """What is on disk of a run, see `records.run_state`."""
    return run_state(folder_of(config, output), config_hash(config.flat))


def _ensured(config: ImageConfig, output: Path, compute: Callable[[Path], None]) -> Path:
    """The folder of a record, computed if it is missing. Raises ValueError for a stale one."""
    folder = folder_of(config, output)
    with alone(Path(output).absolute() / "checkpoints" / Path(*folder.parts[-4:])):
        if (state := state_of(config, output)) == "stale":
            raise ValueError(f"{folder} holds a record of another configuration: delete that folder to run it again")
        if state == "missing":
            compute(folder)
    return folder


def importance_table(profile: str, output: Path = ROOT) -> pd.DataFrame:
    """Path probabilities, at the initial weights of seed 0; computed if there is no record."""
    config = image_config(IMPORTANCE, 0, profile)

    def compute(folder: Path) -> None:
        start_utc, table = utc_now(), Matching(config).importance()
        about = {"status": "ok", "config": config.flat, "start_utc": start_utc, "device": DEVICE}
        write_record(folder, {"probabilities.csv": table}, **about)

    return pd.read_csv(io.BytesIO(read_record(_ensured(config, output, compute))[1]["probabilities.csv"]))


def ensure_run(config: ImageConfig, output: Path = ROOT) -> Run:
    """The record of a run, which is trained if there is none."""

    def compute(folder: Path) -> None:
        start_utc, probs = utc_now(), None
        if config.method == "scrapl_theta_is":
            probs = torch.tensor(importance_table(config.profile, output)["probability"], dtype=torch.float64)
        history, test = Matching(config).train(None if probs is None else probs / probs.sum())
        about = {"status": "ok", "config": config.flat, "start_utc": start_utc, "device": DEVICE}
        write_run(folder, history=history, test=test, **about)

    return read_run(_ensured(config, output, compute))


def ensure_runs(profile: str, output: Path = ROOT) -> list[Run]:
    """All runs of a profile, seed by seed; a call that was stopped goes on at the next that is missing."""
    seeds = range(SEEDS[check_name("profile", profile, SEEDS)])
    return [ensure_run(image_config(method, seed, profile), output) for seed in seeds for method in METHODS]


# ---- tables ---------------------------------------------------------------------------------------------------------

PAIRS = (  # which differences are tested: b less a, seed by seed
    ("fourier", "scrapl_psaga"),
    ("fourier_mean", "scrapl_psaga"),
    ("scattering", "scrapl_psaga"),
    ("scrapl_plain", "scrapl_psaga"),
    ("scrapl_psaga", "scrapl_theta_is"),
    ("scrapl_psaga", "scrapl_scale"),
)


def values_of(runs: Sequence[Run], method: str, metric: str) -> list[float]:
    """A method's test values, in the order of seeds."""
    return [run.value(metric) for run in sorted(runs, key=lambda run: run.seed) if run.method == method]


def step_costs(profile: str, n_steps: int) -> dict[str, float]:
    """Milliseconds of processor time of a training step by method, median: the methods step in turn, n_steps each.

    (The times in the records are those of runs that shared the machine with others.)
    """
    matchings = {method: Matching(image_config(method, 0, profile)) for method in METHODS}
    steppers = [(method, matching, matching.optimizer(), []) for method, matching in matchings.items()]
    for step in range(n_steps + 1):  # filters and tables are made in the first
        for _, matching, optimizer, times in steppers:
            start_s = time.process_time()
            matching.update(optimizer, step)
            times.append(1000 * (time.process_time() - start_s))
    return {method: median(times[1:]) for method, _, _, times in steppers}


def results_table(runs: Sequence[Run], costs: dict[str, float]) -> pd.DataFrame:
    """A row per method: errors (per mille) with their 95 % half-widths over seeds (`mean_ci95`), the time of a step,
    `step_costs`, and its ratio to that of SCRAPL with P-SAGA."""
    rows = []
    for method, (label, *_) in METHODS.items():
        row = {"method": label, "seeds": len(values_of(runs, method, "theta_l1"))}
        for metric in ("theta_l1", "density_l1", "spread_l1"):
            row[metric], row[f"{metric}_ci95"] = mean_ci95(values_of(runs, method, metric))
        rows.append(row | {"step_ms": costs[method], "step_ratio": costs[method] / costs["scrapl_psaga"]})
    return pd.DataFrame(rows)


def value_at(run: Run, share: float, metric: str = "theta_l1") -> float:
    """The last test value within that share of the run's steps."""
    rows = run.history[(run.history["split"] == "test") & (run.history["metric"] == metric)]
    return float(rows.loc[rows["step"] <= share * rows["step"].max(), "value"].iloc[-1])


def paired_table(runs: Sequence[Run], costs: dict[str, float], metric: str = "theta_l1") -> pd.DataFrame:
    """`PAIRS`, and each SCRAPL against full scattering as far as that comes in the time of SCRAPL's whole training, by
    the costs of a step: mean difference (per mille), 95 % half-width, p of the paired t-test, corrected for all (Holm).
    """
    rows, full = [], sorted((run for run in runs if run.method == "scattering"), key=lambda run: run.seed)
    for a, b in PAIRS:
        found = paired_comparison(values_of(runs, a, metric), values_of(runs, b, metric))
        rows.append((f"{METHODS[b][0]} less {METHODS[a][0]}", *found))
    for b in (method for method in METHODS if method.startswith("scrapl")):
        share = min(1.0, costs[b] / costs["scattering"])
        found = paired_comparison([value_at(run, share, metric) for run in full], values_of(runs, b, metric))
        rows.append((f"{METHODS[b][0]} less {METHODS['scattering'][0]}, at equal time", *found))
    table = pd.DataFrame(rows, columns=["difference", "mean", "ci95", "paired_p"])
    return table.assign(paired_p_holm=holm(table["paired_p"]))
