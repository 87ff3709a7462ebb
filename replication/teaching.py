"""What the notebooks share for their live parts: a problem of seconds, gradients path by path, pictures, exercises.

Nothing here is recorded: the demonstrations illustrate, the runs of `jobs.ensure_runs` are the evidence.
W is the number of the encoder's weights, P the number of paths.
"""

from __future__ import annotations

import inspect
import math
import os
import reprlib
import textwrap
from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace

import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from IPython.display import Audio, Markdown, display
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from scipy.signal import resample_poly
from torch import Tensor

from scrapl_lib.importance import probabilities
from scrapl_lib.jtfs import JTFS
from scrapl_lib.losses import SCRAPLLoss

from .problem import Problem
from .tasks import OPTIMIZERS, PROFILES, RunConfig, check_name, make_config
from .trainer import Training

LEAST_PLAYED_HZ = 8000  # browsers refuse sounds of some lower rates
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito: told apart by most eyes
NOT_YET = "**Not answered yet**: put something in place of the `...`, and run the cell again."

# The quick problem made smaller once more: half a second of sound, fewer paths, small batches, a narrower encoder.
_DEMO: dict[str, float] = dict(n_samples=4096, grid_size=8, n_synth_seeds=2, J=8, J_fr=2, channels=24, dense=24)
_DEMO |= dict(batch_size=4, lr=2e-3, epochs=12)


def demo_config(profile: str, method: str, seed: int, **changes: object) -> RunConfig:
    """Config of the granular problem that the notebooks train live: toy size for "smoke", else seconds to minutes.

    `changes` replace single fields. Raises ValueError for an unknown profile, method or field.
    """
    if check_name("profile", profile, PROFILES) != "smoke":
        profile, changes = "quick", _DEMO | changes
    return make_config("granular", method, seed, profile, **changes)


def interact(function: Callable, **controls: object) -> None:
    """`ipywidgets.interact` where a person can move the sliders; nothing where the project's runner executes it: the
    messages that widgets exchange with papermill's client were seen to leave both sides waiting for ever."""
    if "SCRAPL_STATIC" not in os.environ:
        ipywidgets.interact(function, **controls)


def show_source(*objects: object) -> Markdown:
    """The sources of functions or classes, docstrings included, as one block of code to read beside the mathematics."""
    sources = [textwrap.dedent(inspect.getsource(shown)) for shown in objects]
    return Markdown("````python\n" + "\n\n".join(sources) + "````")


# ---- exercises ------------------------------------------------------------------------------------------------------


def check(answer: object, expected: object, *arguments: object, tol: float = 1e-6, hint: str = "") -> Markdown:
    """Say whether a reader's answer is right, in words; never raise, whatever the answer is.

    An exercise is a code cell tagged ``exercise``: the reader's part, with ``...`` left in it, and last a call of this.
    The markdown cell after it holds a solution, a fenced block of Python within ``<details>``.

    answer: a value, or a function, which is called with `arguments`; unanswered while it is, or returns, `...`.
    expected: number, or array or tensor of numbers. tol: largest difference, as a fraction of the largest magnitude
    expected. hint: shown with a wrong answer.
    """

    def said(values: Tensor) -> str:
        return f"numbers of shape {tuple(values.shape)}" if values.ndim else "one number"

    expected = torch.as_tensor(expected, dtype=torch.float64).detach()
    got = f"expected {said(expected)}, got "
    try:
        given = answer(*arguments) if callable(answer) else answer
        if given is ...:
            return Markdown(NOT_YET)
    except (Exception, SystemExit) as error:  # a reader's code may do anything
        return Markdown(f"**Not yet**: your function raised {type(error).__name__}: {error}. {hint}")
    try:
        numbers = torch.as_tensor(given, dtype=torch.float64).detach().cpu()
    except Exception:  # no numbers, too large ones, none at all (device meta)
        return Markdown(f"**Not yet**: {got}{reprlib.repr(given)}. {hint}")
    if numbers.shape != expected.shape:
        return Markdown(f"**Not yet**: {got}{said(numbers)}. {hint}")
    if (numbers - expected).abs().max() <= tol * expected.abs().max():
        return Markdown("**Right.**")
    wrong = "the shape is right, the numbers are not" if numbers.ndim else f"got {numbers.item():.4g}"
    return Markdown(f"**Not yet**: {wrong}. {hint}")


# ---- losses and gradients, path by path -----------------------------------------------------------------------------


