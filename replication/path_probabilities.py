"""The path probabilities of a task (theta-importance sampling) as a record: computed in parts, resumed, read.

A call saves each path in `<output>/checkpoints/<profile>/<task>/theta_importance/seed_0/path_<p>.json` as soon as it is
done; calls that share the work, and a call after one that was killed, compute what is not there yet. Derivatives, which
come before the first path, are not saved: those of all paths at the paper's size take some ten minutes on two cores.
"""

from __future__ import annotations

import io
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from scrapl_lib.curvature import Report
from scrapl_lib.importance import Importance, curvature_by_path, probabilities, theta_importance
from scrapl_lib.losses import SCRAPLLoss

from . import records
from .checkpoints import alone, checkpoint_folder
from .data import meso_seeds
from .problem import Problem, check_device
from .tasks import RunConfig, importance_config, needs

TOL, N_ITER = 1e-3, 40  # of the curvatures: probabilities need no more; the slowest paths need more than 20

# ---- reading the record ---------------------------------------------------------------------------------------------


def _record(config: RunConfig, output: Path) -> tuple[Path, str]:
    """Where the record is that belongs to a run, and its state: done, missing or stale."""
    wanted = needs(config) or config
    folder = records.run_folder(wanted.profile, wanted.task, records.IMPORTANCE, 0, output)
    return folder, records.run_state(folder, records.config_hash(wanted.flat))


def importance_table(config: RunConfig, output: Path = records.ROOT) -> pd.DataFrame:
    """The recorded probabilities that the `scrapl` run of `config` draws its paths from, a row per path.

    Columns: path_idx, n2, n_fr, rate (cycles per sample), scale (cycles per octave), spin, curvature_<parameter>,
    probability. Raises: ValueError, with the command to give, if there are none for this configuration; BrokenRecord.
    """
    folder, state = _record(config, output)
    if state != "done":
        remedy = f"{f'delete {folder}, then ' if state == 'stale' else ''}run {records.command_for(folder)}"
        raise ValueError(f"{state} path probabilities of theta-importance sampling in {folder}: {remedy}")
    return pd.read_csv(io.BytesIO(records.read_record(folder)[1]["probabilities.csv"]))


def recorded_importance(task: str, profile: str, output: Path = records.ROOT) -> pd.DataFrame | str:
    """`importance_table` of a task for figures and tables; or, where there is none, why. Raises BrokenRecord."""
    config = importance_config(task, profile)
    _, state = _record(config, output)
    words = {"missing": "no record yet", "stale": "its record was made with another configuration"}
    return words[state] if state in words else importance_table(config, output)


def path_probabilities(config: RunConfig, output: Path = records.ROOT) -> tuple[Tensor, str]:
    """The probabilities in `importance_table`, (P,) float64, which sum to 1, and the SHA-256 of its file."""
    probs = torch.tensor(importance_table(config, output)["probability"], dtype=torch.float64)
    info, _ = records.read_record(_record(config, output)[0])
    return probs / probs.sum(), info["files"]["probabilities.csv"]["sha256"]


# ---- computing it ---------------------------------------------------------------------------------------------------


def _arguments(problem: Problem, n_batches: int) -> tuple:
    """Weights as they are, batches and synthesizer seeds of the first steps, as arguments of `theta_importance`."""
    config, encoder, synth = problem.config, problem.encoder.eval(), problem.synth
    batches = problem.data.batches("train", config.batch_size, 0, config.seed)[:n_batches]
    draws = [synth.draw(meso_seeds(config.seed, step, config.batch_size)) for step in range(1, len(batches) + 1)]
    synthesize = [lambda theta, draw=draw: synth.render(theta, *draw) for draw in draws]
    inputs, params = [problem.x[items] for items in batches], list(encoder.parameters())
    return problem.loss, lambda x: encoder(encoder.features(x)), synthesize, inputs, params


def importance_of(problem: Problem, n_batches: int, **options: object) -> Importance:
    """`theta_importance` of a problem in memory: its weights as they are, the batches and seeds of its first steps."""
    return theta_importance(*_arguments(problem, n_batches), **options)


