"""Ours against scrapl-loss 0.1.0 on this machine: `make bench`.

    single_path  one path of each second-order wavelet n2, forward and backward, batch 4
    jtfs         full JTFS loss, forward and backward, batch 4, and the peak memory of each process
    update       P-Adam and P-SAGA on 604,106 weights, once all 315 paths have been drawn
    step         a whole training step, batch 32: constant-Q transform, encoder, synthesizer, loss, backward, update

Granular configuration; the audio is noise of unit norm, in `step` granular textures. Each side runs in an interpreter
of its own (the authors' package cannot live beside kymatio) and they take turns call by call, so that whatever else the
machine does falls on both; while one works the other waits for its next line. Ratios are taken pair by pair, then their
median. A part writes results/bench/<part>.csv (every pair) and .json (settings, provenance); the table printed last is
made from whatever parts are there, and is results/bench/summary.csv and .md.
"""

import argparse
import json
import logging
import os
import resource
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
CONFIG = {"shape": 32768, "J": 12, "Q1": 8, "Q2": 2, "J_fr": 3, "Q_fr": 2}
SCALE = 1e8  # of the loss, before backward: see scrapl_lib.optim
SIDES = ("ours", "scrapl_loss")
BATCH = {"single_path": 4, "jtfs": 4, "update": 1, "step": 32}
REPETITIONS = {"single_path": 7, "jtfs": 2, "update": 40, "step": 1}
FILL = {"update": 315}  # paths drawn before timing starts; in step each path's first call, which is not timed, draws it
VALUES = {  # what both sides compute, to see that they do the same work; the authors' P-SAGA is not quite the paper's
    "update": "lengths of updates",
    "step": "losses, after updates that differ in details,",
}
OFFICIAL_JTFS_GIB = 20  # what the official full JTFS takes with a batch of 4


# ---- one side, in its own interpreter -------------------------------------------------------------------------------


def noise(batch: int, seed: int) -> torch.Tensor:
    x = torch.randn(batch, 1, CONFIG["shape"], generator=torch.Generator().manual_seed(seed))
    return x / x.norm(dim=-1, keepdim=True)


def scrapl_loss(side: str, **options: object) -> torch.nn.Module:
    if side == "ours":
        from scrapl_lib.losses import SCRAPLLoss

        return SCRAPLLoss(**CONFIG)
    from scrapl import SCRAPLLoss

    logging.disable()
    return SCRAPLLoss(**CONFIG, **options)


def value_after_backward(value: torch.Tensor) -> Callable[[], float]:
    value.backward()
    return value.item


def single_path(side: str, batch: int, fill: int) -> Callable:
    loss = scrapl_loss(side, grad_mult=1.0, use_p_adam=False, use_p_saga=False)
    x_hat, x = noise(batch, 1).requires_grad_(), noise(batch, 2)

    def prepare(path: int, repetition: int) -> Callable:
        x_hat.grad = None
        return lambda: value_after_backward(loss(x_hat, x, path_idx=path))

    return prepare


