"""Runs a notebook through papermill, strictly, and reads a notebook's parameters, strictly.

Papermill alone only warns of a misspelt parameter, lets 1e3 arrive as a float where an int is meant and, after a killed
kernel or Ctrl-C, saves a notebook whose every cell says "completed". Here parameters are checked before anything starts
(`run_notebook`) and again in the notebook's set-up cell (`setup`, for those who use papermill or Jupyter directly).

A notebook's parameters cell is the one tagged ``parameters``; each of its lines reads ``name: type = value  # help``.
(`papermill.inspect_notebook` silently leaves out a line that it cannot read, and takes seconds to import.)
"""

from __future__ import annotations

import ast
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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tqdm import tqdm

from .data import recordings_folder
from .files import locked, write_text_atomic
from .records import ROOT, n_cores, utc_now
from .tasks import PROFILES, check_name

KINDS = {str: "a text", int: "a whole number", float: "a finite number", bool: "True or False"}
ALONE = ("08_cost", "11_draw_a_rate")  # their times, which 05_granular and 11 draw, want the whole machine
LAST = ("09_report_card",)
IPC_PATH_LIMIT = 90  # bytes; the sockets' names add a few more and must stay below 104 (macOS) or 108 (Linux)


class NotebookFailed(RuntimeError):
    """A notebook that did not finish. `exit_status`: 1, or 128 + the number of the signal that stopped it: then no
    further notebook should be started."""

    def __init__(self, words: str, exit_status: int) -> None:
        super().__init__(words)
        self.exit_status = exit_status


class _Stopped(KeyboardInterrupt):
    """SIGINT, SIGTERM or SIGHUP (args: its number). A KeyboardInterrupt: asyncio lets nothing else through at once."""


def notebook_names() -> list[str]:
    """The project's notebooks in their order, without suffix."""
    return sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))


def notebook_path(name_or_path: str | Path) -> Path:
    """A notebook's file, from its name ("05_granular") or its path (anything that ends in .ipynb).

    Raises FileNotFoundError (a path) or ValueError (a name, with the nearest one that exists).
    """
    path = Path(name_or_path)
    if path.suffix != ".ipynb":
        return ROOT / "notebooks" / f"{check_name('notebook', str(name_or_path), notebook_names())}.ipynb"
    if not path.is_file():
        raise FileNotFoundError(f"there is no notebook {path}")
    return path.absolute()


