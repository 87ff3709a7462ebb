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

from .baselines import panns_weights
from .records import IMPORTANCE, PACKAGES, ROOT, BrokenRecord, config_hash, n_cores, read_record
from .tasks import importance_config, make_config

Finding = tuple[str, str, str]  # "ok", "note" or "WRONG"; what was found; how to mend it, "" where nothing has to be
GB = 1e9


def _versions() -> Iterator[Finding]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    locked = dict(line.split("==", 1) for line in lines if "==" in line and line[0] != "#")
    locked = {name.lower().replace("_", "-"): version for name, version in locked.items()}
    project, found = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"], {}
    allowed = Requirement(f"python{project['requires-python']}").specifier
    state = "ok" if allowed.contains(platform.python_version()) else "WRONG"
    yield (
        state,
        f"Python {platform.python_version()}",
        "" if state == "ok" else f"make PYTHON=... with a Python {allowed}",
    )
    for requirement in map(Requirement, project["dependencies"]):
        name = requirement.name.lower().replace("_", "-")
        if name not in locked:
            yield "WRONG", f"requirements.lock has no {requirement.name}", "git checkout requirements.lock"
            continue
        mend = f"pip install {requirement.name}=={locked[name]}, as in requirements.lock"
        try:
            found[name] = metadata.version(name).split("+")[0]
        except metadata.PackageNotFoundError:
            yield "WRONG", f"{name} is not installed", mend
            continue
        if not requirement.specifier.contains(found[name]):
            yield "WRONG", f"{name} {found[name]}, but pyproject.toml wants {requirement}", mend
        elif found[name] != locked[name]:
            yield "note", f"{name} {found[name]}, tested with {locked[name]}", mend
    yield "ok", ", ".join(f"{name} {found[name.lower()]}" for name in PACKAGES if name.lower() in found), ""


def _machine(output: Path) -> Iterator[Finding]:
    cuda = (
        [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    words = (
        f"{n_cores()} cores, {torch.get_num_threads()} threads for PyTorch, CUDA devices: {', '.join(cuda) or 'none'}"
    )
    mend = "" if cuda else "the paper profile needs a CUDA device and a PyTorch built for it; quick and smoke do not"
    yield "note" if mend else "ok", words, mend
    if hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GB
        mend = (
            "" if memory >= 1.5 * n_cores() else "run --workers with fewer than there are cores: one takes up to 1.5 GB"
        )
        yield "note" if mend else "ok", f"{memory:.0f} GB of memory", mend
    place = next(folder for folder in (output, *output.parents) if folder.exists())
    free = shutil.disk_usage(place).free / GB
    if not place.is_dir():
        yield "WRONG", f"{place} is no folder", "give a folder as --output"
    elif not os.access(place, os.W_OK):
        yield "WRONG", f"{output} cannot be written to", "give another folder as --output"
    elif free < 1:
        yield (
            "WRONG",
            f"{free:.1f} GB free on the disk of {output}",
            "make room, or give a folder of another disk as --output",
        )
    else:
        mend = (
            "paper checkpoints of P-SAGA take 2.3 GB each, two per run under way: mind --workers" if free < 20 else ""
        )
        yield "note" if mend else "ok", f"{free:.0f} GB free on the disk of {output}", mend


def _optional() -> Iterator[Finding]:
    panns = panns_weights()
    cache = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser() / "hub"
    weights = {
        "MS-CLAP": ("msclap", cache.glob("models--microsoft--msclap")),
        "PANNs": ("panns_AT_inference", panns.parent.glob(panns.name)),
        "EnCodec (FAD)": ("encodec", panns.parent.glob("encodec_24khz-*.th")),
    }
    for name, (package, files) in weights.items():
        installed, there = importlib.util.find_spec(package) is not None, any(files)
        mend = "" if installed else "pip install '.[embeddings]' in an environment of its own; "
        mend += "" if there else "weights are downloaded at first use"
        words = (
            f"optional {name}: package {'found' if installed else 'missing'}, weights {'found' if there else 'missing'}"
        )
        yield "note" if mend else "ok", words, mend.removesuffix("; ")
    mend = "" if (ROOT / ".venv-peers/.installed").exists() else "make peers"
    yield "note" if mend else "ok", f"the authors' package, for make bench: {'missing' if mend else 'found'}", mend


def _records(output: Path) -> Iterator[Finding]:
    for profile in sorted(path for path in (output / "results").glob("*") if any(path.glob("*/*/seed_*"))):
        counts = Counter()
        for folder in sorted(profile.glob("*/*/seed_*")):
            task, method = folder.parts[-3:-1]
            try:
                info, _ = read_record(folder)
                if method == IMPORTANCE:
                    config = importance_config(task, profile.name)
                else:
                    config = make_config(task, method, info["seed"], profile.name)
                state = "whole" if info["config_hash"] == config_hash(config.flat) else "stale"
            except BrokenRecord as error:
                state = "broken"
                yield (
                    "WRONG",
                    str(error.args[0]).partition(". To mend it")[0],
                    error.args[0].partition("To mend it, ")[2],
                )
            except ValueError as error:  # a task, method or profile that is no more
                state = "stale"
                yield "note", f"{folder}: {error}", "delete the folder if nothing needs it"
            else:
                if state == "stale":
                    what = f"{folder} was made with another configuration and is not used"
                    yield "note", what, "delete the folder to run it again"
            counts[state] += 1
        words = ", ".join(f"{counts[state]} {state}" for state in ("whole", "stale", "broken"))
        yield "ok", f"records of {profile.name}: {words}", ""


def findings(output: Path) -> Iterator[Finding]:
    """All that was looked at; output: the folder with results/."""
    yield from _versions()
    yield from _machine(output)
    yield from _optional()
    yield from _records(output)


def report(output: Path) -> int:
    """Print the findings, a line each and below it, where there is one, the fix; 1 if something needed is wrong, else 0."""
    wrong = 0
    for state, what, mend in findings(output):
        wrong += state == "WRONG"
        print(f"{state:5}  {what}" + (f"\n       -> {mend}" if mend else ""))
    print(f"\n{wrong} things wrong" if wrong else "\nnothing that is needed is wrong")
    return min(wrong, 1)
