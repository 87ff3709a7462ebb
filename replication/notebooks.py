"""Runs a notebook through papermill, strictly, and reads a notebook's parameters, strictly.

Papermill alone only warns of a misspelt parameter, lets 1e3 arrive as a float where an int is meant, writes the output
in place and, after a killed kernel or Ctrl-C, saves a notebook whose every cell says "completed". Here parameters are
checked against the notebook's own cell before anything starts (`run_notebook`) and again in the notebook's set-up cell
(`setup`, which holds when papermill or Jupyter is used directly); success is returning, failure is `NotebookFailed`.

A notebook's parameters cell is the one tagged ``parameters``; each of its lines reads ``name: type = value  # help``.
"""

from __future__ import annotations

import ast
import fcntl
import hashlib
import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, TextIO

from tqdm import tqdm

from .records import ROOT, n_cores, utc_now, write_text_atomic
from .tasks import PROFILES, check_name

TYPES = {"str": str, "int": int, "float": float, "bool": bool}
ALONE = ("08_cost",)  # its times, which 05_granular draws, want the whole machine
LAST = ("09_report_card",)
IPC_PATH_LIMIT = 90  # bytes; the sockets' names add a few more and must stay below 104 (macOS) or 108 (Linux)


class Parameter(NamedTuple):
    """One line of a parameters cell."""

    type: type
    default: str | int | float | bool
    help: str


class NotebookFailed(RuntimeError):
    """A notebook that did not finish: `notebook`, `cell` (where it stopped), `log` (file), `exit_status` (1, or 128 +
    the number of the signal that stopped it: then no further notebook should be started)."""

    def __init__(self, notebook: str, cell: str, reason: str, log: Path, exit_status: int):
        self.notebook, self.cell, self.log, self.exit_status = notebook, cell, log, exit_status
        super().__init__(f"notebook {notebook} failed at {cell}: {reason}\nlog and copy as far as it got: {log}")


class _Stopped(KeyboardInterrupt):
    """SIGINT, SIGTERM or SIGHUP. A KeyboardInterrupt, because asyncio lets nothing else through at once."""

    def __init__(self, number: int):
        self.number = number
        super().__init__(f"stopped by {signal.Signals(number).name}")


def notebook_names() -> list[str]:
    """The project's notebooks in their order, without suffix."""
    return sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))


def notebook_path(name_or_path: str | Path) -> Path:
    """A notebook's file, from its name ("05_granular") or its path (anything that ends in .ipynb).

    Raises FileNotFoundError (a path) or ValueError (a name, with the nearest one that exists).
    """
    path = Path(name_or_path)
    if path.suffix == ".ipynb":
        if not path.is_file():
            raise FileNotFoundError(f"there is no notebook {path}")
        return path.absolute()
    check_name("notebook", str(name_or_path), notebook_names())
    return ROOT / "notebooks" / f"{name_or_path}.ipynb"


