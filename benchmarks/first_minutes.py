"""The first minutes on a GPU: `make gpu`, or `python benchmarks/first_minutes.py --minutes 10 --device cuda`.

In this order: doctor; the tests marked `cuda`; every loss and its gradient against float64 on the CPU; Table 5; steps
of 1, 2, 4 and 8 runs that share the device; then `run` of the profile's grid with what is left. Each part is a process
with a share of the time: one that fails, is killed or takes too long costs itself only.

<folder>, by default build/first_minutes/<profile>_<device>, small enough to carry home: of each part <part>.json (what
became of it, settings, provenance) and <part>.txt (the end of its words), written as it ends, and tables as CSV;
records.tar.gz, the records of the runs; summary.md, written anew after each part. Beside it, in <folder>_work: logs,
and records and checkpoints from which the same command goes on (up to 4.6 GB a run): parts that were ok are not done
again. `--parts` takes some parts only; the summary keeps what the folder has of the others.
"""

import argparse
import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from replication import __started_s__, costs
from replication.files import write_bytes_atomic, write_csv, write_text_atomic
from replication.jobs import STOP_S
from replication.problem import check_device
from replication.records import ROOT, provenance, utc_now
from replication.tasks import PROFILES, make_config
from scrapl_lib.losses import JTFSLoss, SCRAPLLoss

PARTS = ("doctor", "tests", "parity", "table_5", "sharing", "run")
BATCH, LOG_BYTES, LAST_LINES = 4, 20_000, 32
CLOSING_S = 10.0  # kept for ending the last part and writing what came of it
# relative errors of value and gradient, as in tests/test_losses.py and tests/test_accuracy.py; the logarithm and the
# phase of weak bins in an MSS amplify rounding (on a CPU by 1e-4 at smoke size)
TOLERANCES, MSS_TOLERANCES = (1e-5, 1e-4), (1e-5, 1e-3)
SIZES = {  # Table 5: paths, seconds for each other loss; shared device: runs at once, steps before, seconds
    "smoke": (6, 0.02, "2", 2, 0.5),
    "quick": (16, 0.2, "1 2", 10, 5.0),
    "paper": (63, 2.0, "1 2 4 8", 20, 8.0),
}


@dataclass
class Part:
    """Arguments of Python; the largest share of the whole time that it gets; not started below least_s seconds."""

    name: str
    command: list[str]  # the word MINUTES stands for the time that it gets
    share: float = 1.0
    least_s: float = 5.0


def all_parts(profile: str, device: str, folder: Path, work: Path) -> list[Part]:
    """The parts, in order."""
    *_, workers, warm, seconds = SIZES[profile]
    where, here, replication = ["--profile", profile, "--device", device], ROOT / "benchmarks", ["-m", "replication"]
    own = [f"{here}/first_minutes.py", *where, "--folder", f"{folder}", "--only"]
    throughput = [f"{here}/throughput.py", *where, "--output", f"{folder}", "--workers", *workers.split()]
    run = [*replication, "run", *where, "--output", f"{work}", "--budget-minutes", "MINUTES"]
    return [
        Part("doctor", [*replication, "doctor", "--output", f"{work}"], 0.05),
        Part("tests", ["-m", "pytest", "-m", "cuda", "-p", "no:cacheprovider"], 0.15),
        Part("parity", [*own, "parity"], 0.15),
        Part("table_5", [*own, "table_5"], 0.12),
        Part("sharing", [*throughput, "--warm", f"{warm}", "--seconds", f"{seconds}"], 0.2),
        Part("run", run, least_s=4 * STOP_S[profile]),  # `run` starts none in the last three
    ]


def value_and_gradient(loss: Callable, device: str, dtype: torch.dtype, n_samples: int, **path: int) -> tuple:
    """Of a loss between two noises: its value, and its gradient with respect to the first, as float64 on the CPU."""
    x_hat, x = (costs.noise(BATCH, n_samples, seed, device).to(dtype) for seed in (1, 2))
    np.random.seed(0)  # MSS random draws its resolutions from there
    value = loss(x_hat.requires_grad_(), x, **path)
    (gradient,) = torch.autograd.grad(value, x_hat)
    return value.detach().cpu().double(), gradient.cpu().double()


