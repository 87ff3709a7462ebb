"""Whatever is asked for or lies on disk: it works, or it is refused in words.

Examples are drawn by hypothesis, the same in every run.
"""

import hashlib
import json
import shutil

import numpy as np
import pytest
import synthetic_records as synthetic
import torch
from conftest import TINY, noise
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from replication.__main__ import main
from replication.records import BrokenRecord, config_hash, load_runs, read_run, run_state
from replication.tasks import METHODS, RunConfig, make_config
from scrapl_lib import JTFS

SETTINGS = dict(derandomize=True, deadline=None, database=None)


# ---- configurations of the transform --------------------------------------------------------------------------------


@st.composite
def legal(draw):
    """2^J <= shape, T <= shape, F no longer than the log-frequency axis, which is not rounded down too far."""
    J, Q1 = draw(st.integers(3, 7)), draw(st.sampled_from([1, 2, 3, 5, 8]))
    shape = draw(st.integers(2**J, 2 ** (J + 2)))
    F = draw(st.sampled_from([None, "global", 1, 2]) | st.integers(1, (J + 1) * Q1))
    T = draw(st.sampled_from([None, "global", 1]) | st.integers(1, shape))
    Q2, Q_fr, J_fr = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 2 if F == 1 else 3))
    return dict(shape=shape, J=J, Q1=Q1, Q2=Q2, J_fr=J_fr, Q_fr=Q_fr, F=F, T=T)


@settings(**SETTINGS, max_examples=40)
@given(legal(), st.integers(0, 2**20))
def test_any_legal_configuration_works(config, which):
    """Finite coefficients and gradients; a path is its slice of the full transform within 1e-12, relatively."""
    try:
        jtfs = JTFS(**config)
    except ValueError as error:
        assert "no second-order path" in str(error) and config["J"] < 5
        return
    x = noise(2, 1, config["shape"]).requires_grad_()
    S = jtfs(x)
    (grad,) = torch.autograd.grad(S.sum(), x)
    assert torch.isfinite(S).all() and torch.isfinite(grad).all() and grad.abs().max() > 0
    assert S.shape[:2] == (2, jtfs.first_order_paths + jtfs.n_paths)
    assert len({(p.n2, p.n_fr) for p in jtfs.paths}) == jtfs.n_paths
    index = which % jtfs.n_paths
    part = S[:, jtfs.first_order_paths + index]
    assert (jtfs.unpad(jtfs.path(x, index)) - part).norm() < 1e-12 * part.norm()


NO_INTEGERS = [True, 1.0, float("nan"), "8", "", "Global", [4], (), {}, b"1", 2j, np.ones(2), torch.ones(2).long()]


@pytest.mark.parametrize("name", [*TINY, "T", "F"])
def test_what_is_no_integer_or_far_too_large_is_refused_before_it_is_computed_with(name):
    for value in NO_INTEGERS + ([] if name in "TF" else [None, "global"]):
        with pytest.raises(TypeError, match=rf"^{name} must be an integer"):
            JTFS(**TINY | {name: value})
    for value in (20000, 2**300) if name in ("J", "J_fr", "T", "F") else ():  # 2^20000: more digits than Python prints
        with pytest.raises(ValueError, match=f"^{name} = {value} "):
            JTFS(**TINY | {name: value})


@settings(**SETTINGS, max_examples=200)
@given(st.data())
def test_an_illegal_number_is_named(data):
    """One argument of a legal configuration is broken; the message names it."""
    config = data.draw(legal())
    name = data.draw(st.sampled_from(sorted(config)))
    too_large = {
        "shape": 2 ** config["J"] - 1,
        "J": config["shape"].bit_length(),
        "T": config["shape"] + 1,
        "J_fr": 7,
        "F": max(2 ** config["J_fr"], (config["J"] + 1) * config["Q1"]) + 1,
    }
    values = st.integers(max_value=0)
    if name == "shape":
        values |= st.integers(1, too_large[name])
    elif name in too_large:
        values |= st.integers(too_large[name], 10**6) | st.integers(too_large[name], 2**300)
    value = data.draw(values)
    with pytest.raises(ValueError) as refused:
        JTFS(**{**config, name: value})
    assert name in str(refused.value).replace(",", " ").split()


# ---- records --------------------------------------------------------------------------------------------------------

FORGED = [None, True, -1, 10**30, 1.5, "", "ok", "../../../etc/hostname", [], ["a"], {}, {"a": {"rows": 1}}]
FUZZED = settings(**SETTINGS, max_examples=100)


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """A folder with one record, and the bytes of its files."""
    folder = synthetic.write(tmp_path_factory.mktemp("fuzzed"), "p_loss", 0)
    return folder, {path.name: path.read_bytes() for path in folder.iterdir()}


