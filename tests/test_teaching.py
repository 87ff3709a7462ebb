"""What the notebooks share: solutions of exercises pass and nothing else does, live parts have static twins, slopes."""

import ast
import functools
import re
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import nbformat
import numpy as np
import pytest
import torch

from replication import teaching
from replication.data import meso_seeds
from replication.notebooks import notebook_path
from replication.tasks import make_config
from replication.teaching import NOT_YET, check, demo_config, path_losses, path_slopes, show_source
from replication.trainer import Training
from scrapl_lib.losses import SCRAPLLoss

WITH_EXERCISES = ["00_start_here", "01_paths_and_jtfs", "02_one_random_path", "03_p_adam_and_p_saga"]
WITH_EXERCISES += ["04_theta_importance_sampling", "07_tr808"]
SOLUTION = re.compile(r"^<details>.*?^```python\n(.*?)^```.*^</details>", re.DOTALL | re.MULTILINE)


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


@pytest.mark.parametrize("name", WITH_EXERCISES)
def test_three_exercises_whose_solutions_and_nothing_else_pass(name):
    """Seeds and tolerances are in the exercises; a wrong answer is the solution's, off by a tenth."""
    pairs = zip(cells(name), cells(name)[1:])
    found = [(cell.source, after.source) for cell, after in pairs if "exercise" in cell.metadata.get("tags", [])]
    assert len(found) == 3
    for source, text in found:
        solution = SOLUTION.search(text)[1]
        assert verdict(name, source) == NOT_YET
        assert verdict(name, source, solution) == "**Right.**", solution
        assert verdict(name, source, solution, off_by_a_tenth).startswith("**Not yet**"), solution


class Unspeakable:
    def __repr__(self):
        raise RuntimeError


ANSWERS = [(..., "Not answered yet"), (lambda S: ..., "Not answered yet"), (2, "Right"), (lambda S: S.sum(), "Right")]
ANSWERS += [(2.1, "got 2.1"), (float("nan"), "got nan"), ("two", "got 'two'"), ([2.0], "got numbers of shape (1,)")]
ANSWERS += [([[1], [1, 2]], "got [[1]"), (torch.zeros((), device="meta"), "got tensor"), (10**400, "got 1000")]
ANSWERS += [(Unspeakable(), "got <Unspeakable"), (lambda: 2.0, "raised TypeError")]
ANSWERS += [(lambda S: sys.exit(0), "raised SystemExit")]


@pytest.mark.parametrize("answer, words", ANSWERS)
def test_check_says_so_in_words_whatever_comes(answer, words):
    assert words in check(answer, 2.0, torch.ones(2), hint="Think.").data


def test_check_compares_arrays_within_a_fraction_of_the_largest():
    expected = torch.tensor([1.0, -100.0])
    assert check([1.9, -100.0], expected, tol=0.01).data == "**Right.**"
    assert check([2.1, -100.0], expected, tol=0.01, hint="Think.").data.endswith("the numbers are not. Think.")


@pytest.mark.parametrize("name", WITH_EXERCISES)
def test_what_is_under_sliders_is_also_drawn_once_without(name):
    """`interact` draws nothing in an executed copy: the same function must be called by the notebook itself."""
    nodes = [node for cell in cells(name) if cell.cell_type == "code" for node in ast.walk(ast.parse(cell.source))]
    calls = [node for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    live = {call.args[0].id for call in calls if call.func.id == "interact"}
    assert live and live <= {call.func.id for call in calls}


def test_the_worked_examples_are_short_and_learn():
    """Notebook 10 at the quick size, seed 0; its own rule: at last below 8 tenths of always guessing 0.5."""
    namespace = {"config": SimpleNamespace(seed=0), "n_steps": 300}
    sources = [cell.source for cell in cells("10_bring_your_own") if "worked-example" in cell.metadata.get("tags", [])]
    assert len(sources) == 3 and all(len(source.splitlines()) < 40 for source in sources)
    for source in sources:
        exec(source, namespace)
    chance = (namespace["test"] - 0.5).abs().mean()
    for name, n_steps in (("scrapl_errors", 300), ("own_errors", 600), ("transform_errors", 600)):
        errors = namespace[name]
        assert len(errors) == n_steps and torch.stack(errors[-n_steps // 10 :]).mean() < 0.8 * chance


def test_slow_sounds_are_played_at_a_rate_that_browsers_take(monkeypatch):
    """1024 Hz is below what Chromium decodes; a tone stays one: 1e-2 away from the ends."""
    player = Mock()
    monkeypatch.setattr(teaching, "Audio", player)
    monkeypatch.setattr(teaching, "display", Mock())
    monkeypatch.setattr(teaching.plt, "show", teaching.plt.close)
    x = torch.sin(2 * torch.pi * 100 * torch.arange(1024) / 1024)
    teaching.show_sound(x, SCRAPLLoss(shape=1024, J=5, Q1=2, Q2=1, J_fr=2, Q_fr=1).jtfs, 1024, window=64)
    (audio,), options = player.call_args
    assert options == {"rate": 8192} and audio.shape == (8192,)
    assert abs(audio - np.sin(2 * np.pi * 100 * np.arange(8192) / 8192))[500:-500].max() < 1e-2


def test_sources_are_shown_whole():
    shown = show_source(show_source, teaching.noise_to_signal).data
    assert shown.startswith("````python\ndef show_source(") and shown.endswith("````") and '"""The sources of' in shown
    assert "\n\ndef noise_to_signal(" in shown and shown.count("````") == 4  # the fence, and the two in show_source


@pytest.mark.parametrize("task", ["granular", "chirplet_slow_slow"])  # the chirplet's window is constant for gradients
def test_slopes_of_all_paths_are_those_of_backward_passes(task):
    """Seed 0, smoke, 3 pairs; within 1e-6 of the largest slope (central differences over 1e-6)."""
    demo = demo_config("smoke", "scrapl_no_theta_is", 0)
    config = demo if task == "granular" else make_config(task, "scrapl_no_theta_is", 0, "smoke")
    training = Training(config, torch.device("cpu"))
    theta = torch.rand(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    render, x = functools.partial(training.synth, seeds=meso_seeds(0, 1, 3)), training.x[:3].double()
    losses = path_losses(training.loss, render(theta), x)
    expected = torch.stack([torch.autograd.grad(loss.sum(), theta, retain_graph=True)[0] for loss in losses])
    found = path_slopes(training.loss, render, theta, x)
    assert found.shape == expected.shape == (training.loss.n_paths, 3, 2) and expected.abs().max() > 0
    assert (found - expected).abs().max() < 1e-6 * expected.abs().max()
