"""The doctor sees each thing that is wrong, says how to mend it, and its exit status follows."""

import os
import shutil
import sys
from importlib import metadata
from types import SimpleNamespace

import pytest
import synthetic_records as synthetic

from replication import doctor
from replication.__main__ import main
from replication.records import read_run, run_folder, write_run
from replication.tasks import make_config


@pytest.fixture
def output(tmp_path):
    """Two stale records and one that is whole."""
    folders = [synthetic.write(tmp_path, "p_loss", seed) for seed in range(3)]
    run, config = read_run(folders[2]), make_config("granular", "p_loss", 2, "quick").flat
    about = {"start_utc": run.info["start_utc"], "device": "cpu", "threads": 1}
    write_run(folders[2], status="ok", config=config, history=run.history, test=run.test, **about)
    return tmp_path


def said(output, capsys, status):
    assert main(["doctor", "--output", str(output)]) == status
    return capsys.readouterr().out


def test_nothing_wrong(output, capsys):
    text = said(output, capsys, 0)
    assert "nothing that is needed is wrong" in text and "WRONG" not in text
    assert f"Python 3.{sys.version_info[1]}" in text and f"torch {metadata.version('torch').split('+')[0]}" in text
    assert "records of quick: 1 whole, 2 stale, 0 broken" in text and "optional PANNs: package" in text
    stale = run_folder("quick", "granular", "p_loss", 0, output)
    assert f"note   {stale} was made with another configuration and is not used\n       -> delete the folder" in text


def test_a_broken_record_is_wrong_and_one_of_no_method_is_said(output, capsys, monkeypatch):
    monkeypatch.setitem(synthetic.OUTCOME, "no_method", synthetic.OUTCOME["p_loss"])
    synthetic.write(output, "no_method", 0)
    folder = run_folder("quick", "granular", "p_loss", 2, output)
    (folder / "test.csv").unlink()
    text = said(output, capsys, 1)
    assert f"WRONG  broken record {folder / 'test.csv'}: expected 6 rows" in text and "found no such file" in text
    assert f"\n       -> delete the folder {folder} and run: python -m replication run" in text
    assert "unknown method 'no_method'" in text and "0 whole, 3 stale, 1 broken" in text
    assert text.endswith("\n1 things wrong\n")


def test_versions_are_held_against_the_lock(output, capsys, monkeypatch):
    version = metadata.version

    def fake(name):
        if name == "papermill":
            raise metadata.PackageNotFoundError(name)
        return {"scipy": "1.17.0", "torch": "2.12.9+cpu"}.get(name) or version(name)

    monkeypatch.setattr(metadata, "version", fake)
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.14.0")
    text = said(output, capsys, 1)
    assert "WRONG  papermill is not installed\n       -> pip install papermill==" in text
    assert "WRONG  scipy 1.17.0, but pyproject.toml wants scipy<1.17\n       -> pip install scipy==1.16" in text
    assert "note   torch 2.12.9, tested with 2.13.0" in text and "WRONG  Python 3.14.0" in text
    assert text.endswith("\n3 things wrong\n")


def test_a_disk_without_room_or_rights_is_wrong(output, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5e8))
    assert "WRONG  0.5 GB free on the disk of" in said(output, capsys, 1)
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert f"WRONG  {output} cannot be written to" in said(output, capsys, 1)