def jtfs(side: str, batch: int, fill: int) -> Callable:
    x_hat, x = noise(batch, 1).requires_grad_(), noise(batch, 2)
    if side == "ours":
        from scrapl_lib.losses import JTFSLoss

        loss = JTFSLoss(**CONFIG)
    else:
        transform = scrapl_loss(side, grad_mult=1.0, use_p_adam=False, use_p_saga=False).jtfs

        def loss(x_hat: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.vector_norm(transform(x_hat) - transform(x), dim=(-2, -1)).mean()

    def prepare(path: int, repetition: int) -> Callable:
        """Before: one item, untimed. The other side's gigabytes have driven this one's libraries out of memory."""
        value_after_backward(loss(x_hat[:1], x[:1]))
        x_hat.grad = None
        return lambda: value_after_backward(loss(x_hat, x))

    return prepare


def encoder_and_synth() -> tuple[torch.nn.Module, Callable]:
    """The same on both sides: neither needs kymatio, of which the authors' package has a version of its own."""
    from replication.encoder import Encoder
    from scrapl_lib.synths import GranularSynth

    torch.manual_seed(0)
    return Encoder(), GranularSynth()


class PathUpdate:
    """P-Adam and P-SAGA on the weights, as a user of each library runs them, each of the first `fill` paths drawn once.

    In `prepare` gradients are random numbers: there `loss` stands in for ours, which would refuse to book such.
    """

    def __init__(self, side: str, weights: list[torch.Tensor], loss: torch.nn.Module, fill: int) -> None:
        self.weights, self.loss, self.generator = weights, loss, torch.Generator().manual_seed(4)
        if side == "ours":
            from scrapl_lib.optim import PSAGA

            self.loss_scale, self.gradient_scale, self.optimizer = SCALE, 0.1, PSAGA(weights, loss, lr=1e-5)
        else:  # hooks on the weights multiply the gradients by SCALE and replace them by P-SAGA's update
            self.loss_scale, self.gradient_scale = 1.0, 0.1 / SCALE
            loss.attach_params(weights)
            self.optimizer = torch.optim.SGD(weights, lr=1e-5, weight_decay=0.01)
        for path in range(fill):
            self.prepare(path)()
            if (path + 1) % 63 == 0:
                print(f"{side}: {path + 1} of {fill} paths drawn", file=sys.stderr, flush=True)

    def prepare(self, path: int, repetition: int = 0) -> Callable:
        """A step with random gradients, which is to be timed; the loss is called first, which is not."""
        if isinstance(self.loss, torch.nn.Module):
            x = noise(1, 3)
            with torch.no_grad():
                self.loss(x, 0.5 * x, path_idx=path)
        else:
            self.loss.path_idx = path
        gradients = [self.gradient_scale * torch.randn(w.shape, generator=self.generator) for w in self.weights]
        before = [w.detach().clone() for w in self.weights]
        self.optimizer.zero_grad()

        def call() -> Callable[[], float]:
            torch.autograd.backward(self.weights, gradients)
            self.optimizer.step()
            return lambda: float(torch.cat([(w.detach() - b).flatten() for w, b in zip(self.weights, before)]).norm())

        return call


def update(side: str, batch: int, fill: int) -> Callable:
    loss = scrapl_loss(side)
    if side == "ours":
        loss = types.SimpleNamespace(n_paths=loss.n_paths, path_idx=None)
    encoder, _ = encoder_and_synth()
    return PathUpdate(side, list(encoder.parameters()), loss, fill).prepare


def step(side: str, batch: int, fill: int) -> Callable:
    loss = scrapl_loss(side)
    encoder, synth = encoder_and_synth()
    theta, seeds = torch.rand(batch, 2, generator=torch.Generator().manual_seed(5)), torch.arange(batch)
    with torch.no_grad():
        x = synth(theta, seeds)
    rule = PathUpdate(side, list(encoder.parameters()), loss, fill)

    def prepare(path: int, repetition: int) -> Callable:
        rule.optimizer.zero_grad()
        torch.manual_seed(path)  # the same dropout on both sides

        def call() -> Callable[[], float]:
            x_hat = synth(encoder(encoder.features(x)), seeds + batch)
            value = loss(x_hat, x, path_idx=path)
            (rule.loss_scale * value).backward()
            rule.optimizer.step()
            return value.item

        return call

    return prepare


PARTS = {"single_path": single_path, "jtfs": jtfs, "update": update, "step": step}


def worker(side: str, part: str, batch: int, fill: int, threads: int) -> None:
    """Reads {"path", "repetition"} line by line, answers with milliseconds, value and peak memory of the process so
    far."""
    torch.set_num_threads(threads)
    out, sys.stdout = sys.stdout, sys.stderr
    prepare = PARTS[part](side, batch, fill)
    for line in sys.stdin:
        call = prepare(**json.loads(line))
        start = time.perf_counter()
        value = call()
        ms = 1e3 * (time.perf_counter() - start)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
        print(json.dumps({"ms": ms, "value": value(), "peak_mib": peak}), file=out, flush=True)


# ---- both sides in turn ---------------------------------------------------------------------------------------------


def cases(part: str, repetitions: int) -> tuple[list, int]:
    """The paths of a part's calls, and how many calls of each path come before timing."""
    from scrapl_lib.jtfs import JTFS

    paths = JTFS(**CONFIG).paths
    n2s = list(dict.fromkeys(path.n2 for path in paths))
    by_n2 = [[path for path in paths if path.n2 == n2] for n2 in n2s]
    one_of_each = [group[7 * i % len(group)] for i, group in enumerate(by_n2)]  # another wavelet n_fr from n2 to n2
    if part == "jtfs":
        return paths[:1], 1
    if part == "update":
        drawn = torch.randint(len(paths), (repetitions,), generator=torch.Generator().manual_seed(6)).tolist()
        return [paths[i] for i in drawn], 0
    return (one_of_each, 1) if part == "single_path" else (one_of_each[::3], 1)


def measure(part: str, pythons: dict[str, str], batch: int, repetitions: int, fill: int, threads: int):
    """Every pair of a part, one row each."""
    import pandas as pd

    options = [part, str(batch), str(fill), str(threads)]
    workers = {
        side: subprocess.Popen(
            [python, __file__, "--side", side, *options],
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
            },  # this repository's packages, not installed beside the authors'
            start_new_session=True,  # the authors' progress bar asks the terminal for its width: not in the background
        )
        for side, python in pythons.items()
    }

    def ask(side: str, path: int, repetition: int) -> dict:
        try:
            print(json.dumps({"path": path, "repetition": repetition}), file=workers[side].stdin, flush=True)
            return json.loads(workers[side].stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError) as error:
            status = workers[side].wait()
            raise RuntimeError(
                f"{side} ended with status {status} at path {path}, its words are above (-9: out of memory; a module "
                "that is missing: remove .venv-peers and run `make peers`)"
            ) from error

    rows = []
    try:
        paths, n_warm = cases(part, repetitions)
        for path in paths:
            for repetition in range(-n_warm, 1 if part == "update" else repetitions):
                answers = {
                    side: ask(side, path.index, repetition) for side in (SIDES if len(rows) % 2 else SIDES[::-1])
                }
                row = {"path_idx": path.index, "n2": path.n2, "n_fr": path.n_fr, "repetition": repetition}
                row |= {f"{side}_{key}": answers[side][key] for key in ("ms", "value", "peak_mib") for side in SIDES}
                row["times_faster"] = row["scrapl_loss_ms"] / row["ours_ms"]
                if repetition >= 0:
                    rows.append(row)
                    print(
                        "{part}: path {path_idx:3d} (n2 {n2:2d}, n_fr {n_fr:2d}): {ours_ms:9.1f} ms ours, "
                        "{scrapl_loss_ms:9.1f} ms scrapl-loss, {times_faster:6.2f} times faster".format_map(
                            {"part": part} | row
                        ),
                        flush=True,
                    )
    finally:
        for process in workers.values():
            process.stdin.close()
        for process in workers.values():
            process.wait()
    return pd.DataFrame(rows)


