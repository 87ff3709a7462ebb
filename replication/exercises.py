"""The notebooks' exercises: a reader's answer is checked where it is written, in words.

An exercise is a code cell tagged ``exercise``: the reader's part, with ``...`` left in it, and one last expression that is a
call of `check`. The markdown cell after it holds a solution, a fenced block of Python within ``<details>``.
"""

from __future__ import annotations

import reprlib

import torch
from IPython.display import Markdown

NOT_YET = "**Not answered yet**: put something in place of the `...`, and run the cell again."


def check(answer: object, expected: object, *arguments: object, tol: float = 1e-6, hint: str = "") -> Markdown:
    """Say whether an answer is right; never raise, whatever the answer is.

    Args:
        answer: a value, or a function, which is called with `arguments`; unanswered while it is, or returns, `...`.
        expected: number, or array or tensor of numbers of any shape.
        tol: largest difference, as a fraction of the largest magnitude expected.
        hint: shown with a wrong answer.
    """
    try:
        given = answer(*arguments) if callable(answer) else answer
    except (Exception, SystemExit) as error:  # a reader's code may do anything
        return Markdown(f"**Not yet**: your function raised {type(error).__name__}: {error}. {hint}")
    if given is ...:
        return Markdown(NOT_YET)
    expected = torch.as_tensor(expected, dtype=torch.float64).detach()
    try:
        given = torch.as_tensor(given, dtype=torch.float64).detach()
        given.numel() and given.flatten()[0].item()
    except Exception:  # no numbers, too large ones, none at all (device meta)
        return Markdown(f"**Not yet**: expected {_said(expected)}, got {reprlib.repr(given)}. {hint}")
    if given.shape != expected.shape:
        return Markdown(f"**Not yet**: expected {_said(expected)}, got {_said(given)}. {hint}")
    if not (given - expected).abs().max() <= tol * expected.abs().max():
        return Markdown(
            f"**Not yet**: got {given.item():.4g}. {hint}"
            if given.ndim == 0
            else f"**Not yet**: the shape is right, the numbers are not. {hint}"
        )
    return Markdown("**Right.**")


def _said(values: torch.Tensor) -> str:
    return f"numbers of shape {tuple(values.shape)}" if values.ndim else "one number"