def compute_importance(
    task: str,
    profile: str,
    output: Path = records.ROOT,
    device: str = "cpu",
    paths: Iterable[int] | None = None,
    watch: Callable[[], None] | None = None,
    **changes: object,
) -> str:
    """Compute and record the path probabilities of a task; go on where a call that was stopped was.

    The encoder has the initial weights of seed 0; batches and synthesizer seeds are those of that run's first steps.

    Args:
        paths: only these; several calls share the work, and the one that finds all parts there writes the record.
        watch: called often, instead of showing bars; may raise to stop. changes: of the config, see `make_config`.
    Returns:
        "done", or how many paths are there. Raises ValueError as `train` and `theta_importance` do, and BrokenRecord.
    """
    place, config, start_utc = check_device(device), importance_config(task, profile, **changes), records.utc_now()
    output, owner = Path(output).absolute(), records.config_hash(config.flat)
    parts, n_paths = checkpoint_folder(config, output), SCRAPLLoss(**config.transform()).n_paths
    wanted = list(range(n_paths) if paths is None else paths)
    if (wrong := sorted(set(wanted) - set(range(n_paths)))) or not wanted:
        got = ", ".join(map(str, wrong)) or "none"
        raise ValueError(f"paths must be numbers from 0 to {n_paths - 1}, got {got}")
    with alone(parts / ("all" if paths is None else f"{min(wanted)}-{max(wanted)}")):
        folder, state = _record(config, output)
        if state == "stale":
            raise ValueError(
                f"{folder} holds a record of another configuration: delete that folder to compute it again"
            )
        there = saved_curvature(config, output)
        todo = [path for path in wanted if path not in there]
        if state == "missing" and todo:
            arguments = _arguments(Problem(config, place), config.importance_examples // config.batch_size)
            report = _bars() if watch is None else lambda *_: watch()
            for path, values in curvature_by_path(*arguments, N_ITER, TOL, paths=todo, report=report):
                content = {"config_hash": owner, "curvature": values.tolist()}
                records.write_text_atomic(parts / f"path_{path}.json", json.dumps(content) + "\n")
    with alone(parts):
        if _record(config, output)[1] == "missing":
            if len(there := saved_curvature(config, output)) < n_paths:
                return f"{len(there)} of {n_paths} paths"
            curvature = torch.tensor([there[path] for path in range(n_paths)], dtype=torch.float64).T
            write_importance(folder, config, curvature, start_utc, place)
        shutil.rmtree(parts, ignore_errors=True)
    return "done"


def _bars() -> Report:
    """A report that shows a bar for each phase, with the time left there."""
    bars, interval_s = {}, 0.5 if sys.stderr.isatty() else 10

    def report(phase: str, done: int, total: int) -> None:
        bar = bars[phase] = bars.get(phase) or tqdm(total=total, desc=phase, mininterval=interval_s)
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    return report


def write_importance(folder: Path, config: RunConfig, curvature: Tensor, start_utc: str, device: torch.device) -> None:
    """Write the record that `importance_table` reads, from all paths' curvatures (U, P)."""
    table = pd.DataFrame([asdict(path) for path in SCRAPLLoss(**config.transform()).jtfs.paths])
    table = table.rename(columns={"index": "path_idx"})
    for parameter, values in zip(config.synth().parameters, curvature.tolist(), strict=True):
        table[f"curvature_{parameter.name}"] = values
    table["probability"] = probabilities(curvature).tolist()
    about = {"status": "ok", "config": config.flat, "start_utc": start_utc, "device": device}
    records.write_record(folder, {"probabilities.csv": table}, **about)


def saved_curvature(config: RunConfig, output: Path = records.ROOT) -> dict[int, list[float]]:
    """The curvatures saved before the record is written: {path: [of each parameter]}. Raises ValueError for a file that
    is broken or of another configuration."""
    found = {}
    for file in checkpoint_folder(config, output).glob("path_*.json"):
        try:
            content = json.loads(file.read_text())
            path, owner, values = int(file.stem.removeprefix("path_")), content["config_hash"], content["curvature"]
            if not (values and all(0 <= value < math.inf for value in values)):
                raise ValueError(f"curvature {values}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is no file of a path's curvature ({error}): delete it") from error
        if owner != records.config_hash(config.flat):
            raise ValueError(f"{file} holds curvature of another configuration, weights or inputs: delete it")
        found[path] = values
    return found