def summary(folder: Path):
    """The table of ratios, from the parts that are in `folder`; a part that is not reads "not run"."""
    import pandas as pd

    parts = {part: pd.read_csv(folder / f"{part}.csv") for part in PARTS if (folder / f"{part}.csv").exists()}
    wanted = [  # part, label, unit, rows taken, at least, aim
        ("single_path", "single path, median over paths", "ms", None, "4x", "5x"),
        ("single_path", "the three lowest n2, the slowest official paths", "ms", 3, "10x", "15x"),
        ("jtfs", "full JTFS loss, forward and backward", "ms", None, "35x", "75x"),
        ("jtfs", "the same, peak memory of the process", "MiB", None, "ours 954", "ours 763"),
        ("update", "P-Adam and P-SAGA update, P = 315", "ms", None, "8x", "30x"),
        ("step", "whole training step, batch 32", "ms", None, "2x", "3x"),
    ]
    rows = []
    for part, label, unit, lowest, at_least, aim in wanted:
        row = {"what": label, "unit": unit, "at_least": at_least, "aim": aim, "n_paths": 0, "n_pairs": 0, "note": ""}
        rows.append(row)
        if part not in parts:
            row["note"] = "not run: make bench"
            continue
        pairs = parts[part]
        if lowest:
            pairs = pairs[pairs["n2"].isin(sorted(pairs["n2"].unique())[:lowest])]
        if unit == "MiB":
            pairs = pairs.tail(1).assign(**{f"{side}_ms": pairs[f"{side}_peak_mib"].max() for side in SIDES})
            pairs["times_faster"] = pairs["scrapl_loss_ms"] / pairs["ours_ms"]
        row |= {"n_paths": pairs["path_idx"].nunique(), "n_pairs": len(pairs)}
        # over repetitions first, so that each path counts once
        medians = pairs.groupby("path_idx").median() if part in ("single_path", "step") else pairs
        for name, column in {"ours": "ours_ms", "scrapl_loss": "scrapl_loss_ms", "times": "times_faster"}.items():
            low, middle, high = medians[column].quantile([0.25, 0.5, 0.75])
            row |= {name: middle, f"{name}_q25": low, f"{name}_q75": high}
    columns = [
        "what",
        "unit",
        *(f"{name}{end}" for name in ("ours", "scrapl_loss", "times") for end in ("", "_q25", "_q75")),
        "at_least",
        "aim",
        "n_paths",
        "n_pairs",
        "note",
    ]
    return pd.DataFrame(rows).reindex(columns=columns)