def parameters_of(name_or_path: str | Path) -> dict[str, Parameter]:
    """A notebook's parameters, in order. Raises ValueError for a cell that is missing, double or not as said above."""
    path = notebook_path(name_or_path)
    try:  # plain JSON: nbformat takes seconds to import, and every set-up cell comes here
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        sources = ["".join(cell["source"]) for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a notebook (nbformat 4): {type(error).__name__}: {error}") from error
    if len(sources) != 1:
        raise ValueError(f"{path} has {len(sources)} cells tagged 'parameters', expected exactly one")
    found: dict[str, Parameter] = {}
    for line in sources[0].splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            (node,) = ast.parse(line).body
            kind, value = TYPES[node.annotation.id], ast.literal_eval(node.value)
            helps = [t.string for t in tokenize.generate_tokens(StringIO(line).readline) if t.type == tokenize.COMMENT]
            if type(value) is not kind or not helps or node.target.id in found:
                raise ValueError(line)
            found[node.target.id] = Parameter(kind, value, helps[0].lstrip("# "))
        except (SyntaxError, ValueError, AttributeError, KeyError) as error:
            raise ValueError(
                f"{path}: the parameters cell's line {line!r} must read `name: type = value  # help`, with a new name, "
                f"one of the types {', '.join(TYPES)} and a value of that type"
            ) from error
    return found


def setup(namespace: Mapping[str, Any], notebook: str | Path) -> SimpleNamespace:
    """A notebook's set-up cell: ``config = setup(globals(), "05_granular")``, before anything else is defined.

    Returns the parameters as attributes; an integral float given for an int becomes one (papermill reads 1e3 as float).
    Raises ValueError for a name the notebook does not declare (papermill injects it with no more than a warning),
    saying the nearest one it does, and for a declared one that is absent; TypeError for a value of another type.
    """
    parameters = parameters_of(notebook)
    for name in _given_names(namespace, set(parameters)):
        check_name(f"parameter of {Path(notebook).stem}", name, parameters)
    if missing := [name for name in parameters if name not in namespace]:
        raise ValueError(f"notebook {notebook}: no value for {', '.join(missing)}; run the parameters cell first")
    return SimpleNamespace(**{name: _checked(name, namespace[name], kind) for name, (kind, _, _) in parameters.items()})


def run_notebook(
    name_or_path: str | Path,
    parameters: Mapping[str, Any] | None = None,
    profile: str = "quick",
    output: str | Path = ROOT,
) -> Path:
    """Execute a notebook in a kernel of this interpreter, its working directory the project's root.

    parameters: values by name; a text is read as the declared type (command line). `profile` and `output` (the folder
    whose results/ and figures/ are used, the project's root by default) are handed to a notebook that declares them.
    Returns the executed copy, <output>/executed/<profile>/<name>.ipynb, which is there only after success; a failed one
    goes to <output>/executed/failed/ with its log. A second call with the same output and profile waits for the first,
    and takes over its copy if that had the same source and parameters.

    Raises ValueError or TypeError for parameters the notebook does not take, before anything starts; NotebookFailed for
    a cell that raises or exits, a kernel that dies, Ctrl-C, SIGTERM or a disk that is full.
    """
    path, output = notebook_path(name_or_path), Path(output).resolve()
    values = _values(path, parameters, profile, output)
    done = output / "executed" / profile / path.name
    request = hashlib.sha256(path.read_bytes() + json.dumps(values, sort_keys=True).encode()).hexdigest()
    done.parent.mkdir(parents=True, exist_ok=True)
    with _stoppable(), _locked(done) as (lock, waited):
        lock.seek(0)
        if waited and lock.read() == request and done.is_file():
            return done
        lock.truncate(0)
        _execute(path, values, done, output / "executed" / "failed")
        lock.write(request)
    return done


def _values(path: Path, parameters: Mapping[str, Any] | None, profile: str, output: Path) -> dict[str, Any]:
    """The values that a notebook's parameters are to take. Raises ValueError or TypeError as `run_notebook` says."""
    declared = parameters_of(path)
    given = dict(parameters or {})
    for name in given:
        check_name(f"parameter of {path.stem}", name, declared)
    for name, value in {"profile": profile, "output": "" if output == ROOT else str(output)}.items():
        if name in declared and given.setdefault(name, value) != value:
            raise ValueError(
                f"notebook {path.stem}: {name} is {value!r} and {given[name]!r} at once; give it once, as --{name}"
            )
    return {
        name: _checked(name, _read_text(value, declared[name].type), declared[name].type)
        for name, value in given.items()
    }


def run_notebooks(
    names: Sequence[str], parameters: Mapping[str, Any] | None = None, profile: str = "quick", output: str | Path = ROOT
) -> list[Path]:
    """Execute several notebooks as `run_notebook` does, and return their executed copies.

    First those that take times (`ALONE`), one after the other; then the rest, each in a process of one thread, as many at once
    as there are cores; at the end those that sum up (`LAST`). Arguments as in `run_notebook`. Raises ValueError or TypeError as
    it does; the first notebook to fail stops the others, says why on stderr and ends this by SystemExit with its exit status.
    """
    paths = list(dict.fromkeys(map(notebook_path, names)))
    for path in paths:  # before any of them starts
        _values(path, parameters, profile, Path(output).resolve())
    first, last = ([path for path in paths if path.stem in group] for group in (ALONE, LAST))
    rest = [path for path in paths if path not in first + last]
    for path in first:
        run_notebook(path, parameters, profile, output)
    if rest:
        flags = ["--profile", profile, "--output", str(output)]
        flags += [text for name, value in (parameters or {}).items() for text in ("-p", f"{name}={value}")]
        _run_side_by_side(rest, flags)
    for path in last:
        run_notebook(path, parameters, profile, output)
    return [Path(output).resolve() / "executed" / profile / path.name for path in paths]


def _run_side_by_side(paths: Sequence[Path], flags: Sequence[str]) -> None:
    """Run `notebook PATH flags` for each in a process of its own; end by SystemExit as soon as one fails."""
    waiting, running = list(paths), {}
    one_thread = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    bar = tqdm(total=len(paths), desc="notebooks", unit="notebook", mininterval=0.5 if sys.stderr.isatty() else 10.0)
    with tempfile.TemporaryDirectory() as folder, _stoppable():
        try:
            while waiting or running:
                while waiting and len(running) < n_cores():
                    path = waiting.pop(0)
                    command = [sys.executable, "-m", "replication", "notebook", str(path), *flags]
                    with open(Path(folder) / f"{path.stem}.log", "wb") as said:
                        process = subprocess.Popen(
                            command, stdout=subprocess.DEVNULL, stderr=said, cwd=ROOT, env=one_thread
                        )
                    running[path.stem] = process, Path(said.name)
                bar.set_postfix_str(", ".join(running), refresh=False)
                bar.update(0)
                time.sleep(0.2)
                for name, (process, said) in list(running.items()):
                    if process.poll() is not None:
                        del running[name]
                        bar.update()
                        if process.returncode:
                            words = said.read_text(errors="replace")
                            words = words[words.rfind("\r") + 1 :].strip()
                            if process.returncode < 0 or not words:
                                words += f"\nerror: notebook {name}: its process ended with status {process.returncode} (-9: out of memory?)"
                            bar.write(words, file=sys.stderr)
                            raise SystemExit(process.returncode if process.returncode > 0 else 128 - process.returncode)
        finally:
            for process, _ in running.values():
                process.terminate()
            for process, _ in running.values():
                process.wait()
            bar.close()


def _execute(path: Path, values: dict[str, Any], done: Path, failed: Path) -> None:
    """Execute `path` into `done` by way of a temporary name; or leave copy and log in `failed` and raise."""
    import nbformat
    import papermill
    from traitlets.config import Config

    running = done.with_name(f".{done.stem}.running.ipynb")
    started: list[nbformat.NotebookNode] = []
    try:
        with tempfile.TemporaryDirectory(prefix="nb-", ignore_cleanup_errors=True) as folder:
            connection = os.path.join(folder, "k.json")
            ipc = len(os.fsencode(connection)) < IPC_PATH_LIMIT  # needs no port; else tcp on localhost
            os.environ["SCRAPL_STATIC"] = "1"  # read by demos.interact, in the kernel
            papermill.execute_notebook(
                str(path).replace("{", "{{").replace("}", "}}"),  # papermill formats paths
                str(running).replace("{", "{{").replace("}", "}}"),
                values,
                kernel_name="python3",
                language="python",
                start_timeout=180,
                progress_bar={"desc": path.stem, "mininterval": 0.1 if sys.stderr.isatty() else 10.0},
                kernel_manager_class=_kernel_class(),
                config=Config(KernelManager={"transport": "ipc" if ipc else "tcp", "connection_file": connection}),
                resources={"metadata": {"path": str(ROOT)}},
                on_cell_start=lambda cell, cell_index: started.append(cell),
            )
        for index, cell in enumerate(started):  # papermill takes sys.exit(0) for success
            if any(result.output_type == "error" for result in cell.get("outputs", [])):
                del started[index + 1 :]
                raise RuntimeError("the cell stopped the notebook by SystemExit")
        os.replace(running, done)
    except BaseException as error:
        failure = _keep_failed(path, values, running, failed, started, error)
        with suppress(OSError):
            running.unlink(missing_ok=True)
        raise failure from error


def _keep_failed(
    path: Path, values: dict[str, Any], running: Path, failed: Path, started: list[Any], error: BaseException
) -> NotebookFailed:
    """Write what there is of a failed notebook, marked as failed, and its log; return the error to raise.

    started: the cells so far, the last of which failed.
    """
    import nbformat
    from nbclient.exceptions import DeadKernelError
    from papermill.execute import remove_error_markers

    source = nbformat.read(path, as_version=4)
    where, text = "its start", ""
    if started:
        own = [
            cell
            for cell in started
            if cell.cell_type == "code" and "injected-parameters" not in cell.metadata.get("tags", [])
        ]
        total, text = sum(cell.cell_type == "code" for cell in source.cells), started[-1].source
        where = (
            f"code cell {len(own)} of {total}" if started[-1] in own else f"{started[-1].cell_type} cell {len(started)}"
        )
        where += f" ({(text.strip().splitlines() or [''])[0][:80]!r})"
    reason, status = (
        f"{getattr(error, 'ename', type(error).__name__)}: {getattr(error, 'evalue', error)}".splitlines()[0],
        1,
    )
    if isinstance(error, _Stopped):
        reason, status = str(error), 128 + error.number
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # its word on the abandoned cell adds nothing
    elif isinstance(error, DeadKernelError):
        reason = "the kernel died (killed from outside or for lack of memory, or a crash in compiled code)"
    try:
        book = nbformat.v4.upgrade(remove_error_markers(nbformat.read(running, as_version=4)))
    except (OSError, ValueError):  # stopped before or while it was written
        book = nbformat.v4.upgrade(source)
    for index, cell in enumerate(book.cells[max(0, len(started) - 1) :]):  # papermill calls every cell "completed"
        cell.metadata["papermill"] = {"status": "pending" if index or not started else "failed"}
    book.metadata["papermill"] = {"exception": True}
    book.cells.insert(0, nbformat.v4.new_markdown_cell(f"**This run failed** at {where}: {reason}"))
    log = failed / f"{path.stem}.log"
    lines = [f"{utc_now()} notebook {path} failed at {where}: {reason}", f"parameters: {values}", "", "cell:", text, ""]
    lines += getattr(error, "traceback", [])
    try:
        write_text_atomic(log, re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(lines)).rstrip() + "\n")
        write_text_atomic(failed / path.name, nbformat.writes(book) + "\n")
    except OSError as unwritten:
        reason += f" (and no log or copy could be written: {unwritten})"
    return NotebookFailed(path.stem, where, reason, log, status)


