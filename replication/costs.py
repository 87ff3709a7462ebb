"""What the losses cost on this machine, for notebook 08_cost: Table 5 of the paper, how cost grows; a GPU, estimated.

Time: forward and backward with respect to the reconstruction, by torch.utils.benchmark. Memory: the most that tensors
took at once during such a call beyond what was there before it (inputs, filters), by the allocators' own count. Audio
is noise of unit norm.
"""

import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler reports its own starts and stops

import numpy as np
import pandas as pd
import torch
from scipy.stats import linregress
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import flop_registry

from scrapl_lib.losses import JTFSLoss, SCRAPLLoss, p_loss

from .baselines import MIN_SAMPLES, MSS_NAMES, MSSLoss
from .published import published
from .tasks import METHODS, NOT_RUN, TASKS, RunConfig, grid

MSS, MEASURED = MSS_NAMES, ("p_loss", "jtfs", "scrapl", *MSS_NAMES)
AXES = {"n_samples": "signal length (samples)", "batch": "batch", "n_paths": "number of paths P"}
H200 = {"flop_per_s": 67e12, "byte_per_s": 4.8e12}  # NVIDIA's data sheet: float32 without tensor cores; memory
# assumed, for the slow and the fast end of an estimate: share of these figures, seconds from kernel to kernel
UTILISATION, KERNEL_S = (0.1, 0.5), (10e-6, 4e-6)
COLUMNS = "method loss n ms iqr_ms mib times_mss paper_ms paper_iqr_ms paper_mb paper_times_mss note".split()


def noise(batch: int, n_samples: int, seed: int, device: str) -> torch.Tensor:
    """Seeded noise of unit norm, (batch, 1, n_samples)."""
    x = torch.randn(batch, 1, n_samples, generator=torch.Generator().manual_seed(seed))
    return (x / x.norm(dim=-1, keepdim=True)).to(device)


def calls(method: str, transform: dict[str, int], batch: int, device: str) -> tuple[Callable, Sequence]:
    """call(argument), one forward and backward of a loss (of `MEASURED`), and the arguments there are: SCRAPL's paths,
    else only None. transform: arguments of JTFSLoss."""
    x_hat, x = (noise(batch, transform["shape"], seed, device) for seed in (1, 2))
    if method == "p_loss":
        x_hat, x, loss = torch.rand(batch, 2, device=device), torch.rand(batch, 2, device=device), p_loss
    elif method in MSS:
        loss = MSSLoss(method).to(device)
    else:
        loss = (SCRAPLLoss if method == "scrapl" else JTFSLoss)(**transform)
    x_hat.requires_grad_()

    def call(path: int | None = None) -> None:
        (loss(x_hat, x) if path is None else loss(x_hat, x, path_idx=path)).backward()
        x_hat.grad = None

    return call, range(loss.n_paths) if method == "scrapl" else [None]


def model_call(config: RunConfig, batch: int, device: str) -> Callable:
    """call(None), forward and backward of encoder and synthesizer: what a training step costs beside its loss."""
    encoder, synth, seeds = config.encoder().to(device), config.synth(), torch.arange(batch)
    features = encoder.features(noise(batch, config.n_samples, 1, device))
    grad = noise(batch, config.n_samples, 2, device)
    return lambda _: synth(encoder(features), seeds).backward(grad)


def times_ms(call: Callable, arguments: Sequence, least_s: float) -> np.ndarray:
    """Milliseconds of call(argument), once for each, after two calls that are not timed; if there is one, for `least_s`
    seconds, and three times at least: one call during which the machine did something else is no median."""
    timers = [Timer("call(a)", globals={"call": call, "a": a}, num_threads=torch.get_num_threads()) for a in arguments]
    if len(timers) > 1:
        return 1e3 * np.array([timer.timeit(1).median for timer in timers])
    times: list[float] = []
    while len(times) < 3:
        times += timers[0].blocked_autorange(min_run_time=least_s).times
    return 1e3 * np.array(times)