def parity(profile: str, device: str) -> pd.DataFrame:
    """Each loss in float32 on the device against float64 on the CPU, SCRAPL on a path of each n2: relative errors of
    the value and, in L2, of the gradient. TF32 is off; the bounds are those that float32 on the CPU keeps to."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    config, rows = make_config("granular", "jtfs", 0, profile), []
    scrapl = SCRAPLLoss(**config.transform())
    of_n2 = {path.n2: path.index for path in scrapl.jtfs.paths if path.n_fr % 2}  # any, but not always the first
    losses = {f"scrapl, n2 = {n2}": (scrapl, {"path_idx": index}) for n2, index in of_n2.items()}
    losses |= {"jtfs": (JTFSLoss(**config.transform()), {})}
    losses |= {name: (make_config("granular", name, 0, profile).make_loss(), {}) for name in costs.MSS}
    for name, (loss, path) in losses.items():
        found, expected = (
            value_and_gradient(loss.to(place), place, dtype, config.n_samples, **path)
            for place, dtype in ((device, torch.float32), ("cpu", torch.float64))
        )
        value, gradient = (float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))
        bounds = MSS_TOLERANCES if name in costs.MSS else TOLERANCES
        good = value < bounds[0] and gradient < bounds[1]
        rows.append({"loss": name, **path, "value_error": value, "gradient_error": gradient, "within": good})
    return pd.DataFrame(rows).astype({"path_idx": "Int64"})


def compute(part: str, profile: str, device: str, folder: Path) -> int:
    """Compute a part's table, write and print it; 1 if an error is beyond its bound."""
    n_paths, least_s, *_ = SIZES[profile]
    if part == "parity":
        table = parity(profile, device)
    else:
        config = make_config("granular", "jtfs", 0, profile)
        table = costs.table_5(config, BATCH, device, n_paths, least_s, ROOT / "results/bench")
    write_csv(folder / f"{part}.csv", table)
    shown = table if part == "parity" else table[["loss", "n", "ms", "iqr_ms", "mib", "times_mss", "paper_times_mss"]]
    print(shown.to_string(index=False, float_format="{:.3g}".format))
    return int(not table.get("within", pd.Series([True])).all())


def call(command: Sequence[str], log: Path, limit_s: float) -> str:
    """Run a command, its words into `log`, and end it after limit_s seconds. "ok", or what became of it."""
    end = "ok"
    with open(log, "wb") as file:
        streams = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT}
        child = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **streams)
        try:
            status = child.wait(limit_s)
            if status:
                end = f"FAILED: exit status {status}" if status > 0 else f"KILLED by signal {-status}"
        except subprocess.TimeoutExpired:
            end = f"STOPPED after its {limit_s:.0f} s"
        finally:
            for number in (signal.SIGINT, signal.SIGKILL) if child.poll() is None else ():  # what it started, too
                with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                    os.killpg(child.pid, number)
                    child.wait(CLOSING_S / 2)
    return end


