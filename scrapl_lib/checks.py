"""What audio, sizes, seeds and names must be; errors say what came, what was expected and how to mend it."""

import difflib
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor


def check_audio(x: Tensor, name: str, n_samples: int | None = None) -> None:
    """Raise unless x is finite mono audio of shape (batch, 1, samples).

    On CUDA the values are not looked at (every step would wait for the device): NaN audio gives a NaN loss there.

    Args:
        x: the audio.
        name: what the error message calls it.
        n_samples: expected length, if any.
    Raises:
        TypeError: x is no float32 or float64 tensor.
        ValueError: another shape or length, nothing in it, or a value that is not finite.
    """
    if not isinstance(x, Tensor) or x.dtype not in (torch.float32, torch.float64):
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(
            f"{name} must be a float32 or float64 tensor, got {got}: convert it with torch.as_tensor(...).float()"
        )
    if x.ndim == 3 and x.shape[1] == 1 and x.numel() == 0:
        raise ValueError(f"{name} must have items and samples, got {tuple(x.shape)}: it is empty")
    if x.ndim != 3 or x.shape[1] != 1:
        raise ValueError(
            f"{name} must have shape (batch, 1, samples), mono, got {tuple(x.shape)}: "
            "reshape it to that, mix several channels down with x.mean(1, keepdim=True)"
        )
    if n_samples is not None and x.shape[2] != n_samples:
        raise ValueError(
            f"{name} must have {n_samples} samples, got {x.shape[2]}: pad or crop it, or build for its length"
        )
    if x.device.type == "cpu" and not torch.isfinite(x).all():
        raise ValueError(
            f"{name} must be finite, got {int((~torch.isfinite(x)).sum())} NaN or infinite values: "
            "look for them where the audio is made"
        )


def check_pair(x_hat: Tensor, x: Tensor, n_samples: int | None = None) -> None:
    """Raise unless x_hat and x are audio (see `check_audio`) of one shape and dtype."""
    check_audio(x_hat, "x_hat", n_samples)
    check_audio(x, "x", n_samples)
    if x_hat.shape != x.shape:
        raise ValueError(f"x_hat and x must have one shape, got {tuple(x_hat.shape)} and {tuple(x.shape)}")
    if x_hat.dtype != x.dtype:
        raise TypeError(f"x_hat and x must have one dtype, got {x_hat.dtype} and {x.dtype}: convert one with x.to(...)")


def positive_int(name: str, value: object, or_else: str = "") -> int:
    """The integer (Python's or NumPy's, from 1 on) as an int. `or_else` says what else the argument may be.

    Raises: TypeError, ValueError.
    """
    if not _is_int(value):
        raise TypeError(f"{name} must be an integer{or_else}, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1{or_else}, got {value}")
    return int(value)


def check_index(name: str, value: object, n: int, whose: str) -> int:
    """The integer, from 0 to n - 1, as an int. `whose` begins what the message says of these numbers.

    Raises: TypeError, IndexError.
    """
    if not _is_int(value):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if not 0 <= value < n:
        raise IndexError(f"{name} = {value} is out of range: {whose} 0 .. {n - 1}")
    return int(value)


def check_seed(seed: object, name: str = "seed") -> int:
    """The seed, an integer (Python's or NumPy's) from 0 to 2^64 - 1, as an int.

    Raises: TypeError, ValueError.
    """
    if not _is_int(seed):
        raise TypeError(f"{name} must be an integer from 0 to 2^64 - 1, got {seed!r}: for a float, use int(...)")
    if not 0 <= seed < 2**64:
        raise ValueError(f"{name} must be from 0 to 2^64 - 1, got {seed}: take it modulo 2^64")
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


def _is_int(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)
