"""Records: what is written is what is read; whatever was changed afterwards is refused by name."""

import contextlib
import errno
import fcntl
import json
import multiprocessing
import os
import warnings

import numpy as np
import pandas as pd
import pytest

from replication import records
from replication.files import locked, write_text_atomic
from replication.records import BrokenRecord, config_hash, load_runs, read_run, run_folder, run_state

CONFIG = {"task": "granular", "method": "scrapl_plain", "seed": 3, "lr": 1e-3, "pools": ((2, 2), (2, 2)), "n": 400}
ABOUT = {"start_utc": records.utc_now(), "device": "cpu"}


def write(output, seed=3, scale=1.0, status="ok", method="scrapl_plain", **config):
    folder = run_folder("quick", "granular", method, seed, output)
    resolved = {**CONFIG, "method": method, "seed": seed, **config}
    steps = [(step, "val", "theta_synth_l1", scale * 1000 / (step + 3), 0.1 * step) for step in (0, 96, 192)]
    tested = [("theta_synth_l1", scale * 1000 / 3, "permille"), ("val_convergence_steps", np.nan, "steps")]
    rows = zip(("history", "test"), (steps, tested), records.COLUMNS.values())
    tables = {name: pd.DataFrame(values, columns=columns) for name, values, columns in rows}
    timing = {"median": np.float32(2.5), "q25": 2.0, "q75": 3.0, "n": np.int64(40)}
    records.write_run(folder, status=status, config=resolved, **tables, **ABOUT, train_step_ms=timing)
    return folder


