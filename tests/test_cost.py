"""What measures costs: fits, crossings, memory, Table 5's rows, and the benchmark's summary."""

import itertools
import os
import subprocess
import sys
import time

import bench
import numpy as np
import pandas as pd
import torch

from replication import costs
from replication.files import csv_bytes
from replication.published import methods_in
from replication.records import ROOT
from replication.tasks import TASKS, grid, make_config


def power_law_data():
    """On one axis: a takes 3 size^0.5 ms, b 0.3 size, c 5 throughout; memory 2 size of all."""
    laws = {"a": lambda n: 3 * n**0.5, "b": lambda n: 0.3 * n, "c": lambda n: 5 + 0 * n}
    sizes = np.array([4.0, 16, 64, 256])
    return pd.concat(
        pd.DataFrame({"axis": "batch", "size": sizes, "method": name, "ms": law(sizes), "mib": 2 * sizes})
        for name, law in laws.items()
    )


def test_power_laws_are_found():
    laws = costs.power_laws(power_law_data()).set_index(["method", "quantity"])[["slope", "factor"]]
    expected = {("a", "ms"): (0.5, 3), ("b", "ms"): (1, 0.3), ("c", "ms"): (0, 5), ("b", "mib"): (1, 2)}
    for key, (slope, factor) in expected.items():
        assert abs(laws.loc[key, "slope"] - slope) < 1e-5 and abs(laws.loc[key, "factor"] - factor) < 1e-4


def test_crossings_are_where_the_times_are_equal():
    found = costs.crossings(power_law_data(), "a", ["b", "c"]).set_index("other")
    assert abs(found.loc["b", "size"] - 100) < 0.1 and abs(found.loc["c", "size"] - 25 / 9) < 0.01
    assert found["measured"].tolist() == [True, False]  # 2.8 lies below the least size
    assert abs(found.loc["b", "least_ratio"] - 0.625) < 1e-9 and abs(found.loc["b", "largest_ratio"] - 5) < 1e-9
    assert np.isnan(costs.crossings(power_law_data().assign(ms=7.0), "c", ["b"])["size"]).all()


def test_memory_is_the_most_held_at_once():
    """A call that holds 3 MiB, then 5, then 1, beside what was there before."""

    def call(_):
        held = [torch.zeros(2**18), torch.zeros(2**19)]
        held[0] = torch.zeros(2**19)[:1] + held[0][:1]
        held.append(torch.zeros(2**18))

    before = torch.zeros(2**22)
    assert abs(costs.peak_mib(call, [None], "cpu") - 5) < 0.01 and before.sum() == 0


def test_one_stalled_call_does_not_decide():
    pauses = itertools.chain([0.002, 0.002, 0.3], itertools.repeat(0.002))  # the first call that is timed
    ms = costs.times_ms(lambda _: time.sleep(next(pauses)), [None], 0.001)
    assert len(ms) >= 3 and np.median(ms) < 100


def test_table_5_has_every_row_and_says_what_was_not_run(tmp_path):
    assert costs.spread(range(315), 3) == [0, 157, 314] and costs.spread([7], 5) == [7]
    table = costs.table_5(make_config("granular", "jtfs", 0, "smoke"), 1, "cpu", 2, 0.001, tmp_path).set_index("method")
    assert set(methods_in("table_5")) <= set(table.index) and table.loc["scrapl", "n"] == 2
    assert (table.loc[list(costs.MEASURED), "ms"] > 0).all()
    assert table.loc["jtfs", "paper_ms"] == 1730 and abs(table.loc["scrapl", "paper_times_mss"] - 89.8 / 21.775) < 1e-9
    assert table.loc["ms_clap", "note"] == "not run: weights unavailable" and table.loc["ms_clap", "n"] == 0
    assert table.loc[["scrapl_official", "jtfs_official"], "note"].unique() == ["not run: make bench"]


def test_the_committed_table_5_has_the_committed_benchmark():
    table = pd.read_csv(ROOT / "results/quick/tables/table_5.csv").set_index("method")
    for method, part in {"scrapl_official": "single_path", "jtfs_official": "jtfs"}.items():
        pairs = pd.read_csv(ROOT / f"results/bench/{part}.csv")
        ms = pairs.groupby("path_idx")["scrapl_loss_ms"].median() if part == "single_path" else pairs["scrapl_loss_ms"]
        assert abs(table.loc[method, "ms"] - ms.median()) < 1e-3, method