def peak_mib(call: Callable, arguments: Iterable, device: str) -> float:
    """Most memory that tensors took at once, over one call for each argument, beyond what they took before; MiB. Call
    it once before: what it makes at its first call (filters) would count."""
    peaks = [0.0]
    for argument in arguments:
        if device == "cpu":
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
                call(argument)
            changes = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
            sizes = np.cumsum([event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns())])
            peaks.append(sizes.max(initial=0))
        else:
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            call(argument)
            torch.cuda.synchronize(device)
            peaks.append(torch.cuda.max_memory_allocated(device) - before)
    return max(peaks) / 2**20


def spread(values: Sequence, n: int) -> list:
    """At most n of the values, evenly spaced."""
    return [values[i] for i in np.linspace(0, len(values) - 1, min(n, len(values))).round().astype(int)]


def _quartiles(ms: Sequence) -> dict[str, float]:
    low, middle, high = np.quantile(ms, [0.25, 0.5, 0.75])
    return {"n": len(ms), "ms": middle, "iqr_ms": high - low if len(ms) > 1 else math.nan}


def cost(call: Callable, arguments: Sequence, device: str, least_s: float, n_memory: int) -> dict[str, float]:
    """n, ms (median), iqr_ms (NaN if measured once) over the arguments, and mib over `n_memory` of them."""
    times = _quartiles(times_ms(call, arguments, least_s))
    return times | {"mib": peak_mib(call, spread(arguments, n_memory), device)}


