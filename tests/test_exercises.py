"""The exercises of the notebooks: every solution passes its own check, nothing else does, and every live part has its static twin."""

import ast
import functools
import re
import sys
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
import torch

from replication import teaching as demos
from replication.exercises import NOT_YET, check
from replication.notebooks import notebook_path
from scrapl_lib.losses import SCRAPLLoss

METHOD_NOTEBOOKS = [
    "00_start_here",
    "01_paths_and_jtfs",
    "02_one_random_path",
    "03_p_adam_and_p_saga",
    "04_theta_importance_sampling",
    "07_tr808",
]


@functools.cache
def cells(name):
    return nbformat.read(notebook_path(name), as_version=4).cells


@functools.cache
def definitions(name):
    """What a notebook's first three cells of code define: parameters (profile smoke), set-up, imports."""
    namespace = {}
    parameters, *two = [cell.source for cell in cells(name) if cell.cell_type == "code"][:3]
    for source in (parameters, 'profile = "smoke"', *two):
        exec(source, namespace)
    return namespace


def exercises(name):
    """(source of the exercise, source of its solution) of a notebook"""
    found = []
    for cell, after in zip(cells(name), cells(name)[1:]):
        if "exercise" in cell.metadata.get("tags", []):
            solution = re.search(
                r"^<details>.*?^```python\n(.*?)^```.*^</details>", after.source, re.DOTALL | re.MULTILINE
            )
            found.append((cell.source, solution[1]))
    return found


def verdict(name, source, solution="", spoil=None):
    """What the exercise's check says once `solution` has followed the reader's part."""
    *lines, last = ast.parse(source).body
    assert "..." in source and last.value.func.id == "check"
    namespace = dict(definitions(name))
    if spoil:
        namespace["check"] = lambda answer, *arguments, **options: check(spoil(answer), *arguments, **options)
    parts = [part for line in lines for part in (ast.unparse(line), solution if "..." in ast.unparse(line) else "")]
    exec("\n".join(parts), namespace)
    return eval(ast.unparse(last), namespace).data


def off_by_a_tenth(answer):
    return (lambda *arguments: 1.1 * answer(*arguments)) if callable(answer) else 1.1 * answer


@pytest.mark.parametrize("name", METHOD_NOTEBOOKS)
def test_three_exercises_whose_solutions_and_nothing_else_pass(name):
    """Seeds and tolerances are in the exercises; a wrong answer is the solution's, off by a tenth."""
    found = exercises(name)
    assert len(found) == 3
    for source, solution in found:
        assert verdict(name, source) == NOT_YET
        assert verdict(name, source, solution) == "**Right.**", solution
        assert verdict(name, source, solution, off_by_a_tenth).startswith("**Not yet**"), solution


@pytest.mark.parametrize(
    "answer, words",
    [
        (..., "Not answered yet"),
        (lambda S: ..., "Not answered yet"),
        (2.0, "Right"),
        (lambda S: S.sum(), "Right"),
        (2, "Right"),
        (2.1, "got 2.1"),
        (float("nan"), "got nan"),
        (None, "got None"),
        ("two", "got 'two'"),
        ([2.0], "got numbers of shape (1,)"),
        (torch.ones(2, 1), "got numbers of shape (2, 1)"),
        (lambda: 2.0, "raised TypeError"),
        (lambda S: S @ "x", "raised TypeError"),
        (lambda S: 1 / 0, "raised ZeroDivisionError"),
        (object(), "got <object"),
        ([[1], [1, 2]], "got [[1]"),
    ],
)
def test_check_says_so_in_words_whatever_comes(answer, words):
    assert words in check(answer, 2.0, torch.ones(2), hint="Think.").data


def test_check_compares_arrays_within_a_fraction_of_the_largest():
    expected = torch.tensor([1.0, -100.0])
    assert check([1.9, -100.0], expected, tol=0.01).data == "**Right.**"
    assert check([2.1, -100.0], expected, tol=0.01, hint="Think.").data.endswith("the numbers are not. Think.")


@pytest.mark.parametrize("name", METHOD_NOTEBOOKS)
def test_what_is_under_sliders_is_also_drawn_once_without(name):
    """`interact` draws nothing in an executed copy: the same function must be called by the notebook itself."""
    called, live = set(), set()
    for cell in cells(name):
        for node in ast.walk(ast.parse(cell.source if cell.cell_type == "code" else "")):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                called.add(node.func.id)
                live |= {node.args[0].id} if node.func.id == "interact" else set()
    assert live and live <= called


def test_the_worked_examples_are_short_and_learn():
    """Notebook 10 at the quick size, seed 0: in the last tenth of the steps below 8 tenths of always guessing 0.5, the
    notebook's own rule."""
    namespace = {"config": SimpleNamespace(seed=0), "n_steps": 300}
    sources = [cell.source for cell in cells("10_bring_your_own") if "worked-example" in cell.metadata.get("tags", [])]
    assert len(sources) == 2 and all(len(source.splitlines()) < 40 for source in sources)
    for source in sources:
        exec(source, namespace)
    chance = (namespace["test"] - 0.5).abs().mean()
    for errors, n_steps in ((namespace["scrapl_errors"], 300), (namespace["own_errors"], 600)):
        assert len(errors) == n_steps and torch.stack(errors[-n_steps // 10 :]).mean() < 0.8 * chance


class _Unspeakable:
    def __repr__(self):
        raise RuntimeError


@pytest.mark.parametrize(
    "answer",
    [10**400, _Unspeakable(), lambda: sys.exit(0), torch.zeros(3, device="meta"), torch.zeros((), device="meta")],
)
def test_check_raises_at_nothing(answer):
    assert str(check(answer, 1.0).data).startswith("**Not yet**")


def test_slow_sounds_are_played_at_a_rate_that_browsers_take(monkeypatch):
    """1024 Hz is below what Chromium decodes; a tone of 100 Hz stays one: 1e-2 away from the ends."""
    played = []
    monkeypatch.setattr(demos, "Audio", lambda audio, rate: played.append((audio, rate)))
    monkeypatch.setattr(demos, "display", lambda *_: None)
    monkeypatch.setattr(demos.plt, "show", lambda: None)
    x = torch.sin(2 * torch.pi * 100 * torch.arange(1024) / 1024)
    demos.show_sound(x, SCRAPLLoss(shape=1024, J=5, Q1=2, Q2=1, J_fr=2, Q_fr=1).jtfs, 1024, window=64)
    demos.plt.close("all")
    ((audio, rate),) = played
    assert rate == 8192 and audio.shape == (8192,)
    assert abs(audio - np.sin(2 * np.pi * 100 * np.arange(8192) / 8192))[500:-500].max() < 1e-2