def test_the_committed_summary_is_that_of_the_committed_pairs(tmp_path):
    folder = ROOT / "results/bench"
    table = bench.summary(folder)
    assert len(table) == 6 and csv_bytes(table) == (folder / "summary.csv").read_bytes()
    assert bench.as_text(table) == (folder / "summary.md").read_text("utf-8")
    assert set(bench.summary(tmp_path)["note"]) == {"not run: make bench"}


def test_the_benchmark_takes_one_path_of_each_n2():
    paths, n_warm = bench.cases("single_path", 7)
    assert len({path.n2 for path in paths}) == len(paths) == 21 and n_warm == 1
    assert len({path.n_fr for path in paths}) == 15 and len(bench.cases("step", 1)[0]) == 7
    drawn, n_warm = bench.cases("update", 40)
    assert len(drawn) == 40 and n_warm == 0 and len({path.index for path in drawn}) > 30


def test_our_side_of_the_benchmark_computes(monkeypatch):
    """With a toy transform; the other side needs an environment of its own."""
    monkeypatch.setattr(bench, "CONFIG", make_config("granular", "jtfs", 0, "smoke").transform())
    for part in ("single_path", "jtfs"):
        assert bench.PARTS[part]("ours", 2, 0)(path=3, repetition=0)()() > 0
    call = bench.update("ours", 1, 2)(path=1)
    assert 0 < call()() < 1e-5 * 1.1 * 604106**0.5  # a first update is the sign of the gradient


def test_the_benchmarks_other_side_needs_no_kymatio():
    code = "import sys; sys.modules['kymatio'] = None; import bench, scrapl_lib.checks; bench.encoder_and_synth()"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'benchmarks'}"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_the_count_of_operations_bytes_and_kernels():
    """Of a product, a complex one, two FFTs of 4 x 1024 numbers, a sum; a view counts nothing. By hand, exactly."""
    a, z = torch.empty(6, 5, device="meta"), torch.empty(5, 7, device="meta", dtype=torch.complex64)
    x, w = (torch.empty(4, 1024, device="meta", dtype=dtype) for dtype in (torch.float32, torch.complex64))
    cases = {
        (2 * 6 * 5 * 6, 4 * (30 + 30 + 36), 1): lambda: a @ a.T,
        (4 * 2 * 7 * 5 * 7, 8 * (35 + 35 + 49), 1): lambda: z.T @ z,
        (5 * 4096 * 10, 8 * 2 * 4096, 1): lambda: torch.fft.fft(w),
        (2.5 * 4096 * 10, 4 * 4096 + 8 * 4 * 513, 1): lambda: torch.fft.rfft(x),
        (4096, 4 * 3 * 4096, 1): lambda: x + x,
        (0, 0, 0): lambda: x[:, None].expand(4, 3, 1024),
    }
    for expected, function in cases.items():
        with costs.Count() as count:
            function()
        assert tuple(count.total) == expected


def test_the_estimate_counts_every_run_and_is_bound_by_the_slowest():
    """Smoke size. A gigantic card is bound by its kernels; hours are steps over steps per second."""
    table = costs.gpu_estimate("smoke", 2).set_index(["kind", "method"])
    configs = [config for task in TASKS for config in grid(task, "smoke")]
    assert table["runs"].sum() == len(configs) and (table["slow_steps_per_s"] < table["fast_steps_per_s"]).all()
    of = table.loc["granular", "scrapl"]
    assert of["bound"] == "kernels" and abs(of["fast_steps_per_s"] * of["kernels"] * costs.KERNEL_S[1] - 1) < 1e-9
    n_steps = 2 * 9  # two seeds, three epochs of three
    assert abs(of["slow_hours"] * 3600 * of["slow_steps_per_s"] / n_steps - 1) < 1e-9
    assert (table.loc["granular", "jtfs"][["gflop", "gb", "kernels"]] > of[["gflop", "gb", "kernels"]]).all()
