"""One training run is one folder: its values and where they come from.

``<output>/results/<profile>/<task>/<method>/seed_<n>/`` holds ``history.csv``, ``test.csv`` (columns in `COLUMNS`) and,
written last, ``run.json``: status, resolved config and its hash, SHA-256 and rows of the two files, provenance.
run.json hashes everything, its own fields included: an edited, truncated or mixed record is refused (`BrokenRecord`)
wherever it is used. Deleting the folder asks for the run again.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import os
import platform
import re
import resource
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from .files import csv_bytes, write_bytes_atomic, write_text_atomic

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = {"history.csv": ["step", "split", "metric", "value", "wall_s"], "test.csv": ["metric", "value", "unit"]}
KINDS = {"step": "int64", "value": "float64", "wall_s": "float64", "split": "str", "metric": "str", "unit": "str"}
PACKAGES = ("torch", "numpy", "scipy", "pandas", "kymatio", "nnAudio", "auraloss")
IMPORTANCE = "theta_importance"  # in a method's place: no run, but the path probabilities that runs draw from


def command_for(folder: Path) -> str:
    """The command that computes what belongs into a record's folder."""
    profile, task, method, seed = folder.parts[-4:]
    output = Path(*folder.parts[:-5])
    where = f" --profile {profile}" + ("" if output.absolute() == ROOT else f" --output {output}")
    if task == "images":
        return f"python -m replication notebook 12_images{where}"
    if method == IMPORTANCE:
        return f"python -m replication importance --task {task}{where}"
    return f"python -m replication run --task {task} --method {method} --seeds {seed.removeprefix('seed_')}{where}"


class BrokenRecord(ValueError):
    """A record that is not what its run wrote; `file`, `expected`, `found` say where and how."""

    def __init__(self, file: Path, expected: str, found: str):
        self.file, self.expected, self.found = file, expected, found
        super().__init__(
            f"broken record {file}: expected {expected}, found {found}. To mend it, delete the folder {file.parent} "
            f"and run: {command_for(file.parent)}"
        )


@dataclass(frozen=True)
class Run:
    """One record as read: `history` and `test` are its CSV files, `info` is the whole of run.json."""

    profile: str
    task: str
    method: str
    seed: int
    status: str
    config: dict[str, Any]
    history: pd.DataFrame
    test: pd.DataFrame
    info: dict[str, Any]

    @property
    def ok(self) -> bool:
        """Whether the run finished; the status of a failed one is ``failed:<why>``."""
        return self.status == "ok"

    def value(self, metric: str) -> float:
        """The test value of `metric`; NaN when it is absent or empty (convergence never reached)."""
        found = self.test.loc[self.test["metric"] == metric, "value"]
        return float(found.iloc[0]) if len(found) else float("nan")

    @property
    def hours(self) -> float:
        """See `hours_of`."""
        return hours_of(self.info, self.history["wall_s"].max() if len(self.history) else 0.0)


def hours_of(info: dict[str, Any], steps_s: float = 0.0) -> float:
    """Hours that a record took, at least: those of the process that wrote it, from start to end, or, if this is more,
    `steps_s` seconds of training steps. A record knows no more of the processes that had to stop."""
    start, end = (datetime.fromisoformat(info[key]) for key in ("start_utc", "end_utc"))
    return max((end - start).total_seconds(), steps_s) / 3600