def path_losses(loss: SCRAPLLoss, x_hat: Tensor, x: Tensor) -> Tensor:
    """Every path's loss of every pair at once: audio (batch, 1, samples) twice -> (P, batch).

    Row i averaged over the batch is loss(x_hat, x, path_idx=i), by another route: all paths share what they have in
    common. Differentiable in x_hat.
    """
    jtfs = loss.jtfs
    with torch.no_grad():
        bands = jtfs.first_order_and_bands(x)[1]
    rows = []
    for n2, band_hat in jtfs.first_order_and_bands(x_hat)[1].items():
        both = (jtfs.coefficients(Y2, jtfs.paths_of(n2)) for Y2 in (band_hat, bands[n2]))
        rows += [torch.linalg.vector_norm((S_hat - S).flatten(1), dim=1) for S_hat, S in zip(*both)]
    return torch.stack(rows)


def reconstruct(problem: Problem, items: Tensor, seeds: Tensor) -> Tensor:
    """What encoder and synthesizer make of the data set's `items`, with synthesizer `seeds`: (batch, 1, samples)."""
    return problem.synth(problem.encoder(problem.features[items]), seeds)


def path_slopes(
    loss: SCRAPLLoss, synthesize: Callable[[Tensor], Tensor], theta: Tensor, x: Tensor, step: float = 1e-6
) -> Tensor:
    """Derivative of every path's loss of every pair in the pair's own parameters: (P, batch, U), in float64.

    Central differences along the derivatives of the audio: 2 U times all paths' losses, no backward pass per path.
    synthesize: theta (batch, U) -> audio, each item by itself. x: the references.
    """
    theta, x, slopes = theta.detach().double(), x.double(), []
    with torch.no_grad():
        for along in torch.eye(theta.shape[1], dtype=torch.float64):
            x_hat, moves = torch.func.jvp(synthesize, (theta,), (along.expand_as(theta),))
            after, before = (path_losses(loss, x_hat + sign * step * moves, x) for sign in (1, -1))
            slopes.append((after - before) / (2 * step))
    return torch.stack(slopes, dim=-1)


def path_gradients(problem: Problem, items: Tensor, seeds: Tensor) -> Tensor:
    """Gradient of every path's loss for one batch in the encoder's weights, one backward pass per path: (P, W)."""
    weights, rows = list(problem.encoder.parameters()), []
    x_hat = reconstruct(problem, items, seeds)
    for path in range(problem.loss.n_paths):
        value = problem.loss(x_hat, problem.x[items], path_idx=path)
        rows.append(_flat(torch.autograd.grad(value, weights, retain_graph=True)))
    return torch.stack(rows)


def full_gradient(problem: Problem, items: Tensor, seeds: Tensor) -> Tensor:
    """Gradient of the mean of all paths' losses for the same batch, in a single backward pass: (W,)."""
    values = path_losses(problem.loss, reconstruct(problem, items, seeds), problem.x[items])
    return _flat(torch.autograd.grad(values.mean(), list(problem.encoder.parameters())))


# ---- optimizers watched ---------------------------------------------------------------------------------------------


