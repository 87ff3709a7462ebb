"""What audio, tensors, sizes, seeds and names must be; errors say what came, what was expected and how to mend it.

Values are looked at on the CPU only: elsewhere every step would wait for the device (NaN audio gives a NaN loss there).
"""

import difflib
import re
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

SINGLE_OR_DOUBLE = (torch.float32, torch.float64)


def check_audio(x: Tensor, name: str = "x", n_samples: int | None = None) -> None:
    """Raise unless x is finite mono audio of shape (batch, 1, samples), of `n_samples` samples if that is given.

    Raises: TypeError for what is no float32 or float64 tensor; ValueError for another shape or length, nothing in it,
    or a value that is not finite.
    """
    if not isinstance(x, Tensor) or x.dtype not in SINGLE_OR_DOUBLE:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(
            f"{name} must be a float32 or float64 tensor, got {got}: convert it with torch.as_tensor(...).float()"
        )
    if x.ndim != 3 or x.shape[1] != 1 or x.numel() == 0:
        raise ValueError(
            f"{name} must have shape (batch, 1, samples), mono, got {tuple(x.shape)}: reshape it to that, none of them "
            "0; mix several channels down with x.mean(1, keepdim=True)"
        )
    if n_samples is not None and x.shape[2] != n_samples:
        raise ValueError(
            f"{name} must have {n_samples} samples, got {x.shape[2]}: pad or crop it, or build for its length"
        )
    check_finite(x, name, "audio")


def check_finite(x: Tensor, name: str, what: str) -> None:
    """Raise ValueError for NaN and infinities, on the CPU."""
    if x.device.type == "cpu" and not torch.isfinite(x).all():
        n_bad = int((~torch.isfinite(x)).sum())
        raise ValueError(f"{name} must be finite, got {n_bad} NaN or infinite values: look where the {what} is made")


def check_as(name: str, x: Tensor, check: Callable[[Tensor], None]) -> None:
    """check(x), whose errors, where they begin with "x", are told of `name`."""
    try:
        check(x)
    except (TypeError, ValueError) as error:
        error.args = (re.sub(r"^x\b", name, str(error)),)
        raise


def check_pair(x_hat: Tensor, x: Tensor, check: Callable[[Tensor], None] = check_audio) -> None:
    """Raise unless x_hat and x pass `check`, and have one shape and dtype."""
    check_as("x_hat", x_hat, check)
    check(x)
    if x_hat.shape != x.shape:
        raise ValueError(f"x_hat and x must have one shape, got {tuple(x_hat.shape)} and {tuple(x.shape)}")
    if x_hat.dtype != x.dtype:
        raise TypeError(f"x_hat and x must have one dtype, got {x_hat.dtype} and {x.dtype}: convert one with x.to(...)")


def check_tensor(
    name: str,
    x: object,
    shape: tuple[int | str, ...],
    dtypes: tuple[torch.dtype, ...] = SINGLE_OR_DOUBLE,
    limits: tuple[int, int] | None = None,
    mend: str = "",
) -> None:
    """Raise unless x is a tensor of this shape (a word stands for any size from 1 on) and dtype, within the limits.

    `mend` ends what is said of values. Raises: TypeError for what is no tensor, ValueError for the rest.
    """
    kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    what = f"{name} must be {kinds}, of shape ({', '.join(map(str, shape))}{',' * (len(shape) == 1)})"
    if not isinstance(x, Tensor):
        raise TypeError(f"{what}, got {type(x).__name__}: write torch.as_tensor({name}, dtype={dtypes[0]})")
    fits = [n == size or (isinstance(size, str) and n > 0) for n, size in zip(x.shape, shape)]
    if x.ndim != len(shape) or not all(fits) or x.dtype not in dtypes:
        raise ValueError(f"{what}, got {x.dtype} of shape {tuple(x.shape)}")
    free = x.device.type == "cpu" and type(x) in (Tensor, torch.nn.Parameter)  # others only stand for data
    if limits and free and not ((x >= limits[0]) & (x <= limits[1])).all():
        low, high = x.min().item(), x.max().item()
        raise ValueError(f"{name} must lie in [{limits[0]}, {limits[1]}], got values in [{low:g}, {high:g}]{mend}")


def _integer(name: str, value: object, of_which: str = "") -> int:
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer{of_which}, got {value!r}: for a float, use int(...)")
    return int(value)


def positive_int(name: str, value: object, or_else: str = "") -> int:
    """The integer, from 1 on, as an int. `or_else` says what else it may be. Raises: TypeError, ValueError."""
    if _integer(name, value, or_else) < 1:
        raise ValueError(f"{name} must be at least 1{or_else}, got {value}")
    return int(value)


def check_index(name: str, value: object, n: int, whose: str) -> int:
    """The integer, from 0 to n - 1, as an int. `whose` begins what is said of these. Raises: TypeError, IndexError."""
    if not 0 <= _integer(name, value) < n:
        raise IndexError(f"{name} = {value} is out of range: {whose} 0 .. {n - 1}")
    return int(value)


def check_seed(seed: object, name: str = "seed") -> int:
    """The seed, an integer from 0 to 2^64 - 1, as an int. Raises: TypeError, ValueError."""
    if not 0 <= _integer(name, seed, " from 0 to 2^64 - 1") < 2**64:
        raise ValueError(f"{name} must be an integer from 0 to 2^64 - 1, got {seed}: take it modulo 2^64")
    return int(seed)


def check_name(kind: str, name: str, valid: Iterable[str]) -> str:
    """Return `name` if it is among `valid`; else raise ValueError with the nearest valid one.

    >>> check_name("profile", "quik", ["smoke", "quick", "paper"])
    Traceback (most recent call last):
    ValueError: unknown profile 'quik': did you mean 'quick'? valid are smoke, quick, paper
    """
    valid = tuple(valid)
    if name in valid:
        return name
    near = difflib.get_close_matches(str(name), valid, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"unknown {kind} {name!r}: {hint}valid are {', '.join(valid)}")


def check_bool(name: str, value: object) -> bool:
    """The truth value. Raises: TypeError."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def check_probs(value: object, n: int) -> Tensor:
    """A float64 copy (n,) on the CPU of an array of probabilities, which sum to 1. Raises: TypeError, ValueError."""
    try:
        probs = torch.as_tensor(value, dtype=torch.float64, device="cpu").detach().clone()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"probs must be an array of {n} numbers, got {value!r}") from error
    if probs.shape != (n,):
        got = f"got {tuple(probs.shape)}: were they computed for another transform, or another `draw`?"
        raise ValueError(f"probs must have one entry per draw, shape ({n},), {got}")
    wrong = torch.nonzero(~torch.isfinite(probs) | (probs < 0)).flatten().tolist()
    if wrong:
        raise ValueError(f"probs must be finite and not negative, got {probs[wrong[0]].item()} for path {wrong[0]}")
    if abs(probs.sum().item() - 1) > 1e-6:
        advice = "divide them, in float64, by their sum"
        raise ValueError(f"probs must sum to 1 within 1e-6, got {probs.sum().item():.9g}: {advice}")
    return probs
