"""What this machine has, and what is wrong with a fix for each: python -m replication doctor."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import tomllib
from collections import Counter
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch
from packaging.requirements import Requirement

from . import images
from .baselines import panns_weights
from .records import IMPORTANCE, PACKAGES, ROOT, BrokenRecord, config_hash, n_cores, read_record
from .tasks import importance_config, make_config

Finding = tuple[str, str, str]  # "ok", "note" or "WRONG"; what was found; how to mend it, "" where nothing has to be
GB = 1e9


def _note(what: str, mend: str, worst: str = "note") -> Finding:
    return (worst if mend else "ok"), what, mend


def _versions() -> Iterator[Finding]:
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    locked = dict(line.lower().replace("_", "-").split("==") for line in lines if "==" in line and line[0] != "#")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    allowed, here = Requirement(f"python{project['requires-python']}").specifier, platform.python_version()
    mend = "" if allowed.contains(here) else f"make PYTHON=... with a Python {allowed}"
    yield _note(f"Python {here}", mend, "WRONG")
    for requirement in map(Requirement, project["dependencies"] + project["optional-dependencies"]["replication"]):
        name = requirement.name.lower().replace("_", "-")
        tested = locked.get(name, "?")
        mend = f"pip install {requirement.name}=={tested}, as in requirements.lock"
        try:
            found = metadata.version(name).split("+")[0]
        except metadata.PackageNotFoundError:
            yield "WRONG", f"{name} is not installed", mend
            continue
        if not requirement.specifier.contains(found):
            yield "WRONG", f"{name} {found}, but pyproject.toml wants {requirement}", mend
        elif found != tested:
            yield "note", f"{name} {found}, tested with {tested}", mend
        elif requirement.name in PACKAGES:
            yield "ok", f"{name} {found}", ""


def _machine(output: Path) -> Iterator[Finding]:
    n = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices = ", ".join(map(torch.cuda.get_device_name, range(n))) or "none"
    mend = "" if n else "the paper profile needs a CUDA device and a PyTorch built for it; quick and smoke do not"
    yield _note(f"{n_cores()} cores, {torch.get_num_threads()} threads for PyTorch, CUDA devices: {devices}", mend)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GB
    mend = "run --workers with fewer than there are cores: one takes up to 1.5 GB" if memory < 1.5 * n_cores() else ""
    yield _note(f"{memory:.0f} GB of memory", mend)
    place = next(folder for folder in (output, *output.parents) if folder.exists())
    free = shutil.disk_usage(place).free / GB
    if not (place.is_dir() and os.access(place, os.W_OK)):
        yield "WRONG", f"{output} cannot be written to", "give another folder as --output"
    elif free < 1:
        yield "WRONG", f"{free:.1f} GB free on the disk of {output}", "make room, or give another disk's as --output"
    else:
        mend = "a paper checkpoint of P-SAGA takes 2.3 GB, two per run under way: mind --workers" if free < 20 else ""
        yield _note(f"{free:.0f} GB free on the disk of {output}", mend)


def _optional() -> Iterator[Finding]:
    panns = panns_weights()
    cache = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser() / "hub"
    weights = {
        "MS-CLAP": ("msclap", cache.glob("models--microsoft--msclap")),
        "PANNs": ("panns_AT_inference", panns.parent.glob(panns.name)),
        "EnCodec (FAD)": ("encodec", panns.parent.glob("encodec_24khz-*.th")),
    }
    said = {True: "found", False: "missing"}
    for name, (package, files) in weights.items():
        installed, there = importlib.util.find_spec(package) is not None, any(files)
        mends = ["pip install '.[embeddings]' in an environment of its own"] * (not installed)
        mends += ["weights are downloaded at first use"] * (not there)
        yield _note(f"optional {name}: package {said[installed]}, weights {said[there]}", "; ".join(mends))
    peers = (ROOT / ".venv-peers/.installed").exists()
    yield _note(f"the authors' package, for make bench: {said[peers]}", "" if peers else "make peers")


def _records(output: Path) -> Iterator[Finding]:
    for profile in sorted(path for path in (output / "results").glob("*") if any(path.glob("*/*/seed_*"))):
        counts = Counter()
        for folder in sorted(profile.glob("*/*/seed_*")):
            (task, method), state = folder.parts[-3:-1], "stale"
            try:
                info, _ = read_record(folder)
                where = (method, info["seed"], profile.name)
                if task == images.TASK:
                    config = images.image_config(*where)
                elif method == IMPORTANCE:
                    config = importance_config(task, profile.name)
                else:
                    config = make_config(task, *where)
                if info["config_hash"] == config_hash(config.flat):
                    state = "whole"
                else:
                    why = "was made with another configuration and is not used"
                    yield "note", f"{folder} {why}", "delete the folder to run it again"
            except BrokenRecord as error:
                state, (what, _, mend) = "broken", str(error).partition(". To mend it, ")
                yield "WRONG", what, mend
            except ValueError as error:  # a task, method or profile that is no more
                yield "note", f"{folder}: {error}", "delete the folder if nothing needs it"
            counts[state] += 1
        words = ", ".join(f"{counts[state]} {state}" for state in ("whole", "stale", "broken"))
        yield "ok", f"records of {profile.name}: {words}", ""


def report(output: Path) -> int:
    """Print what was found, a line each and the fix below it; 1 if something that is needed is wrong, else 0."""
    wrong = 0
    for part in (_versions(), _machine(output), _optional(), _records(output)):
        for state, what, mend in part:
            wrong += state == "WRONG"
            print(f"{state:5}  {what}" + (f"\n       -> {mend}" if mend else ""))
    print(f"\n{wrong} things wrong" if wrong else "\nnothing that is needed is wrong")
    return min(wrong, 1)