def test_round_trip(tmp_path):
    """How numbers are written, and what identifies a config: test_pinned."""
    folder = write(tmp_path)
    assert folder == tmp_path / "results/quick/granular/scrapl_plain/seed_3"
    assert sorted(p.name for p in folder.iterdir()) == ["history.csv", "run.json", "test.csv"]
    run = read_run(folder)
    assert (run.profile, run.task, run.method, run.seed) == ("quick", "granular", "scrapl_plain", 3)
    assert run.ok and run.config["lr"] == 1e-3
    assert run.info["train_step_ms"] == {"median": 2.5, "q25": 2, "q75": 3, "n": 40}
    assert run.history["step"].tolist() == [0, 96, 192] and run.history["split"].tolist() == ["val"] * 3
    assert np.abs(run.history["value"] - 1000 / (run.history["step"] + 3)).max() < 1e-6  # 9 digits of 333.333...
    assert abs(run.value("theta_synth_l1") - 333.333333) < 1e-12
    assert np.isnan(run.value("val_convergence_steps")) and np.isnan(run.value("no such metric"))
    info = json.loads((folder / "run.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    assert all(info[key] for key in ("code_version", "device", "threads", "start_utc", "end_utc"))
    assert info["files"]["history.csv"]["rows"] == 3
    assert info["peak_memory_mb"] > 10 and info["versions"]["numpy"] == np.__version__


BARE = json.dumps({"status": "ok", "record_sha256": config_hash({"status": "ok"})}).encode()
DAMAGE = {  # what is done to which file; what it was expected to be, what is found
    "a value edited": ("history.csv", lambda text: text.replace(b"333.333", b"133.333", 1), "3 rows", "3 rows"),
    "a row dropped": ("history.csv", lambda text: text[: text[:-1].rindex(b"\n") + 1], "3 rows", "2 rows"),
    "removed": ("test.csv", None, "2 rows", "no such file"),
    "info edited": ("run.json", lambda text: text.replace(b": 2.5", b": 1.5"), "fields with SHA-256", "edited by hand"),
    "NaN": ("run.json", lambda text: text.replace(b'"median": 2.5', b'"median": NaN'), "JSON", "ValueError"),
    "bare": ("run.json", lambda text: BARE, "JSON", "KeyError"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused_with_file_expected_found_and_mend(tmp_path, damage):
    folder = write(tmp_path)
    name, change, expected, found = DAMAGE[damage]
    path = folder / name
    path.unlink() if change is None else path.write_bytes(change(path.read_bytes()))
    mend = f"delete the folder {folder} and run: python -m replication run --task granular --method scrapl_plain "
    for use in (read_run, lambda f: run_state(f, ""), lambda f: load_runs("quick", "granular", None, tmp_path)):
        with pytest.raises(BrokenRecord) as caught:
            use(folder)
        assert caught.value.file == path and expected in caught.value.expected and found in caught.value.found
        assert mend + f"--seeds 3 --profile quick --output {tmp_path}" in str(caught.value)


def test_copied_record_is_refused(tmp_path):
    folder = write(tmp_path)
    copy = folder.rename(folder.with_name("seed_4"))
    with pytest.raises(BrokenRecord, match="seed_4, as its folder says, found that of quick/.*/seed_3"):
        read_run(copy)
    with pytest.raises(BrokenRecord, match="run.json: expected a finished or failed run, found no such file"):
        read_run(folder)


def test_load_runs_takes_the_expected_and_names_the_stale(tmp_path):
    for seed in (10, 2):
        write(tmp_path, seed=seed)
    write(tmp_path, seed=3, lr=0.5)
    write(tmp_path, seed=4, method="p_loss", status="failed:nonfinite")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = load_runs("quick", "granular", None, tmp_path)
    assert [(r.method, r.seed) for r in found] == [("p_loss", 4), *(("scrapl_plain", seed) for seed in (2, 3, 10))]
    expected = {("scrapl_plain", seed): config_hash({**CONFIG, "seed": seed}) for seed in (1, 2, 3)}
    with pytest.warns(UserWarning, match=r"stale.*scrapl_plain seed 3"):
        found = load_runs("quick", "granular", expected, tmp_path)
    assert [(r.method, r.seed) for r in found] == [("scrapl_plain", 2)]
    assert (tmp_path / "results/quick/granular/scrapl_plain/seed_3/run.json").exists()


def test_failed_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "x.txt"
    write_text_atomic(path, "old\n")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_text_atomic(path, "new\n")
    assert path.read_bytes() == b"old\n" and [p.name for p in tmp_path.iterdir()] == ["x.txt"]


def test_killed_write_counts_as_missing_and_its_litter_goes(tmp_path, monkeypatch):
    folder = write(tmp_path)
    real = records.write_bytes_atomic

    def killed(path, data):
        if path.name == "test.csv":
            raise KeyboardInterrupt
        real(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(records, "write_bytes_atomic", killed)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, scale=2.0)
    assert run_state(folder, config_hash(CONFIG)) == "missing"
    (folder / ".test.csv.0123.tmp").write_text("metric,va")
    write(tmp_path, scale=2.0)
    assert sorted(p.name for p in folder.iterdir()) == ["history.csv", "run.json", "test.csv"]
    assert abs(read_run(folder).value("theta_synth_l1") - 666.666667) < 1e-9


def _write_often(output, scale):
    for _ in range(10):
        with locked(output / "lock", "waiting"):
            write(output, scale=scale)


def test_two_writers_and_a_reader_never_see_a_mix(tmp_path):
    """The writers wait for each other; the reader, who holds no lock, sees a whole record or none."""
    folder = write(tmp_path)
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_often, args=(tmp_path, scale)) for scale in (1.0, 2.0)]
    for writer in writers:
        writer.start()
    states = []
    while any(writer.is_alive() for writer in writers):
        states.append(run_state(folder, config_hash(CONFIG)))  # raises BrokenRecord on a mix
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert {"done"} <= set(states) <= {"done", "missing"} and len(states) > 10
    run = read_run(folder)
    scale = run.value("theta_synth_l1") / 333.333333
    assert abs(run.history["value"][0] - scale * 333.333333) < 1e-5 and round(scale) in (1, 2)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EIO])
def test_where_the_disk_has_no_locks_a_warning_says_so_and_work_goes_on(tmp_path, monkeypatch, capsys, code):
    def flock(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    path, inside = tmp_path / "a" / "lock", []
    with pytest.raises(OSError, match=os.strerror(code)) if code == errno.EIO else contextlib.nullcontext():
        with locked(path, "waiting") as waited:
            inside.append(waited)
    assert inside == ([] if code == errno.EIO else [False])
    said = f"warning: the disk of {path.parent} supports no locks ({os.strerror(code)})"
    assert (said in capsys.readouterr().err) == (code != errno.EIO)


def test_hours_are_those_of_the_process_or_of_all_steps_if_these_took_longer(tmp_path, monkeypatch):
    times = {"start_utc": "2026-01-01T23:00:00+00:00", "end_utc": "2026-01-02T00:30:00+00:00"}
    assert records.hours_of(times) == records.hours_of(times, 5000.0) == 1.5
    assert records.hours_of(times, 7200.0) == 2.0  # resumed: its last process took less
    monkeypatch.setitem(ABOUT, "start_utc", records.utc_now())
    assert abs(read_run(write(tmp_path)).hours - 19.2 / 3600) < 1e-6  # within a second; 19.2 s of training steps