def _kernel_class() -> type:
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager
    from traitlets import default

    class Kernel(AsyncKernelManager):
        """Kernel python3 is this interpreter's, whatever kernel of that name the user has installed."""

        @default("kernel_spec_manager")
        def _only_our_own(self) -> KernelSpecManager:
            return KernelSpecManager(kernel_dirs=[])

    return Kernel


def _given_names(namespace: Mapping[str, Any], declared: set[str]) -> list[str]:
    """Names that somebody meant as parameters. In a kernel: those assigned in papermill's cell ("# Parameters") and in
    any cell of nothing but literal assignments that sets a declared one; elsewhere: all that hold plain data."""
    if "In" not in namespace:
        plain = (str, int, float, bool, list, tuple, dict, type(None))
        return [name for name, value in namespace.items() if isinstance(value, plain) and not name.startswith("_")]
    given: dict[str, None] = {}
    for source in namespace["In"]:
        names = []
        try:
            for node in ast.parse(source).body:
                names.append((node.target if isinstance(node, ast.AnnAssign) else node.targets[0]).id)
                if not source.startswith("# Parameters"):
                    ast.literal_eval(node.value)
        except (SyntaxError, ValueError, TypeError, AttributeError):
            continue
        if source.startswith("# Parameters") or declared.intersection(names):
            given |= dict.fromkeys(names)
    return list(given)