def first_minutes(
    parts: Sequence[Part],
    folder: Path,
    work: Path,
    end_s: float,
    about: dict,
    call: Callable[[Sequence[str], Path, float], str] = call,
    clock: Callable[[], float] = time.monotonic,
) -> bool:
    """Run the parts until end_s on the clock, write what became of each as it ends, and tell whether all went well."""
    work.mkdir(parents=True, exist_ok=True)
    ends, whole_s = [], end_s - clock()
    for part in parts:
        start_s, start_utc = clock(), utc_now()
        limit_s = min(part.share * whole_s, end_s - start_s - CLOSING_S)
        log = work / f"{part.name}.log"
        minutes = f"{max(limit_s - CLOSING_S / 2, 1) / 60:.3f}"
        command = [sys.executable, *(minutes if word == "MINUTES" else word for word in part.command)]
        print(f"{part.name}: {limit_s:.0f} s at most ...", flush=True)
        ends.append("INTERRUPTED")
        try:
            if limit_s < part.least_s:
                ends[-1] = "NOT STARTED: no time left"
                log.write_text(f"{limit_s:.0f} s were left, it needs {part.least_s:g} s at least\n")
            else:
                ends[-1] = call(command, log, limit_s)
        finally:
            seconds = clock() - start_s
            print(f"{part.name}: {ends[-1]}, {seconds:.0f} s", flush=True)
            # what an earlier call found stays where this one finds no time
            if log.exists() and not (ends[-1].startswith("NOT") and (folder / f"{part.name}.json").exists()):
                write_bytes_atomic(folder / f"{part.name}.txt", log.read_bytes()[-LOG_BYTES:])
                found = {"part": part.name, "end": ends[-1], "seconds": round(seconds, 1), "start_utc": start_utc}
                found |= {"limit_s": round(limit_s, 1), "command": command, **about}
                write_text_atomic(folder / f"{part.name}.json", json.dumps(found, indent=1) + "\n")
                write_text_atomic(folder / "summary.md", summary(folder))
    return all(end == "ok" for end in ends)


def summary(folder: Path) -> str:
    """Markdown: what became of each part that the folder has, and its last words."""
    found = (json.loads(path.read_text()) for path in folder.glob("*.json"))
    found = sorted(found, key=lambda each: (*PARTS, each["part"]).index(each["part"]))
    words = {
        each["part"]: (folder / f"{each['part']}.txt").read_text("utf-8", "replace").splitlines() for each in found
    }
    lines = [f"# First minutes: profile {found[-1]['profile']} on {found[-1]['device_name']}", ""]
    lines += ["Numbers of the smoke profile mean nothing.", ""] * (found[-1]["profile"] == "smoke")
    lines += ["| part | what became of it | its last words | seconds | begun (UTC) |", "| --- " * 5 + "|"]
    for each in found:
        last = next((line.strip("= \r") for line in reversed(words[each["part"]]) if line.strip("= \r")), "")
        row = each | {"last": last[:80].replace("|", "/")}
        lines.append("| {part} | {end} | {last} | {seconds:.0f} | {start_utc} |".format_map(row))
    for each in found:
        lines += ["", f"## {each['part']}: {each['end']}", "", "```", *words[each["part"]][-LAST_LINES:], "```"]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="all parts and start-up together (default 10)")
    parser.add_argument("--profile", default="paper", choices=PROFILES)
    parser.add_argument("--device", default="cuda", help="cpu or cuda (default cuda)")
    parser.add_argument("--folder", type=Path, help="default build/first_minutes/<profile>_<device>")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, help=f"default: those not yet ok of {' '.join(PARTS)}, and run"
    )
    parser.add_argument("--only", choices=("parity", "table_5"), help=argparse.SUPPRESS)  # compute it in this process
    args = parser.parse_args()
    if not 0 < args.minutes < math.inf:
        parser.error(f"--minutes must be a positive number, got {args.minutes}")
    try:
        check_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    default = ROOT / "build/first_minutes" / f"{args.profile}_{args.device.replace(':', '')}"
    folder = (args.folder or default).absolute()
    if args.only:
        return compute(args.only, args.profile, args.device, folder)
    work = folder.with_name(f"{folder.name}_work")
    parts = all_parts(args.profile, args.device, folder, work)
    there = {path.stem for path in folder.glob("*.json") if json.loads(path.read_text())["end"] == "ok"}
    parts = [part for part in parts if part.name in (args.parts or {*PARTS} - there | {"run"})]
    about = {"profile": args.profile, "minutes": args.minutes, **provenance(args.device)}
    del about["peak_memory_mb"]  # this process's, not the parts'
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))  # ends the part under way, too
    try:
        good = first_minutes(parts, folder, work, __started_s__ + 60 * args.minutes, about)
    except KeyboardInterrupt:
        return 130
    finally:
        if (work / "results").exists():
            records = shutil.make_archive(str(work / "records"), "gztar", work, "results")
            write_bytes_atomic(folder / "records.tar.gz", Path(records).read_bytes())
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 1e3:.0f} kB; read summary.md")
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