def as_text(table) -> str:
    """The summary as Markdown."""
    from replication.tables import number

    lines = [
        "| | unit | ours | scrapl-loss | ratio | at least | aim | paths | pairs |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in table.to_dict("records"):
        cells = [
            f"{number(row[n])} ({number(row[n + '_q25'])} to {number(row[n + '_q75'])})"
            for n in ("ours", "scrapl_loss", "times")
        ]
        cells = cells if not row["note"] else [row["note"], "", ""]
        lines.append(
            "| "
            + " | ".join(
                [
                    row["what"],
                    row["unit"],
                    *cells,
                    row["at_least"],
                    row["aim"],
                    str(row["n_paths"]),
                    str(row["n_pairs"]),
                ]
            )
            + " |"
        )
    return "\n".join([*lines, "", "Medians (quartiles); ratios are taken pair by pair."]) + "\n"


def available_gib() -> float:
    """Memory that a new process may take; infinite where the system does not tell."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) / 2**20
    except (OSError, KeyError):
        return float("inf")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="these parts")
    parser.add_argument(
        "--repetitions", type=int, help=f"timed calls of each path, in update of all; else {REPETITIONS}"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, help=f"else {BATCH}")
    parser.add_argument("--fill", type=int, help=f"paths drawn before update or step are timed; else {FILL}")
    parser.add_argument("--peers", default=str(ROOT / ".venv-peers/bin/python"), help="an interpreter with scrapl-loss")
    parser.add_argument("--output", type=Path, default=ROOT)
    parser.add_argument("--side", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        side, part, *numbers = args.side
        return worker(side, part, *map(int, numbers))
    packages = "('scrapl-loss', 'torch', 'scipy')"
    ask = f"from importlib.metadata import version; print(*(f'{{name}} {{version(name)}}' for name in {packages}))"
    try:
        peers = subprocess.run([args.peers, "-c", ask], check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"{args.peers} is no interpreter with scrapl-loss: run `make peers` first") from error
    from replication.files import write_csv, write_text_atomic
    from replication.records import provenance, utc_now

    folder, failed = args.output / "results/bench", []
    for part in args.only:
        if part == "jtfs" and available_gib() < OFFICIAL_JTFS_GIB:
            failed.append(f"jtfs: needs {OFFICIAL_JTFS_GIB} GiB of memory, {available_gib():.1f} are available")
            continue
        settings = {
            "batch": args.batch or BATCH[part],
            "repetitions": args.repetitions or REPETITIONS[part],
            "fill": FILL.get(part, 0) if args.fill is None else args.fill,
            "threads": args.threads,
        }
        try:
            table = measure(part, {"ours": sys.executable, "scrapl_loss": args.peers}, **settings)
        except RuntimeError as error:
            failed.append(f"{part}: {error}")
            continue
        about = {
            key: value for key, value in provenance("cpu").items() if key != "peak_memory_mb"
        }  # this process only waits
        about |= {"part": part, "settings": settings, "config": CONFIG, "peers": peers, "end_utc": utc_now()}
        write_csv(folder / f"{part}.csv", table)
        write_text_atomic(folder / f"{part}.json", json.dumps(about, indent=1, sort_keys=True, allow_nan=False) + "\n")
        apart = (table["ours_value"] / table["scrapl_loss_value"] - 1).abs().max()
        print(f"{part}: {VALUES.get(part, 'losses')} agree within {apart:.1e} relative")
    table = summary(folder)
    write_csv(folder / "summary.csv", table)
    write_text_atomic(folder / "summary.md", as_text(table))
    print(as_text(table), f"written: {folder}", sep="\n")
    if failed:
        raise SystemExit("not measured: " + "; ".join(failed))


if __name__ == "__main__":
    main()
