"""What must not move while code does: the identity of committed records; tables, claims and figures made of them."""

import json

import pytest
from PIL import Image

from replication import figures, images, tables
from replication.files import csv_bytes
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
def every() -> dict[str, list]:
    """The runs of all tasks, by profile."""
    return {name: [run for task in TASKS for run in runs_on_disk(task, name, ROOT)] for name in compared("quick")}


@pytest.fixture(scope="module")
def costs() -> dict[str, float]:
    return tables.step_costs(ROOT / "results" / "quick" / "tables")


@pytest.fixture(scope="module")
def probabilities() -> dict[str, tuple[dict, dict]]:
    """By profile: what is known of the paths of each chirplet task, and why some are missing."""
    found = {}
    for profile in ("quick", "paper"):
        recorded = {task: recorded_importance(task, profile, ROOT) for task in CHIRPLETS}
        why = {task: table for task, table in recorded.items() if isinstance(table, str)}
        there = {task: importance_config(task, profile).flat for task in recorded if task not in why}
        found[profile] = {t: tables.modulation_of_paths(recorded[t], flat) for t, flat in there.items()}, why
    return found


def test_every_table_is_computed_byte_for_byte_as_committed(every, costs, probabilities, tmp_path):
    runs, cards = every["quick"], dict(zip(PARTS, ("report_card", "chirplet_card", "drum_card"), strict=True))
    found = {f"table_{number}": tables.paper_table(number, runs, NOT_RUN) for number in tables.TABLES}
    found["table_6"] = tables.table_6(tables.cells_of(runs), NOT_RUN)
    found["theta_is_effect"] = tables.theta_is_effect(runs, NOT_RUN)
    found |= {name: report_card(part, runs, NOT_RUN, "quick", costs) for part, name in cards.items()}
    found |= {name: table for name, (table, _) in comparison(every, NOT_RUN, "quick", ROOT).items()}
    found = {f"quick/tables/{name}": table for name, table in found.items()}
    found["paper/tables/table_6_authors"] = tables.table_6(tables.seed_cells(authors_seeds()), {})
    found |= {f"{p}/tables/theta_is_mass": tables.mass_in_range(*there) for p, there in probabilities.items()}
    assert len(found) == 17
    for place, table in found.items():
        profile, _, name = place.split("/")
        for path in tables.write_table(table, name, profile, tmp_path):
            ours, theirs = path.read_bytes(), (ROOT / "results" / f"{place}{path.suffix}").read_bytes()
            if path.suffix == ".md":  # the heading has a caption of the notebook's
                ours, theirs = (text.split(b"\n\n", 1)[1] for text in (ours, theirs))
            assert len(ours) > 100 and ours == theirs, place


def test_every_figure_shows_and_says_what_the_committed_one_does(every, costs, probabilities):
    """Numbers byte for byte, captions as in the committed pictures; to one of them its notebook adds a sentence."""
    granular, chirplets, drums = ([run for run in every["quick"] if run.task in tasks] for tasks in PARTS.values())
    measures = ("transient_loudness_l1", "transient_spectral_centroid_l1", "decay_loudness_l1")
    plots = {
        "quick/figure_1": figures.figure_1(granular, "quick", NOT_RUN, costs),
        "quick/figure_2": figures.figure_2(granular, "quick", NOT_RUN, costs),
        "quick/figure_3": figures.figure_1(granular, "quick", NOT_RUN, costs, "jtfs_distance"),
        "quick/figure_4": figures.figure_4(granular, "quick", NOT_RUN),
        "quick/figure_5": figures.figure_5(chirplets, "quick", NOT_RUN),
        "quick/slope_by_seed": figures.by_seed(granular, "theta_slope_l1", "quick", NOT_RUN),
        "quick/drum_features": figures.drum_features(drums, measures, "quick", NOT_RUN),
    }
    for profile, (paths, why) in probabilities.items():
        ranges = {task: importance_config(task, profile).flat for task in CHIRPLETS}
        plots[f"{profile}/figure_6"] = figures.figure_6(paths, ranges, profile, why)
    for place, plot in plots.items():
        committed, profile = ROOT / "figures" / place, place.split("/")[0]
        assert csv_bytes(plot.data.assign(profile=profile)) == committed.with_suffix(".csv").read_bytes(), place
        assert len(plot.data) > 8 and plot.caption
        said = Image.open(committed.with_suffix(".png")).text["Description"]
        assert said.partition(" Made from: ")[0] == plot.caption, place
