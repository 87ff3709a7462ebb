"""The project's frame: pins, targets, notebooks as they lie in git, and who may import whom."""

import ast
import doctest
import importlib
import os
import re
import subprocess
import sys
import tomllib

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from replication.notebooks import notebook_names, notebook_path, parameters_of
from replication.records import ROOT

ORDER = {  # design: a file imports only those above it in its list; scrapl_lib never imports replication
    "scrapl_lib": "checks precision _filters _fast jets jtfs scattering2d transforms losses optim curvature importance "
    "reference synths",
    "replication": "surroundings files baselines encoder circuit_808 data measures records tasks published "
    "stats tables report_card figures costs problem checkpoints path_probabilities references evaluate trainer status "
    "jobs images teaching notebooks doctor __main__",
}
MODULES = [(package, module) for package, order in ORDER.items() for module in order.split()]
TARGETS = "help venv reproduce smoke test coverage status compare doctor site bench gpu peers lab lock clean".split()


def pins() -> list[str]:
    return [line for line in (ROOT / "requirements.lock").read_text().splitlines() if line and not line.startswith("#")]


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_lock_pins_every_direct_requirement_to_a_version_it_allows():
    assert len(pins()) > 50 and all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins())  # no hash, no +cpu
    locked = {pin.split("==")[0].lower().replace("_", "-"): pin.split("==")[1] for pin in pins()}
    assert len(locked) == len(pins()) and locked["torch"] == "2.13.0"
    extras = project()["optional-dependencies"]
    for text in project()["dependencies"] + extras["replication"] + extras["test"] + extras["site"]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(locked[requirement.name.lower().replace("_", "-")]), text


def test_environment_yml_has_the_pins_of_the_lock_and_all_agree_on_python():
    python, _, pip = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert pip["pip"] == [*pins(), "-e ."] and project()["requires-python"] == ">=3.11,<3.14"
    assert SpecifierSet(project()["requires-python"]).contains(python.removeprefix("python="))
    assert "(3, 11) <= sys.version_info[:2] <= (3, 13)" in (ROOT / "Makefile").read_text()


def make(*arguments):
    """What make prints of what it would do."""
    return subprocess.run(["make", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def test_every_make_target_parses_and_is_in_the_help():
    assert re.findall(r"^  make (\w+) +\w", make(), re.MULTILINE) == TARGETS
    assert all(make("-n", target) for target in TARGETS)


def test_make_passes_its_variables_on():
    text = make("-n", "reproduce", "FRESH=1", "PROFILE=paper", "DEVICE=cuda")
    assert "run --task granular --seeds 0-$((2 - 1)) --profile paper --output fresh --device cuda" in text
    assert "notebook --profile paper --output fresh" in text
    assert "--seeds 0-$((10 - 1))" in make("-n", "reproduce", "FRESH=1", "SEEDS=10")
    text = make("-n", "reproduce")
    assert "--profile quick" in text and not {"--output", "--device", "--seeds"} & set(text.split())


@pytest.fixture
def copied(tmp_path):
    """A folder with the files that decide how .venv is made."""
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    return tmp_path


def test_make_without_a_fit_python_says_what_to_do(copied):
    (copied / "old").write_text("#!/bin/sh\nexit 1\n")
    (copied / "old").chmod(0o755)
    found = subprocess.run(["make", "venv", f"PYTHON={copied}/old"], cwd=copied, capture_output=True, text=True)
    assert found.returncode != 0 and "No Python 3.11, 3.12 or 3.13 with venv" in found.stderr
    assert not (copied / ".venv").exists()


def test_make_installs_once_and_warns_where_the_disk_has_no_locks(copied):
    """With locks, two makes at once: test_faults.py."""
    (copied / "sitecustomize.py").write_text("import fcntl\nfcntl.flock = lambda *_: open('/none')")
    (copied / "env").mkdir()
    (copied / "test.mk").write_text("include Makefile\nenv/done: all\n\t$(call once,$@,echo ran >> ran)\nall:\n")
    command = ["make", "-f", "test.mk", "env/done", f"PYTHON={sys.executable}"]
    options = {"env": os.environ | {"PYTHONPATH": str(copied)}, "capture_output": True, "text": True}
    for _ in range(2):
        assert "supports no locks" in subprocess.run(command, cwd=copied, check=True, **options).stderr
    assert (copied / "ran").read_text() == "ran\n" and (copied / "env/done").exists()


@pytest.mark.parametrize("file", ["Makefile", ".ci/run", "pyproject.toml", "requirements.lock", "environment.yml"])
def test_no_registry_is_named(file):
    assert not re.search(r"https?://|--(extra-)?index-url|--find-links", (ROOT / file).read_text())


def source(package: str, module: str) -> str:
    return (ROOT / package / f"{module}.py").read_text()


@pytest.mark.parametrize(("package", "module"), MODULES)
def test_imports_go_up_only(package, module):
    """And every file has its place."""
    assert {path.stem for path in (ROOT / package).glob("*.py")} - {"__init__"} == set(ORDER[package].split())
    place, imported = MODULES.index((package, module)), set()
    for node in ast.walk(ast.parse(source(package, module))):
        if isinstance(node, ast.Import):
            imported |= {tuple(alias.name.split(".")) for alias in node.names if alias.name.split(".")[0] in ORDER}
        elif isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] in ORDER):
            inside = ".".join(filter(None, [package if node.level else "", node.module])).split(".")
            imported |= {tuple(inside)} if len(inside) > 1 else {(inside[0], alias.name) for alias in node.names}
    inner = {name for name in imported if name in MODULES}
    assert inner <= set(MODULES[:place])
    assert package == "replication" or not any(name[0] == "replication" for name in imported)