def parameters_of(name_or_path: str | Path) -> dict[str, str | int | float | bool]:
    """A notebook's parameters with their defaults. Raises ValueError for a cell that is missing, double or of another
    form than said above."""
    path, found = notebook_path(name_or_path), {}
    try:  # plain JSON: nbformat takes seconds to import, and every set-up cell comes here
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        sources = ["".join(cell["source"]) for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a notebook (nbformat 4): {type(error).__name__}: {error}") from error
    if len(sources) != 1:
        raise ValueError(f"{path} has {len(sources)} cells tagged 'parameters', expected exactly one")
    for node in ast.parse(sources[0], path.name).body:
        try:
            name, value = node.target.id, ast.literal_eval(node.value)
            if type(value) not in KINDS or type(value).__name__ != node.annotation.id or name in found:
                raise ValueError(name)
            found[name] = value
        except (ValueError, AttributeError) as error:
            form = "`name: type = value`, with a new name, type str, int, float or bool and a value of it"
            raise ValueError(f"{path}: {ast.unparse(node)!r} of the parameters cell must read {form}") from error
    return found


def setup(namespace: Mapping[str, Any], notebook: str | Path) -> SimpleNamespace:
    """A notebook's set-up cell: ``config = setup(globals(), "05_granular")``, before anything else is defined.

    Returns the parameters as attributes; an integral float given for an int becomes one (papermill reads 1e3 as float).
    Raises ValueError for a name that the notebook does not declare, saying the nearest one it does, and for a declared
    one that is absent; TypeError for a value of another type.
    """
    declared, given = parameters_of(notebook), list(namespace.get("__annotations__", {}))  # of the parameters cell
    for source in namespace.get("In", []):  # what ran in this kernel
        if source.startswith("# Parameters"):  # papermill's cell
            given += [node.targets[0].id for node in ast.parse(source).body]
    for name in given:
        check_name(f"parameter of {Path(notebook).stem}", name, declared)
    if missing := [name for name in declared if name not in namespace]:
        raise ValueError(f"notebook {notebook}: no value for {', '.join(missing)}; run the parameters cell first")
    return SimpleNamespace(**{name: _checked(name, namespace[name], type(declared[name])) for name in declared})


def _checked(name: str, value: Any, kind: type) -> Any:
    """`value` as `kind`; an int serves as float and an integral float as int; a profile must be one there is."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if kind is int and number and value == int(value) or kind is float and number:
        return kind(value)
    if kind in (int, float) or not isinstance(value, kind):
        got = f"{value!r} ({type(value).__name__})"
        raise TypeError(f"parameter {name} must be {KINDS[kind]} ({kind.__name__}), got {got}")
    return check_name("profile", value, PROFILES) if name == "profile" else value


def _values(path: Path, parameters: Mapping[str, Any] | None, profile: str, output: Path) -> dict[str, Any]:
    """The values that a notebook's parameters are to take. Raises ValueError or TypeError as `run_notebook` says."""
    declared, given = parameters_of(path), dict(parameters or {})
    for name, value in given.items():
        check_name(f"parameter of {path.stem}", name, declared)
        if isinstance(value, str) and type(declared[name]) is not str:  # from the command line
            with suppress(ValueError, SyntaxError):
                given[name] = ast.literal_eval(value.strip().capitalize())
    for name, value in {"profile": profile, "output": "" if output == ROOT else str(output)}.items():
        if name in declared and given.setdefault(name, value) != value:
            both = f"{name} is {value!r} and {given[name]!r} at once; give it once, as --{name}"
            raise ValueError(f"notebook {path.stem}: {both}")
    return {name: _checked(name, value, type(declared[name])) for name, value in given.items()}


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
    path, output = notebook_path(name_or_path), _absolute(output)
    values = _values(path, parameters, profile, output)
    done = output / "executed" / profile / path.name
    request = hashlib.sha256(path.read_bytes() + json.dumps(values, sort_keys=True).encode()).hexdigest()
    done.parent.mkdir(parents=True, exist_ok=True)
    before = done.stat().st_mtime_ns if done.exists() else 0
    waiting = f"{done.stem}: another process executes it into {done.parent}: waiting for it"
    with _stoppable(), locked(done.with_name(f".{done.stem}.lock"), waiting) as waited:
        if waited and done.exists() and done.stat().st_mtime_ns > before:  # the run that was waited for has succeeded
            if json.loads(done.read_text(encoding="utf-8"))["metadata"]["request"] == request:
                return done
        _execute(path, values, request, done, output / "executed" / "failed")
    return done


def run_notebooks(
    names: Sequence[str], parameters: Mapping[str, Any] | None = None, profile: str = "quick", output: str | Path = ROOT
) -> list[Path]:
    """Execute several notebooks as `run_notebook` does, and return their executed copies.

    First those that take times (`ALONE`), then the rest, each in a process of one thread, as many at once as there are
    cores, at the end those that sum up (`LAST`). Raises ValueError or TypeError as `run_notebook` does; the first
    notebook to fail stops the others, says why on stderr and ends this by SystemExit with its exit status.
    """
    paths, output = list(dict.fromkeys(map(notebook_path, names))), _absolute(output)
    for path in paths:  # before any of them starts
        _values(path, parameters, profile, output)
    flags = ["--profile", profile, "--output", str(output)]
    flags += [text for name, value in (parameters or {}).items() for text in ("-p", f"{name}={value}")]
    for path in (path for path in paths if path.stem in ALONE):
        run_notebook(path, parameters, profile, output)
    _run_side_by_side([path for path in paths if path.stem not in ALONE + LAST], flags)
    for path in (path for path in paths if path.stem in LAST):
        run_notebook(path, parameters, profile, output)
    return [output / "executed" / profile / path.name for path in paths]


def _absolute(output: str | Path) -> Path:
    """The output folder made absolute, and TR808_DIR, too: kernels and processes have another working folder."""
    if os.environ.get("TR808_DIR"):
        recordings_folder()
    return Path(output).resolve()


def _run_side_by_side(paths: Sequence[Path], flags: Sequence[str]) -> None:
    """Run `notebook PATH flags` for each in a process of its own; end by SystemExit as soon as one fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    waiting, running = list(paths), {}
    with tqdm(total=len(paths), desc="notebooks", unit="notebook", disable=not paths) as bar, _stoppable():
        try:
            while waiting or running:
                while waiting and len(running) < n_cores():
                    path, said = waiting.pop(0), tempfile.TemporaryFile()
                    command = [sys.executable, "-m", "replication", "notebook", str(path), *flags]
                    process = subprocess.Popen(
                        command, stdout=subprocess.DEVNULL, stderr=said, cwd=ROOT, env=environment
                    )
                    running[process] = (path.stem, said)
                time.sleep(0.1)
                for process in [process for process in running if process.poll() is not None]:
                    name, said = running.pop(process)
                    bar.update()
                    if status := process.returncode:
                        said.seek(0)
                        words = said.read().decode("utf-8", "replace")
                        why = f"its process ended with status {status}" + " (-9: out of memory?)" * (status < 0)
                        why = f"error: notebook {name}: {why}; the others were stopped"
                        print("", words[words.rfind("\r") + 1 :].strip(), why, sep="\n", file=sys.stderr)
                        raise SystemExit(status if status > 0 else 128 - status)
        finally:
            for process in running:
                process.terminate()
            for process in running:
                process.wait()


def _execute(path: Path, values: dict[str, Any], request: str, done: Path, failed: Path) -> None:
    """Execute `path`, then write the copy `done`; or leave copy and log in `failed` and raise NotebookFailed."""
    import nbformat
    import papermill
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager
    from traitlets.config import Config

    class Kernel(AsyncKernelManager):
        """Kernel python3 is this interpreter's, whatever kernel of that name the user has installed."""

        kernel_spec_manager = KernelSpecManager(kernel_dirs=[])

    started: list[nbformat.NotebookNode] = []
    try:
        with tempfile.TemporaryDirectory(prefix="nb-", ignore_cleanup_errors=True) as folder:
            connection = os.path.join(folder, "k.json")
            ipc = len(os.fsencode(connection)) < IPC_PATH_LIMIT  # needs no port; else tcp on localhost
            os.environ["SCRAPL_STATIC"] = "1"  # read by teaching.interact, in the kernel
            book = papermill.execute_notebook(
                str(path).replace("{", "{{").replace("}", "}}"),  # papermill formats paths
                None,
                values,
                kernel_name="python3",
                language="python",
                start_timeout=180,
                progress_bar={"desc": path.stem, "mininterval": 0.1 if sys.stderr.isatty() else 10.0},
                kernel_manager_class=Kernel,
                config=Config(KernelManager={"transport": "ipc" if ipc else "tcp", "connection_file": connection}),
                resources={"metadata": {"path": str(ROOT)}},
                on_cell_start=lambda cell, cell_index: started.append(cell),
            )
        if any(result.output_type == "error" for result in started[-1].get("outputs", [])):
            raise RuntimeError("the cell stopped the notebook by SystemExit")  # papermill lets sys.exit(0) pass
        book.metadata["request"] = request
        write_text_atomic(done, nbformat.writes(book) + "\n")
    except BaseException as error:
        raise _keep_failed(path, values, failed, started, error) from error


def _keep_failed(
    path: Path, values: dict[str, Any], failed: Path, started: Sequence[Any], error: BaseException
) -> NotebookFailed:
    """Write what there is of a failed notebook, its cells `started`, and its log; return the error to raise."""
    import nbformat
    from nbclient.exceptions import DeadKernelError

    code = [cell for cell in started if cell.cell_type == "code"]
    own = [cell for cell in code if "injected-parameters" not in cell.metadata.tags]
    where, text, status = "its start", "", 1
    if code:
        text = code[-1].source.strip()
        where = f"code cell {len(own)} ({text.partition(chr(10))[0][:80]!r})"
        code[-1].metadata["papermill"] = {"status": "failed"}
    reason = f"{getattr(error, 'ename', type(error).__name__)}: {getattr(error, 'evalue', error)}".splitlines()[0]
    if isinstance(error, _Stopped):
        reason, status = f"stopped by {signal.Signals(*error.args).name}", 128 + error.args[0]
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # its word on the abandoned cell adds nothing
    elif isinstance(error, DeadKernelError):
        reason = "the kernel died (killed from outside or for lack of memory, or a crash in compiled code)"
    banner = nbformat.v4.new_markdown_cell(f"**This run failed** at {where}: {reason}. What follows is not there.")
    log = failed / f"{path.stem}.log"
    lines = [f"{utc_now()} notebook {path} failed at {where}: {reason}", f"parameters: {values}", "", "cell:", text, ""]
    words = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join([*lines, *getattr(error, "traceback", [])]))
    try:
        write_text_atomic(log, words.rstrip() + "\n")
        write_text_atomic(failed / path.name, nbformat.writes(nbformat.v4.new_notebook(cells=[banner, *started])))
    except OSError as unwritten:
        reason += f" (and no log or copy could be written: {unwritten})"
    words = f"notebook {path.stem} failed at {where}: {reason}\nlog and copy as far as it got: {log}"
    return NotebookFailed(words, status)


@contextmanager
def _stoppable() -> Iterator[None]:
    """Turn the first SIGINT, SIGTERM or SIGHUP into `_Stopped`, so that the kernel ends and the failure is recorded."""
    with ExitStack() as restored:

        def stop(number: int, _frame: Any) -> None:
            restored.close()
            raise _Stopped(number)

        main = threading.current_thread() is threading.main_thread()  # only there can Python take signals
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if main else ():
            if signal.getsignal(number) not in (signal.SIG_IGN, None):  # nohup
                restored.callback(signal.signal, number, signal.signal(number, stop))
        yield
