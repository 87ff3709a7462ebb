"""What must not move while code does: the identity of committed records, every table and claim computed from them."""

import json

import pandas as pd
import pytest

from replication import images, tables
from replication.path_probabilities import recorded_importance
from replication.published import authors_seeds
from replication.records import IMPORTANCE, ROOT, config_hash
from replication.report_card import PARTS, compared, comparison, report_card
from replication.status import runs_on_disk
from replication.tasks import CHIRPLETS, NOT_RUN, TASKS, grid, importance_config

PINNED = ROOT / "tests" / "pinned_hashes.json"  # of the configs of all committed records


def committed() -> dict[str, str]:
    """Folder of each record, relative to results/, and the config hash written in it."""
    results = ROOT / "results"
    found = [path for profile in ("quick", "paper") for path in (results / profile).glob("*/*/seed_*/run.json")]
    return {str(path.parent.relative_to(results)): json.loads(path.read_text())["config_hash"] for path in found}


def test_the_hashes_of_committed_records_are_the_pinned_ones():
    pinned = json.loads(PINNED.read_text())
    assert len(pinned) > 90 and committed() == pinned


def test_today_s_configurations_have_the_pinned_hashes(monkeypatch):
    monkeypatch.delenv("TR808_DIR", raising=False)
    for folder, pinned in json.loads(PINNED.read_text()).items():
        profile, task, method, seed = folder.split("/")
        if task == images.TASK:
            configs = [images.image_config(method, int(seed[5:]), profile)]
        elif method == IMPORTANCE:
            configs = [importance_config(task, profile)]
        else:
            configs = grid(task, profile, [method], [int(seed[5:])])
        assert [config_hash(config.flat) for config in configs] == [pinned], folder


@pytest.fixture(scope="module")
def computed() -> dict[str, pd.DataFrame]:
    """Every table that committed records decide, by the place it is committed at."""
    every = {name: [run for task in TASKS for run in runs_on_disk(task, name, ROOT)] for name in compared("quick")}
    runs, costs = every["quick"], tables.step_costs(ROOT / "results" / "quick" / "tables")
    cards = dict(zip(PARTS, ("report_card", "chirplet_card", "drum_card"), strict=True))
    found = {f"table_{number}": tables.paper_table(number, runs, NOT_RUN) for number in tables.TABLES}
    found["table_6"] = tables.table_6(tables.cells_of(runs), NOT_RUN)
    found["theta_is_effect"] = tables.theta_is_effect(runs, NOT_RUN)
    found |= {name: report_card(part, runs, NOT_RUN, "quick", costs) for part, name in cards.items()}
    found |= {name: table for name, (table, _) in comparison(every, NOT_RUN, "quick", ROOT).items()}
    found = {f"quick/tables/{name}": table for name, table in found.items()}
    found["paper/tables/table_6_authors"] = tables.table_6(tables.seed_cells(authors_seeds()), {})
    for profile in ("quick", "paper"):
        paths, why = {}, {}
        for task in CHIRPLETS:
            table = recorded_importance(task, profile, ROOT)
            if isinstance(table, str):
                why[task] = table
            else:
                paths[task] = tables.modulation_of_paths(table, importance_config(task, profile).flat)
        found[f"{profile}/tables/theta_is_mass"] = tables.mass_in_range(paths, why)
    return found


def test_every_table_is_computed_byte_for_byte_as_committed(computed, tmp_path):
    assert len(computed) == 17
    for place, table in computed.items():
        profile, _, name = place.split("/")
        written = tables.write_table(table, name, profile, tmp_path)
        for path in written:
            ours, theirs = path.read_bytes(), (ROOT / "results" / f"{place}{path.suffix}").read_bytes()
            if path.suffix == ".md":  # the heading has a caption of the notebook's
                ours, theirs = (text.split(b"\n\n", 1)[1] for text in (ours, theirs))
            assert len(ours) > 100 and ours == theirs, place