@pytest.mark.parametrize(("package", "module"), [names for names in MODULES if ">>>" in source(*names)])
def test_docstring_examples_run(package, module):
    found = doctest.testmod(importlib.import_module(f"{package}.{module}"))
    assert found.attempted > 0 and found.failed == 0


def test_the_library_needs_nothing_of_the_replication():
    """A fresh interpreter in which whatever else the environment holds cannot be imported."""
    blocked = (
        "pandas matplotlib seaborn papermill nbclient nbformat IPython ipykernel ipywidgets jupyter_client jupyterlab "
        "tqdm nnAudio auraloss soundfile filelock submitit replication"
    )
    code = f"""
import sys
sys.modules |= dict.fromkeys({blocked.split()!r})
import scrapl_lib
from scrapl_lib import synths
assert scrapl_lib.SCRAPLLoss(shape=1024, J=6, Q1=4, Q2=1, J_fr=2, Q_fr=1).n_paths > 0
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


UNTRUSTED = set(  # what runs code from a file, and what opens a connection: name or last attribute
    "pickle cPickle dill joblib marshal shelve read_pickle to_pickle eval exec compile __import__ urllib urlopen "
    "urlretrieve requests httpx aiohttp http ftplib socket smtplib hub huggingface_hub snapshot_download "
    "hf_hub_download load_state_dict_from_url download_url_to_file".split()
)
WEIGHTS = {"baselines": {"hub", "download_url_to_file"}}  # PANNs', on request; their URL, place and hash are printed


def untrusted(source: str) -> set[str]:
    """Names in a module's source that are among UNTRUSTED, and loading calls that may run what they load."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            found |= {part for module in modules for part in module.split(".")} & UNTRUSTED
        elif isinstance(node, ast.Attribute) and not isinstance(node.value, ast.Constant):
            found |= {node.attr} & (UNTRUSTED - {"eval", "compile"})  # module.eval() and re.compile() are other things
        elif isinstance(node, ast.Name):
            found |= {node.id} & UNTRUSTED
        elif isinstance(node, ast.Call):
            called, options = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
            unsafe = called == "torch.load" and options.get("weights_only") != "True"
            found |= {called} if unsafe or options.get("allow_pickle", "False") != "False" else set()
    return found


@pytest.mark.parametrize(("package", "module"), MODULES)
def test_nothing_is_unpickled_evaluated_or_fetched_but_weights(package, module):
    assert untrusted(source(package, module)) == WEIGHTS.get(module, set())


def test_the_search_for_untrusted_calls_finds():
    code = ["import pickle", "from urllib.request import urlopen", "import http.client as c", "eval('1')"]
    code += ["torch.load(f)", "torch.load(f, weights_only=False)", "np.load(f, allow_pickle=True)"]
    assert all(map(untrusted, [*code, "torch.hub.load('a', 'b')"])) and not untrusted(
        "torch.load(f, weights_only=True)"
    )


@pytest.mark.parametrize("name", notebook_names())
def test_notebook_in_git_is_clean_strict_and_refuses_what_is_mistyped(name):
    book = nbformat.read(notebook_path(name), as_version=4)
    nbformat.validate(book)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert not [cell for cell in book.cells if "injected-parameters" in cell.metadata.get("tags", [])]
    assert book.metadata.kernelspec.name == "python3" and "widgets" not in book.metadata
    assert book.cells[0].source.startswith("# ")
    assert {"profile", "output"} <= set(parameters_of(name)) and "parameters" in code[0].metadata.get("tags", [])
    assert all(re.fullmatch(r"\w+: \w+ = .+  # \S.*", line) for line in code[0].source.splitlines())
    assert f'config = setup(globals(), "{name}")' in code[1].source
    assert sum("setup(globals()" in cell.source for cell in code) == 1
    namespace = {}
    exec(code[0].source, namespace)
    namespace["profile"] = "quik"
    with pytest.raises(ValueError, match="unknown profile 'quik': did you mean 'quick'"):
        exec(code[1].source, namespace)


def test_a_mistyped_method_stops_notebook_05_before_it_draws_or_trains():
    """Parameters, set-up and imports are its first three cells."""
    book = nbformat.read(notebook_path("05_granular"), as_version=4)
    parameters, *two = [cell.source for cell in book.cells if cell.cell_type == "code"][:3]
    namespace = {}
    exec(parameters, namespace)
    namespace["methods"] = "p_loss, jtsf"
    with pytest.raises(ValueError, match="unknown method 'jtsf': did you mean 'jtfs'"):
        for source in two:
            exec(source, namespace)


def test_licence_and_citation():
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    authors = [author["family-names"] for author in citation["preferred-citation"]["authors"]]
    assert authors == ["Mitcheltree", "Lostanlen", "Benetos", "Lagrange"]
    assert citation["license"] == project()["license"] == "Apache-2.0"
