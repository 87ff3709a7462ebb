"""The first minutes on a GPU, rehearsed: the budget by a fake clock, parts that fail, are killed or take too long."""

import json
import time
from pathlib import Path

import first_minutes
import torch
from first_minutes import CLOSING_S, Part, all_parts

import replication.__main__
from replication.jobs import STOP_S
from scrapl_lib.losses import SCRAPLLoss

ABOUT = {"profile": "smoke", "device_name": "none"}


def test_parts_share_the_time_and_the_last_gets_what_is_left(tmp_path):
    """600 s on a fake clock: each part within its share, the last with its budget; all end in time."""
    now_s, called = [1000.0], {}

    def call(command, log, limit_s):
        called[command[1]] = (limit_s, command)
        log.write_text(f"words of {command[1]}\n")
        now_s[0] += {"quick": 30.0, "slow": limit_s}.get(command[1], limit_s - 1)
        return "ok"

    parts = [Part("first", ["quick"], 0.1), Part("second", ["slow"], 0.5)]
    parts += [Part("third", ["rest", "MINUTES"], least_s=100), Part("fourth", ["never"], least_s=5)]
    assert not first_minutes.first_minutes(parts, tmp_path / "a", tmp_path / "b", 1600.0, ABOUT, call, lambda: now_s[0])
    assert [limit_s for limit_s, _ in called.values()] == [60, 300, 270 - CLOSING_S]
    assert abs(float(called["rest"][1][2]) * 60 - (270 - 1.5 * CLOSING_S)) < 0.1 and now_s[0] <= 1600
    ends = {name: json.loads((tmp_path / "a" / f"{name}.json").read_text())["end"] for name in ("third", "fourth")}
    assert ends == {"third": "ok", "fourth": "NOT STARTED: no time left"}
    summary = (tmp_path / "a/summary.md").read_text()
    assert "words of slow" in summary and "1 s were left, it needs 5 s at least" in summary


HANGS = """
import os, signal, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
os.fork()
while True:
    open({alive!r}, "a").write(".")
    time.sleep(0.05)
"""


def test_a_part_that_fails_is_killed_or_hangs_costs_itself_only(tmp_path, monkeypatch):
    """Real processes; the one that hangs hears no Ctrl-C and has a child, which goes with it."""
    monkeypatch.setattr(first_minutes, "CLOSING_S", 1.0)
    codes = {
        "fails": "print('why it failed'); raise SystemExit(3)",
        "killed": "import os; os.kill(os.getpid(), 9)",
        "hangs": HANGS.format(alive=str(tmp_path / "alive")),
        "good": "print('x' * 50_000, 'done')",
    }
    shares = dict.fromkeys(codes, 1.0) | {"hangs": 0.02}  # of 100 s
    parts = [Part(name, ["-c", code], shares[name], 0) for name, code in codes.items()]
    folder, work, seen = tmp_path / "a", tmp_path / "b", []

    def call(*args):
        seen.append(sorted(path.stem for path in folder.glob("*.json")))
        return first_minutes.call(*args)

    end_s = time.monotonic() + 100
    assert not first_minutes.first_minutes(parts, folder, work, end_s, ABOUT, call)
    ends = {path.stem: json.loads(path.read_text())["end"] for path in folder.glob("*.json")}
    expected = {"fails": "FAILED: exit status 3", "killed": "KILLED by signal 9", "hangs": "STOPPED after its 2 s"}
    assert ends == expected | {"good": "ok"}
    assert [len(there) for there in seen] == [0, 1, 2, 3]  # each is written as it ends
    summary = (folder / "summary.md").read_text()
    assert all(f"| {name} | {end} |" in summary for name, end in ends.items()) and "why it failed" in summary
    assert (folder / "good.txt").stat().st_size == first_minutes.LOG_BYTES
    size = (tmp_path / "alive").stat().st_size
    time.sleep(0.3)
    assert (tmp_path / "alive").stat().st_size == size > 10


def test_the_parts_are_in_order_and_their_commands_parse():
    """The last leaves its runs time to stop."""
    parts = all_parts("smoke", "cpu", Path("/a"), Path("/b"))
    assert tuple(part.name for part in parts) == first_minutes.PARTS
    assert parts[-1].least_s > 3 * STOP_S["smoke"] and "MINUTES" in parts[-1].command
    for part in (parts[0], parts[-1]):
        replication.__main__.parser().parse_args([word.replace("MINUTES", "1") for word in part.command[2:]])


def test_the_parity_of_a_cpu_with_itself_and_a_loss_that_is_wrong(monkeypatch):
    """float32 against float64 at smoke size: within the bounds, but not equal; a loss 0.1 % off is noticed."""
    table = first_minutes.parity("smoke", "cpu")
    assert table["within"].all() and (table["value_error"] > 0).all() and len(table) == 5 + 1 + 4
    forward = SCRAPLLoss.forward
    monkeypatch.setattr(SCRAPLLoss, "forward", lambda self, x, *a, **o: forward(self, x, *a, **o) * wrong(x))
    table = first_minutes.parity("smoke", "cpu").set_index("loss")
    assert not table.loc["scrapl, n2 = 5", "within"] and table.loc["jtfs", "within"]


def wrong(x):
    return 1.001 if x.dtype == torch.float32 else 1