def lay(record, **changed):
    """The record as it was, but for the files in `changed` (None: not there); returns what the readers say of it."""
    folder, files = record
    shutil.rmtree(folder)
    folder.mkdir()
    for name, data in {**files, **changed}.items():
        if data is not None:
            (folder / name).write_bytes(data)
    said = []
    for use in (
        lambda: read_run(folder).hours,
        lambda: run_state(folder, "0" * 64),
        lambda: load_runs("quick", "granular", None, folder.parents[4]),
    ):
        try:
            said.append(use())
        except BrokenRecord as error:
            assert str(folder) in str(error) and "delete the folder" in str(error) and error.expected and error.found
            said.append(error)
    return said


def lay_forged(record, info, **tables):
    """The same with every hash made anew, as if the writer had a fault."""
    for name, data in tables.items():
        info["files"][name]["sha256"] = hashlib.sha256(data).hexdigest()
    del info["record_sha256"]
    info["record_sha256"] = config_hash(info)
    lay(record, **tables, **{"run.json": json.dumps(info).encode()})


@FUZZED
@given(st.sampled_from(["run.json", "history.csv", "test.csv"]), st.data())
def test_a_record_with_other_bytes_is_refused(record, name, data):
    """Some bytes replaced, taken out or put in, anywhere. White space may come into run.json without harm."""
    old = record[1][name]
    start = data.draw(st.integers(0, len(old) - 1))
    end = data.draw(st.integers(start, min(len(old), start + 9)) | st.just(len(old)))
    new = old[:start] + data.draw(st.binary(max_size=9)) + old[end:]
    assume(new != old)
    said = lay(record, **{name: new})
    same = name == "run.json" and said[1] == "stale" and json.loads(new) == json.loads(old)
    assert same or all(isinstance(each, BrokenRecord) for each in said)


@FUZZED
@given(st.data())
def test_a_forged_record_is_refused_in_words_or_read(record, data):
    """A field of run.json replaced or taken out."""
    info = json.loads(record[1]["run.json"])
    place = data.draw(st.sampled_from([info, info, info["files"], info["files"]["test.csv"], info["config"]]))
    key = data.draw(st.sampled_from(sorted(place.keys() - {"record_sha256"})))
    place[key] = data.draw(st.sampled_from(FORGED))
    if data.draw(st.booleans()):
        del place[key]
    lay_forged(record, info)


@FUZZED
@given(st.sampled_from(["history.csv", "test.csv"]), st.text('step,value\n"1.e-9ä\0 ', max_size=40), st.booleans())
def test_a_forged_table_is_refused_in_words_or_read(record, name, text, with_header):
    header = record[1][name].splitlines(keepends=True)[0] if with_header else b""
    lay_forged(record, json.loads(record[1]["run.json"]), **{name: header + text.encode()})


# ---- configurations of runs and the command line --------------------------------------------------------------------

OPTIONS = ["--task", "--method", "--profile", "--workers", "--budget-minutes"]
VALUES = st.none() | st.booleans() | st.integers(-3, 3) | st.integers(1, 10**6) | st.floats() | st.text(max_size=4)
VALUES |= st.tuples(st.integers(0, 2), st.text(max_size=2))


@settings(**SETTINGS, max_examples=200)
@given(
    st.sampled_from(["granular", "chirplet_fast_fast", "tr808_meso"]),
    st.sampled_from(sorted(METHODS)),
    st.integers(0, 9) | st.integers(-2, 2**33) | VALUES,
    st.dictionaries(st.sampled_from(sorted(RunConfig.__dataclass_fields__)) | st.text(max_size=5), VALUES, max_size=3),
)
def test_any_fields_make_a_config_with_a_hash_or_are_refused(task, method, seed, changes):
    changes = {name: value for name, value in changes.items() if name not in ("task", "method", "seed", "profile")}
    try:
        assert len(config_hash(make_config(task, method, seed, "smoke", **changes).flat)) == 64
        assert not any(isinstance(value, int) and value < 0 for value in changes.values())
    except (ValueError, TypeError) as error:
        assert any(word in str(error) for word in ("must be", "unknown", "finite numbers"))


SEEDS = st.text("0123456789-,. x", max_size=7) | st.builds("{}-{}".format, *[st.integers(0, 10**30)] * 2)


@settings(**SETTINGS, max_examples=200)
@given(st.dictionaries(st.sampled_from(OPTIONS), st.text(max_size=6), max_size=2), st.just("0") | SEEDS)
def test_any_arguments_are_refused_without_a_traceback(given_options, seeds):
    """--profile is never one that is there, so that nothing starts."""
    arguments = ["run", *map("=".join, given_options.items()), f"--seeds={seeds}", "--profile=none"]
    try:
        assert main(arguments) == 2
    except SystemExit as refused:
        assert refused.code == 2