def _read_text(value: Any, kind: type) -> Any:
    """A command line's text as `kind`, or the text itself where it reads as nothing of the kind."""
    if isinstance(value, str) and kind is not str:
        if kind is bool:
            return {"true": True, "false": False}.get(value.lower(), value)
        with suppress(ValueError):
            return int(value)
        with suppress(ValueError):
            return float(value)
    return value


def _checked(name: str, value: Any, kind: type) -> Any:
    """`value` as `kind`; an int serves as float and an integral float as int; a profile must be one there is."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if kind is int and number and value == int(value) or kind is float and number:
        return kind(value)
    if kind in (int, float) or not isinstance(value, kind):
        expected = {int: "a whole number", float: "a finite number", bool: "True or False", str: "a text"}[kind]
        raise TypeError(
            f"parameter {name} must be {expected} ({kind.__name__}), got {value!r} ({type(value).__name__})"
        )
    return check_name("profile", value, PROFILES) if name == "profile" else value


@contextmanager
def _stoppable() -> Iterator[None]:
    """Turn the first SIGINT, SIGTERM or SIGHUP into `_Stopped`, so that the kernel ends and the failure is recorded."""
    if threading.current_thread() is not threading.main_thread():  # only there can Python take signals
        yield
        return

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def stop(number: int, _frame: Any) -> None:
        restore()
        raise _Stopped(number)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}  # nohup
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        restore()


@contextmanager
def _locked(done: Path) -> Iterator[tuple[TextIO, bool]]:
    """Hold the lock file beside `done`; the lock goes with the process. Yields the file, which holds the request that
    made the copy (nothing while one is at work), and whether another run was waited for, which is said aloud."""
    with open(done.with_name(f".{done.stem}.lock"), "a+") as lock:
        waited = False
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(
                f"{done.stem}: another process executes it into {done.parent}: waiting for it",
                file=sys.stderr,
                flush=True,
            )
            waited = True
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock, waited