def n_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def utc_now() -> str:
    """This moment in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _json(data: Any, **layout: Any) -> str:
    try:
        return json.dumps(data, sort_keys=True, allow_nan=False, default=lambda x: x.item(), **layout)
    except (ValueError, AttributeError) as error:
        raise ValueError(f"a record's JSON holds texts, finite numbers and lists of them: {error}; {data}") from error


def config_hash(config: dict[str, Any]) -> str:
    """SHA-256 (hex) of a config as canonical JSON: key order and tuple or list do not matter; 1 and 1.0 differ.

    Raises ValueError for values that JSON cannot hold (NaN and infinities among them).
    """
    return _sha256(_json(config, separators=(",", ":")).encode())


@functools.cache
def _code_version() -> str:
    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != ROOT:
            return "unknown"
        return git("rev-parse", "HEAD") + "-dirty" * bool(git("status", "--porcelain", "scrapl_lib", "replication"))
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def peak_memory_mb() -> float:
    """Largest resident size of this process so far, in MiB; on Linux not `ru_maxrss`, which starts as its parent's."""
    with contextlib.suppress(OSError, IndexError):
        return int(re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[0]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def provenance(device: Any) -> dict[str, Any]:
    """What makes a result: code_version (git commit, "-dirty" when scrapl_lib/ or replication/ differs from it, or
    "unknown"), versions, device, device_name, peak_memory_mb (MiB: allocated on a CUDA device, else this process's
    largest resident size)."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    name, peak = platform.machine(), peak_memory_mb()
    if str(device).startswith("cuda"):
        name, peak = torch.cuda.get_device_name(device), torch.cuda.max_memory_allocated(device) / 2**20
    about = {"code_version": _code_version(), "versions": versions, "device": str(device), "device_name": name}
    return about | {"peak_memory_mb": round(peak, 1)}


def run_folder(profile: str, task: str, method: str, seed: int, output: Path = ROOT) -> Path:
    """The folder of one run; it need not exist."""
    return Path(output).absolute() / "results" / profile / task / method / f"seed_{seed}"


def write_run(folder: Path, *, history: pd.DataFrame, test: pd.DataFrame, **about: Any) -> None:
    """`write_record` of one run. history, test: the columns of `COLUMNS`; they may be empty."""
    write_record(folder, {"history.csv": history, "test.csv": test}, **about)


def write_record(
    folder: Path,
    tables: dict[str, pd.DataFrame],
    *,
    status: str,
    config: dict[str, Any],
    start_utc: str,
    device: Any,
    **more: Any,
) -> None:
    """Write a record, replacing the one there; run.json goes first and comes last, so that a run killed in between
    counts as missing. Two processes must not write one record at once: the caller holds the run's lock.

    folder: from `run_folder`. tables: the CSV files by name. status: "ok" or "failed:<why>". start_utc: from `utc_now`.
    more: goes into run.json as it is, such as train_step_ms. Raises ValueError for what JSON cannot hold.
    """
    profile, task, method, seed = folder.parts[-4:]
    data = {name: csv_bytes(table) for name, table in tables.items()}
    files = {name: {"sha256": _sha256(data[name]), "rows": len(table)} for name, table in tables.items()}
    info = {"profile": profile, "task": task, "method": method, "seed": int(seed.removeprefix("seed_"))}
    info |= {"status": status, "config": config, "config_hash": config_hash(config), "files": files}
    info |= {"threads": torch.get_num_threads(), "deterministic": torch.are_deterministic_algorithms_enabled()}
    info |= {**provenance(device), "start_utc": start_utc, "end_utc": utc_now(), **more}
    info["record_sha256"] = config_hash(info)
    text = _json(info, indent=1) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").unlink(missing_ok=True)
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)
    for name, content in data.items():
        write_bytes_atomic(folder / name, content)
    write_text_atomic(folder / "run.json", text)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@contextlib.contextmanager
def _readable(file: Path, expected: str) -> Iterator[None]:
    """What cannot be read inside is no record that a run wrote."""
    try:
        yield
    except BrokenRecord:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise BrokenRecord(file, expected, f"{type(error).__name__}: {error}") from error


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, bytes]] | None:
    """run.json and the bytes of the CSV files, all of it checked; None when there is no run.json.

    What does not fit together is broken only if run.json is still the same afterwards: else it was just replaced.
    """
    while (text := _run_json(folder)) is not None:
        try:
            return _checked(folder, text)
        except BrokenRecord:
            if _run_json(folder) == text:
                raise
    return None


def _run_json(folder: Path) -> bytes | None:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return (folder / "run.json").read_bytes()
    return None


def _checked(folder: Path, text: bytes) -> tuple[dict[str, Any], dict[str, bytes]]:
    path, place, data = folder / "run.json", "/".join(folder.parts[-4:]), {}
    with _readable(path, "a JSON object with files, config, its hash, status, times and a record_sha256"):
        info = json.loads(text)
        claimed, actual = info.pop("record_sha256"), config_hash(info)
        if claimed != actual:
            raise BrokenRecord(path, f"fields with SHA-256 {claimed}", f"SHA-256 {actual} (edited by hand?)")
        if (written := f"{info['profile']}/{info['task']}/{info['method']}/seed_{info['seed']}") != place:
            raise BrokenRecord(path, f"the record of {place}, as its folder says", f"that of {written}")
        wanted = {name: (file["rows"], file["sha256"]) for name, file in info["files"].items()}
        hours_of(info)
        dict(**info["config"]), info["status"] + info["config_hash"]
    for name, (rows, digest) in wanted.items():
        path, expected = folder / name, f"{rows} rows with SHA-256 {digest}"
        if not path.is_file():
            raise BrokenRecord(path, expected, "no such file")
        data[name] = path.read_bytes()
        if (actual := _sha256(data[name])) != digest:
            rows = max(len(data[name].splitlines()) - 1, 0)
            raise BrokenRecord(path, expected, f"{rows} rows with SHA-256 {actual}")
    return info, data


def read_record(folder: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """run.json and the bytes of its CSV files, verified. Raises `BrokenRecord` for none, or one that was changed."""
    folder = Path(folder).absolute()
    if (record := _read(folder)) is None:
        raise BrokenRecord(folder / "run.json", "a finished or failed run", "no such file")
    return record


def read_run(folder: Path) -> Run:
    """Read and verify one record. Raises `BrokenRecord` when anything in it is missing or not as it was written."""
    (info, data), frames = read_record(folder), []
    for name, columns in COLUMNS.items():
        with _readable(Path(folder).absolute() / name, f"a table of {columns}"):
            options = {"keep_default_na": False, "na_values": {"value": [""]}}  # "NA" may be a metric's name
            frames.append(pd.read_csv(io.BytesIO(data[name]), dtype=KINDS, **options)[columns])
    keys = {key: info[key] for key in ("profile", "task", "method", "seed", "status", "config")}
    return Run(**keys, history=frames[0], test=frames[1], info=info)


def run_state(folder: Path, config_hash: str) -> str:
    """ "missing" (no run.json), "stale" (its config has another hash than `config_hash`), "done" or "failed".

    Takes well under a millisecond: files are hashed, not parsed. Raises `BrokenRecord` for one that was changed.
    """
    if (record := _read(Path(folder).absolute())) is None:
        return "missing"
    if record[0]["config_hash"] != config_hash:
        return "stale"
    return "done" if record[0]["status"] == "ok" else "failed"


def load_runs(
    profile: str, task: str, expected: dict[tuple[str, int], str] | None = None, output: Path = ROOT
) -> list[Run]:
    """The finished and failed runs of a task, sorted by method and seed.

    expected: today's config hash by (method, seed). Only those runs are taken; one made with another config is stale:
    left out and named in a UserWarning. None takes all there are. Raises `BrokenRecord` for a broken one.
    """
    hashes = {(method, f"seed_{seed}"): config for (method, seed), config in (expected or {}).items()}
    runs, stale = [], []
    for file in (Path(output).absolute() / "results" / profile / task).glob("*/*/run.json"):
        key = file.parts[-3:-1]
        if (expected is None and key[0] != IMPORTANCE) or key in hashes:
            run = read_run(file.parent)
            (runs if expected is None or run.info["config_hash"] == hashes[key] else stale).append(run)
    if stale:
        listed = ", ".join(sorted(f"{run.method} seed {run.seed}" for run in stale))
        words = f"left out as stale, made with another config than today's: {task} {listed} ({profile})"
        warnings.warn(words, stacklevel=2)
    return sorted(runs, key=lambda run: (run.method, run.seed))