def table_5(config: RunConfig, batch: int, device: str, n_paths: int, least_s: float, bench: Path) -> pd.DataFrame:
    """Table 5: time and memory of every loss, and of encoder and synthesizer, beside the paper's.

    n_paths: SCRAPL is measured on so many of its paths, evenly spaced; its memory on a quarter of them. least_s:
    seconds spent on each other loss. bench: the folder `make bench` writes, which has the rows of the authors' package,
    at the granular configuration. n counts paths or runs, times_mss is over the mean of the four MSS. The paper's
    memory is that of the whole process: P-loss stands for what all have in common.
    """
    rows = []
    for method in (name for name in METHODS if name in MEASURED or name in NOT_RUN):
        printed = (published("table_5", method, metric).value for metric in ("median_time", "iqr", "max_memory"))
        row = {"method": method, "loss": METHODS[method].label, "n": 0, "note": ""}
        row |= zip(("paper_ms", "paper_iqr_ms", "paper_mb"), printed)
        if method in NOT_RUN:
            rows.append(row | {"note": f"not run: {NOT_RUN[method]}"})
        else:
            call, arguments = calls(method, config.transform(), batch, device)
            rows.append(row | cost(call, spread(arguments, n_paths), device, least_s, max(1, n_paths // 4)))
    row = {"method": "model", "loss": "encoder and synthesizer", "note": "not part of Table 5"}
    row["paper_ms"] = published("figure_1", "encoder_and_synth", "model_step_time").value
    rows.append(row | cost(model_call(config, batch, device), [None], device, least_s, 1))
    for method, part in {"scrapl": "single_path", "jtfs": "jtfs"}.items():
        label = f"{METHODS[method].label}, scrapl-loss 0.1.0"
        rows.append({"method": f"{method}_official", "loss": label, "n": 0, "note": "not run: make bench"})
        if (bench / f"{part}.csv").exists():
            pairs = pd.read_csv(bench / f"{part}.csv")
            per_path = pairs.groupby("path_idx").median()
            times = f"{per_path['times_faster'].median():.3g} times ours there"
            note = "granular configuration, batch 4, on the CPU, memory of the process, by make bench"
            rows[-1] |= _quartiles((per_path if method == "scrapl" else pairs)["scrapl_loss_ms"])
            rows[-1] |= {"mib": pairs["scrapl_loss_peak_mib"].max(), "note": f"{note}; {times}"}
    table = pd.DataFrame(rows)
    mss, official = table[table["method"].isin(MSS)], table["method"].str.endswith("_official")
    table["times_mss"] = (table["ms"] / mss["ms"].mean()).mask(official)
    table["paper_times_mss"] = table["paper_ms"] / mss["paper_ms"].mean()
    return table[COLUMNS]


def growth(
    config: RunConfig, batch: int, device: str, points: int, n_paths: int, least_s: float, methods: Sequence[str]
) -> pd.DataFrame:
    """Time and memory as signal length, batch and P grow (`AXES`), the rest fixed; P with Q2 and Q_fr.

    About `points` sizes on each axis; `batch` where that is not the axis. SCRAPL: the median over `n_paths` of its
    paths.
    """
    base, rows = config.transform(), []
    lengths = [(config.n_samples << k) >> points // 2 for k in range(points)]
    qs = [(1, 1), (1, 2), (2, 2), (3, 3), (4, 4), (6, 6)][:points]
    sizes = {
        "n_samples": [(base | {"shape": n}, batch) for n in lengths if n >= max(2 ** base["J"], MIN_SAMPLES)],
        "batch": [(base, 2**k) for k in range(points)],
        "n_paths": [(base | {"Q2": q2, "Q_fr": q_fr}, batch) for q2, q_fr in qs],
    }
    for axis, cases in sizes.items():
        for transform, n in cases:
            size = {"n_samples": transform["shape"], "batch": n}.get(axis) or SCRAPLLoss(**transform).n_paths
            for method in methods:
                call, arguments = calls(method, transform, n, device)
                row = {"axis": axis, "size": size, "method": method}
                rows.append(row | cost(call, spread(arguments, n_paths), device, least_s, n_paths))
    return pd.DataFrame(rows)


def power_laws(data: pd.DataFrame) -> pd.DataFrame:
    """cost = factor * size^slope, fitted on log axes, by axis, method and quantity ("ms" or "mib")."""
    rows = []
    for (axis, method), group in data.groupby(["axis", "method"], sort=False):
        for quantity in ("ms", "mib"):
            fit = linregress(np.log(group["size"]), np.log(group[quantity]))
            rows.append((axis, method, quantity, round(fit.slope, 6) + 0.0, math.exp(fit.intercept)))
    return pd.DataFrame(rows, columns=["axis", "method", "quantity", "slope", "factor"])


def crossings(data: pd.DataFrame, one: str, others: Sequence[str]) -> pd.DataFrame:
    """The size at which the fitted times of `one` and of each other method are equal (NaN: their slopes differ by less
    than 0.1), whether it lies among those measured, and the least and largest ratio one / other that was measured."""
    rows = []
    for axis, group in data.groupby("axis", sort=False):
        ms = group.pivot(index="size", columns="method", values="ms")
        for other in others:
            ratio = ms[one] / ms[other]
            fit = linregress(np.log(ms.index), np.log(ratio))
            size = math.exp(-fit.intercept / fit.slope) if abs(fit.slope) > 0.1 else math.nan
            among = bool(ms.index.min() <= size <= ms.index.max())
            rows.append((axis, other, ratio.min(), ratio.max(), size, among))
    return pd.DataFrame(rows, columns=["axis", "other", "least_ratio", "largest_ratio", "size", "measured"])


class Count(TorchDispatchMode):
    """total: (flop, byte, kernels) of what is computed inside with tensors on "meta", which have no values and take the
    branches of a GPU.

    flop as torch.utils.flop_counter counts, times 4 for complex products; for an FFT of N numbers 5 N log2 N, half if
    one side is real; else one per number that comes out. byte: all that is read and written, as if no cache kept
    anything. kernels: operations that are neither views nor empty tensors.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = np.zeros(3)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, name, packet = func(*args, **(kwargs or {})), func.name(), func._overloadpacket
        results, inputs = ([t for t in tree_leaves(x) if isinstance(t, Tensor)] for x in (out, (args, kwargs)))
        if func.is_view or "empty" in name or all(t.device.type != "meta" for t in results + inputs):
            return out
        flop = sum(t.numel() for t in results)
        if "_fft_" in name:
            whole = out if "c2r" in name else args[0]
            n = math.prod(whole.shape[dim] for dim in args[1])
            flop = (5 if "c2c" in name else 2.5) * whole.numel() * math.log2(n)
        elif packet in flop_registry:
            flop = flop_registry[packet](*args, **(kwargs or {}), out_val=out) * (4 if inputs[0].is_complex() else 1)
        self.total += flop, sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in results + inputs), 1
        return out


def step_count(config: RunConfig, n_paths: int) -> np.ndarray:
    """(flop, byte, kernels) as `Count` counts, of a training step on a GPU: encoder, synthesizer, loss, backward,
    optimizer; the mean over `n_paths` paths, evenly spaced, if the loss draws one. What is made once is not counted."""
    encoder, synth, loss, n = config.encoder().to("meta"), config.synth(), config.make_loss(), config.batch_size
    x, theta, seeds = noise(n, config.n_samples, 1, "meta"), torch.rand(n, synth.n_params).to("meta"), torch.arange(n)
    optimizer, features = config.make_optimizer(encoder.parameters(), loss), encoder.features(x)
    options = [{"S": loss.jtfs(x)} if config.loss == "jtfs" else {}]
    if isinstance(loss, SCRAPLLoss):
        options = [{"path_idx": path} for path in [0, *spread(range(loss.n_paths), n_paths)]]
    totals = []
    for option in options:
        optimizer.zero_grad()
        with Count() as part:
            theta_hat = encoder(features)
            x_hat, target = (theta_hat, theta) if config.loss == "p_loss" else (synth(theta_hat, seeds), x)
            (config.gradient_scale * loss(x_hat, target, **option)).backward()
        with Count() as update:
            optimizer.step()
        totals.append(config.accumulate * part.total + update.total)
    return np.mean(totals[-n_paths:], axis=0)  # the first step of P-Adam and P-SAGA makes their tables


def gpu_estimate(profile: str, n_paths: int) -> pd.DataFrame:
    """An estimate, to be replaced by measurements: steps per second and hours on one H200, by kind of task and method.

    A step lasts as long as the longest of three: its operations at `UTILISATION` of the card's float32 rate, its bytes
    at the same share of the memory's, its kernels at `KERNEL_S` each, which eager PyTorch takes to start one; slow and
    fast are the ends of these assumed ranges, bound says which of the three it is at the fast one. Counts:
    `step_count`. hours: of `runs`, all tasks of the kind and seeds of the profile, one at a time, `steps` of each from
    `RunConfig.derived`; without validation, test, start-up and path probabilities.
    """
    rows, known = [], {}
    for kind in dict.fromkeys(task.kind for task in TASKS.values()):
        names = [name for name, task in TASKS.items() if task.kind == kind]
        for config in {config.method: config for config in grid(names[0], profile)}.values():
            of, derived = (kind, config.loss, config.optimizer), config.derived()
            count = known[of] = known[of] if of in known else step_count(config, n_paths)
            rates = [
                [share * H200["flop_per_s"], share * H200["byte_per_s"], 1 / s]
                for share, s in zip(UTILISATION, KERNEL_S)
            ]
            slow_s, fast_s = np.max(count / rates, axis=1)
            row = {"kind": kind, "tasks": len(names), "method": config.method, "gflop": count[0] / 1e9}
            row |= {"gb": count[1] / 1e9, "kernels": count[2]}
            row |= {"bound": ("operations", "bytes", "kernels")[np.argmax(count / rates[1])]}
            row |= {"slow_steps_per_s": 1 / slow_s, "fast_steps_per_s": 1 / fast_s, "steps": derived["n_steps"]}
            row["runs"] = len(names) * derived["n_seeds"]
            hours = row["runs"] * row["steps"] / 3600
            rows.append(row | {"slow_hours": hours * slow_s, "fast_hours": hours * fast_s})
    return pd.DataFrame(rows)