def updates_at_rest(
    optimizer: str, gradients: Tensor, n_steps: int, seed: int, probs: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The steps an optimizer would take if its weights stood still: what the draws of paths and batches alone do to it.

    At every step a path and a batch are drawn and the optimizer (learning rate 1, no weight decay) is given that
    gradient, wherever it went before.

    Args:
        optimizer: of `OPTIMIZERS`. gradients: (batches, P, W), scaled (see `RunConfig.gradient_scale`).
        probs: of the paths, (P,) float64; None: uniform. Batches are drawn uniformly.
    Returns:
        updates (n_steps, W), to be subtracted from the weights; the paths drawn (n_steps,).
    """
    n_batches, n_paths, n_weights = gradients.shape
    rng = np.random.default_rng(seed)
    paths = rng.integers(n_paths, size=n_steps) if probs is None else rng.choice(n_paths, n_steps, p=probs.numpy())
    batches = rng.integers(n_batches, size=n_steps)
    drawn = SimpleNamespace(n_paths=n_paths, path_idx=None)
    w = torch.zeros(n_weights, dtype=torch.float64, requires_grad=True)
    rule = OPTIMIZERS[optimizer]([w], *([] if optimizer == "adamw" else [drawn]), lr=1.0, weight_decay=0.0)
    updates = torch.empty(n_steps, n_weights)
    for step, (path, batch) in enumerate(zip(paths.tolist(), batches.tolist())):
        drawn.path_idx, before = path, w.detach().clone()
        w.grad = gradients[batch, path].double()
        rule.step()
        updates[step] = before - w.detach()
    return updates, torch.from_numpy(paths)


def watch(training: Training) -> tuple[pd.DataFrame, Tensor]:
    """Train to the end and keep what the optimizer did.

    Returns one row per step: step, path (drawn; -1 without paths), and root mean squares over all weights of the
    gradient, of the first moment and of the root of the second (both bias-corrected; with P-Adam and P-SAGA the drawn
    path's); and the weights before the first and after every step, (steps + 1, W).
    """
    rows, weights = [], [_flat(training.encoder.parameters())]
    b1, b2 = training.config.beta1, training.config.beta2

    for k in training.steps():
        parameters = list(training.encoder.parameters())
        states = [training.optimizer.state[w] for w in parameters]
        if "tau" in states[0]:  # the loss's own path_idx may be a validation's by now
            path, age = max(states[0]["tau"], key=states[0]["tau"].get), k / training.loss.n_paths
            moments = [state["table"][path][:2] for state in states]
        else:
            path, age, moments = -1, k, [(state["exp_avg"], state["exp_avg_sq"]) for state in states]
        m, v = (_flat(tensors) for tensors in zip(*moments))
        root_v = float((v.mean() / (1 - b2**age)).sqrt())
        rows.append((k, path, _rms(_flat(w.grad for w in parameters)), _rms(m) / (1 - b1**age), root_v))
        weights.append(_flat(parameters))
    columns = ["step", "path", "gradient_rms", "m_rms", "sqrt_v_rms"]
    return pd.DataFrame(rows, columns=columns), torch.stack(weights)


def noise_to_signal(updates: Tensor) -> float:
    """Variance of updates (n, W), summed over weights, over the squared length of their mean; about n at most."""
    return float(updates.var(dim=0).sum() / updates.mean(dim=0).square().sum())


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


# ---- theta-importance sampling --------------------------------------------------------------------------------------


class AdaptiveProbs:
    """Re-estimates `loss.probs` while training, from gradients that the backward pass computes anyway.

    Not in the paper, which names it as an open end. Instead of the curvature C, equation 10 gets the running mean of
    sum_n |s_{n,u}| over the draws of path p: paths are drawn as often as they pull at theta at present. Paths not drawn
    yet count as the mean of the others. The loss that is minimized is then a mean weighted by changing `probs`, unless
    the loss is `unbiased`: its weights are taken out here.

        theta_hat = encoder(x); theta_hat.retain_grad()
        loss(synth(theta_hat), x).backward(); optimizer.step(); adaptive.update(theta_hat.grad)

    n_params: U. decay: of the running mean at each draw of a path; its first 1 / (1 - decay) draws count alike.
    floor: see `probabilities`; above 0, so that every path keeps a chance and an unbiased weight is at most 1 / floor.
    """

    def __init__(self, loss: SCRAPLLoss, n_params: int, decay: float = 0.9, floor: float = 0.1) -> None:
        self.loss, self.decay, self.floor = loss, decay, floor
        self.mean = torch.zeros(n_params, loss.n_paths, dtype=torch.float64)
        self.count = torch.zeros(loss.n_paths, dtype=torch.int64)

    def update(self, theta_grad: Tensor) -> None:
        """Take in d loss / d theta_hat (batch, U) of the loss's last call, times any constant (such as gradient_scale).

        Raises: FloatingPointError for a gradient that is not finite.
        """
        p = self.loss.path_idx
        size = theta_grad.detach().abs().sum(dim=0).double().cpu() / self.loss.weight
        if not torch.isfinite(size).all():
            raise FloatingPointError(f"path {p}: the gradient of theta_hat is not finite")
        self.count[p] += 1
        self.mean[:, p] += (size - self.mean[:, p]) * max(1 / int(self.count[p]), 1 - self.decay)
        drawn = self.count > 0
        filled = torch.where(drawn, self.mean, self.mean[:, drawn].mean(dim=1, keepdim=True))
        if filled.any():
            self.loss.probs = probabilities(filled, self.floor)


# ---- pictures -------------------------------------------------------------------------------------------------------


def draw_spectrogram(ax: Axes, x: Tensor, sample_rate_hz: float, window: int = 512) -> None:
    """Spectrogram of x (any shape with one signal in it): decibels below its loudest point, octaves upwards."""
    x = x.detach().flatten().float()
    X = torch.stft(x, window, window // 8, window=torch.hann_window(window), return_complex=True).abs()
    level_db = 20 * torch.log10(X / X.max() + 1e-4)
    t_s = np.arange(X.shape[1]) * (window // 8) / sample_rate_hz
    f_hz = np.arange(1, X.shape[0]) * sample_rate_hz / window
    ax.pcolormesh(t_s, f_hz, level_db[1:].numpy(), vmin=-60, vmax=0, cmap="magma", shading="nearest", rasterized=True)
    ax.set(yscale="log", xlabel="time (s)", ylabel="frequency (Hz)", ylim=(max(100, f_hz[0]), sample_rate_hz / 2))
    ax.set_yticks([f for f in (125, 250, 500, 1000, 2000, 4000) if ax.get_ylim()[0] <= f <= sample_rate_hz / 2])
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.minorticks_off()


def show_sound(x: Tensor, jtfs: JTFS, sample_rate_hz: float, title: str = "", window: int = 512) -> None:
    """Spectrogram of x (any shape with one signal in it), the energy of its paths of the JTFS, and a player."""
    energy = jtfs(x.detach().view(1, 1, -1))[0, jtfs.first_order_paths :].square().sum(dim=(1, 2)).numpy()
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.3), layout="constrained")
    draw_spectrogram(axes[0], x, sample_rate_hz, window)
    energy_db = 10 * np.log10(energy / energy.max() + 1e-12)
    dots = draw_paths(axes[1], jtfs, energy_db, sample_rate_hz, vmin=-40, vmax=0, s=50)
    figure.colorbar(dots, label="energy of the path (dB)")
    figure.suptitle(title, fontsize=10)
    plt.show()
    finer = math.ceil(LEAST_PLAYED_HZ / sample_rate_hz)
    display(Audio(resample_poly(x.detach().flatten().numpy(), finer, 1), rate=finer * int(sample_rate_hz)))


def draw_landscape(ax: Axes, first: np.ndarray, second: np.ndarray, loss: np.ndarray, truth: Sequence[float]) -> float:
    """Contours of a loss over two knobs, loss[i, j] at (first[i], second[j]), arrows downhill and a star at the truth.

    Returns the share of the grid points away from the true second knob at which downhill moves it towards the truth.
    """
    loss = loss / loss.mean()
    downhill = [-slope for slope in np.gradient(loss, first, second)]
    ax.contourf(first, second, loss.T, 16, cmap="cividis")
    ax.quiver(first, second, *(slope.T for slope in downhill), color="white", width=0.006)
    ax.plot(*truth, "*", color=COLOURS[1], markersize=14, markeredgecolor="white")
    to_truth = np.broadcast_to(truth[1] - second, loss.shape)
    away = np.abs(to_truth) > (second[1] - second[0]) / 2
    return float((downhill[1] * to_truth > 0)[away].mean())


def draw_paths(
    ax: Axes, jtfs: JTFS, values: np.ndarray, sample_rate_hz: float, cmap: str = "cividis", **options: object
) -> PathCollection:
    """Every path as a dot at (rate in Hz, spin x scale in cycles per octave), coloured by `values` (P,).

    Returns the dots, for a colour bar. Low-pass paths (spin 0) lie on the middle line.
    """
    rate_hz = [path.rate * sample_rate_hz for path in jtfs.paths]
    scale = [path.spin * path.scale for path in jtfs.paths]
    dots = ax.scatter(rate_hz, scale, c=values, cmap=cmap, edgecolors="0.4", **({"s": 70, "linewidths": 0.5} | options))
    scales = sorted({path.scale for path in jtfs.paths if path.spin})
    ax.set_xscale("log", base=2)
    ax.set_yscale("symlog", base=2, linthresh=scales[0], linscale=1)
    labelled = scales[:: -(-len(scales) // 4)]
    ax.set_yticks([-s for s in labelled] + [0.0] + labelled)
    ax.set(xlabel="rate (Hz)", ylabel="spin × scale (cycles per octave)", ylim=(-1.4 * scales[-1], 1.4 * scales[-1]))
    for axis, format in ((ax.xaxis, "{:.3g}"), (ax.yaxis, "{:+.2g}")):
        axis.set_major_formatter(lambda value, _, format=format: format.format(value))
    ax.minorticks_off()
    return dots
