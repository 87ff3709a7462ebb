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


def check_theta(theta: Tensor, n_params: int) -> None:
    """Raise unless theta is float32 or float64, of shape (batch, n_params) and in [0, 1], ends included.

    Raises TypeError for what is no tensor, ValueError for the rest. Values are looked at where that is free.
    """
    if not isinstance(theta, Tensor):
        raise TypeError(
            f"theta must be a float32 or float64 tensor of shape (batch, {n_params}), got {type(theta).__name__}: "
            "write torch.as_tensor(theta, dtype=torch.float32)"
        )
    if theta.shape[1:] != (n_params,) or not len(theta) or theta.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"theta must be float32 or float64 of shape (batch, {n_params}) with a batch of at least 1, "
            f"got {theta.dtype} of shape {tuple(theta.shape)}"
        )
    if values_are_free(theta) and not ((theta >= 0) & (theta <= 1)).all():
        if n_bad := int((~theta.isfinite()).sum()):
            raise ValueError(
                f"theta must be finite, got {n_bad} NaN or infinite values: look for them where theta is computed"
            )
        raise ValueError(
            f"theta must lie in [0, 1], got values in [{theta.min():g}, {theta.max():g}]: "
            "Parameter.theta maps values in their units to [0, 1]"
        )


def check_seeds(seeds: Tensor, batch: int | None = None) -> None:
    """Raise unless seeds are int64 from 0, of shape (batch,). Errors as of `check_theta`."""
    if not isinstance(seeds, Tensor):
        raise TypeError(
            f"seeds must be an int64 tensor of shape (batch,), got {type(seeds).__name__}: write "
            "torch.as_tensor(seeds, dtype=torch.int64)"
        )
    if seeds.dtype != torch.int64 or seeds.ndim != 1:
        raise ValueError(
            f"seeds must be int64 of shape (batch,), got {seeds.dtype} of shape {tuple(seeds.shape)}: "
            "seeds.long().flatten() makes them"
        )
    if batch is not None and len(seeds) != batch:
        raise ValueError(f"one seed per item is needed, got {len(seeds)} seeds for a theta of {batch} items")
    if values_are_free(seeds) and (seeds < 0).any():
        raise ValueError(f"seeds must be from 0 to 2^63 - 1, got {int(seeds.min())}: take another, such as seeds.abs()")


def check_draw(name: str, draw: Tensor, shape: tuple[int, ...], limits: tuple[int, int] | None = None) -> None:
    """Raise unless random numbers have this shape and are float or, with limits, int64 in them. Errors as above."""
    kind = "a float" if limits is None else "an int64"
    if not isinstance(draw, Tensor):
        raise TypeError(f"{name} must be {kind} tensor of shape {shape}, got {type(draw).__name__}")
    if draw.shape != shape or (draw.dtype != torch.int64 if limits else not draw.is_floating_point()):
        got = f"{draw.dtype} of shape {tuple(draw.shape)}"
        raise ValueError(f"{name} must be {kind} tensor of shape {shape}, got {got}")
    if limits and values_are_free(draw) and (draw.min() < limits[0] or draw.max() > limits[1]):
        raise ValueError(f"{name} must lie in {list(limits)}, got values in {[int(draw.min()), int(draw.max())]}")


def values_are_free(x: Tensor) -> bool:
    """Whether nobody waits for a look at x's values: plain tensors on the CPU, not those that only stand for data."""
    return x.device.type == "cpu" and type(x) in (Tensor, torch.nn.Parameter)


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


def _is_int(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


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
        got = f"got {tuple(probs.shape)}: were they computed for another transform?"
        raise ValueError(f"probs must have one entry per path, shape ({n},), {got}")
    wrong = torch.nonzero(~torch.isfinite(probs) | (probs < 0)).flatten().tolist()
    if wrong:
        raise ValueError(f"probs must be finite and not negative, got {probs[wrong[0]].item()} for path {wrong[0]}")
    if abs(probs.sum().item() - 1) > 1e-6:
        advice = "divide them, in float64, by their sum"
        raise ValueError(f"probs must sum to 1 within 1e-6, got {probs.sum().item():.9g}: {advice}")
    return probs
