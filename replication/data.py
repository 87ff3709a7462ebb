"""The data sets, their splits and their batches: a grid of parameters times a few synthesizer seeds, and the drum
one-shots, recorded or rendered.

Nothing here holds state: a batch is a function of (seed, epoch), a fresh synthesizer seed of (seed, step), so that a
killed run resumes from its step counter alone. What is random or large is made by NumPy, whatever torch's defaults.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from scipy.signal import resample_poly
from torch import Tensor

from scrapl_lib.checks import check_name

from . import circuit_808
from .files import kept_array

SPLITS = ("train", "val", "test")
COUNTS = {"BD": 215, "SD": 240, "Tom": 189, "HH": 37}  # the paper's one-shots: 681
_FOLDS = (3, 1, 1)  # how many of the folds, theta index modulo 5, go to train, val and test
_FIRST_MESO_SEED = 2**62
_ORDER_STREAM, _MESO_STREAM, _SPLIT_STREAM = 0, 1, 2  # keep the kinds of random numbers apart


class Split:
    """What belongs to train, val and test: item numbers (n,), int64, ascending, in the attributes of these names."""

    def batches(self, split: str, batch_size: int, epoch: int = 0, seed: int = 0) -> list[Tensor]:
        """Item numbers of one epoch, batch by batch: int64 tensors of shape (batch_size,).

        Training items come in an order that depends on (seed, epoch) alone, numbers from 0, and an incomplete last
        batch is dropped; validation and test items come in their own order, all of them, the last batch possibly
        smaller. Raises ValueError for an unknown split and a batch_size out of range.
        """
        items = getattr(self, check_name("split", split, SPLITS))
        if not 1 <= batch_size <= len(items):
            n = len(items)
            raise ValueError(f"batch_size must be from 1 to the {n} items of split {split!r}, got {batch_size}")
        if split != "train":
            return list(items.split(batch_size))
        order = torch.from_numpy(np.random.default_rng([_ORDER_STREAM, seed, epoch]).permutation(len(items)))
        n_batches = len(items) // batch_size
        return list(items[order[: n_batches * batch_size]].view(n_batches, batch_size))

    def __len__(self) -> int:
        return len(self.train) + len(self.val) + len(self.test)


class ThetaGrid(Split):
    """All pairs of a grid point theta and a data set synthesizer seed.

    Each of the n_params coordinates takes the interior points (i + 1) / (grid_size + 1) of [0, 1], i = 0 ...
    grid_size - 1, and every theta is rendered with each of the synthesizer seeds 0 ... n_synth_seeds - 1. Items are
    ordered by theta, its last parameter fastest, and by seed within one theta. Folds 3/1/1 (number of the theta modulo
    5) go to train, val and test. The defaults are the paper's: 32 x 32 x 5 = 5120 items. Raises ValueError for fewer
    than 5 grid points.

    Attributes:
        theta: (N, n_params) float32, in [0, 1].
        seed: (N,) int64, the synthesizer seed.
        train, val, test: (n,) int64 item numbers, ascending. No theta is in two of them.
    """

    def __init__(self, grid_size: int = 32, n_params: int = 2, n_synth_seeds: int = 5) -> None:
        if grid_size**n_params < sum(_FOLDS) or n_synth_seeds < 1:
            asked = f"{grid_size}^{n_params} and {n_synth_seeds}"
            raise ValueError(f"expected {sum(_FOLDS)} grid points and 1 synthesizer seed or more, got {asked}")
        axis = np.arange(1, grid_size + 1) / (grid_size + 1)
        points = np.stack(np.meshgrid(*[axis] * n_params, indexing="ij"), -1).reshape(-1, n_params).astype(np.float32)
        index = np.arange(len(points)).repeat(n_synth_seeds)
        self.theta = torch.from_numpy(points[index])
        self.seed = torch.from_numpy(np.tile(np.arange(n_synth_seeds), len(points)))
        part = np.repeat([0, 1, 2], _FOLDS)[index % sum(_FOLDS)]  # which of the splits an item belongs to
        self.train, self.val, self.test = (torch.from_numpy(np.flatnonzero(part == i)) for i in range(3))


class OneShots(Split):
    """Drum sounds of one length and rate, split at random in the paper's proportions.

    Of N items, round(N 128 / 681) go to val, as many to test and the rest to train: 425, 128 and 128 of 681. The split
    is a function of (seed, N) alone; kinds are not balanced over it, nor are they in the paper.

    Args:
        x: (N, 1, n_samples) float32, N at least 3.
        names: of the items; they begin, in upper or lower case, with BD, SD, Tom, or with OH or CH (both of kind HH).
        source: what tables say that they were made from.
        seed: the run's, from 0.

    Attributes: x, names, source as given; kinds, an item's "BD", "SD", "Tom" or "HH"; train, val, test.
    """

    def __init__(self, x: Tensor, names: Sequence[str], source: str, seed: int = 0) -> None:
        if len(x) != len(names) or len(x) < 3:
            got = f"{len(x)} and {len(names)} names"
            raise ValueError(f"expected 3 sounds or more (train, val and test) with a name each, got {got}")
        self.x, self.names, self.source = x, list(names), source
        self.kinds = [_kind(name) for name in names]
        order = torch.from_numpy(np.random.default_rng([_SPLIT_STREAM, seed]).permutation(len(x)))
        self.train, self.val, self.test = (part.sort().values for part in order.split(self.sizes(len(x))))

    @staticmethod
    def sizes(n: int) -> list[int]:
        """How many of n sounds go to train, val and test."""
        n_other = max(1, round(n * 128 / 681))
        return [n - 2 * n_other, n_other, n_other]

    @classmethod
    def from_folder(
        cls,
        folder: Path | str | None = None,
        sample_rate_hz: int = 44100,
        n_samples: int = 44100,
        seed: int = 0,
        min_files: int = 40,
        file_rate_hz: int = 44100,
    ) -> OneShots:
        """Recordings: every WAV, FLAC and AIFF file in a folder and its sub-folders, in the order of their names.

        The paper's are "Samples From Mars TR-808", a commercial product. Channels are averaged; what is longer than
        n_samples is cut, what is shorter is followed by zeros; how many is said on stderr. Nothing is scaled. Files of
        other types and hidden ones (also "._BD 01.wav", as macOS leaves them) are ignored.

        Args:
            folder: as of `recordings_folder`. seed: of the split. min_files: fewer are refused.
            sample_rate_hz, n_samples: of the sounds.
            file_rate_hz: of every file, a multiple of sample_rate_hz, to which it is brought; that is said, too.
        Raises: ValueError for no folder, too few files, a name of unknown kind, a file that cannot be read to its end,
            has another rate, or is empty, silent or not finite. It names the file and what to do.
        """
        factor, rest = divmod(file_rate_hz, sample_rate_hz)
        if rest:
            raise ValueError(f"file_rate_hz must be a multiple of sample_rate_hz {sample_rate_hz}, got {file_rate_hz}")
        folder = recordings_folder(folder)
        paths, n_others = audio_files(folder)
        if len(paths) < min_files:
            raise ValueError(
                f"{_text(folder)} and its sub-folders hold {len(paths)} audio files ({' '.join(_AUDIO_SUFFIXES)}) and "
                f"{n_others} others, expected at least {min_files} audio files: set TR808_DIR (or the parameter) to "
                "the folder of all one-shots, or lower min_files"
            )
        x, n_needed = np.zeros((len(paths), 1, n_samples), np.float32), factor * n_samples
        n_averaged = n_cut = n_padded = 0
        for row, path in zip(x[:, 0], paths.values()):
            _kind(path)
            audio, n_frames = _read(path, file_rate_hz, n_needed)  # (samples, channels)
            n_averaged += audio.shape[1] > 1
            n_cut, n_padded = n_cut + (n_frames > n_needed), n_padded + (n_frames < n_needed)
            with np.errstate(all="ignore"):
                mono = resample_poly(audio.mean(axis=1), 1, factor)
                row[: len(mono)] = mono
            if not np.isfinite(row).all() or np.abs(row).max() < _SILENCE:
                what = "is silent (-80 dB)" if np.isfinite(row).all() else "holds NaN or infinite values"
                when = f"in its first {n_samples} samples, averaged"
                raise ValueError(f"{_text(path)} {what} {when}: replace it or move it away")
        source = f"recordings in {_text(folder.name)}"
        resampled = [f"resampled from {file_rate_hz} to {sample_rate_hz} Hz"] if factor > 1 else []
        adapted = {"of several channels, averaged": n_averaged, f"longer than {n_samples} samples, cut": n_cut}
        adapted = [f"{n} {how}" for how, n in (adapted | {"shorter, padded": n_padded}).items() if n]
        if resampled or adapted:
            print("; ".join([f"{source}: {len(x)} files", *resampled, *adapted]), file=sys.stderr, flush=True)
        return cls(torch.from_numpy(x), list(paths), ", ".join([source, *resampled]), seed)

    @classmethod
    def from_circuit(
        cls,
        counts: Mapping[str, int] = COUNTS,
        sample_rate_hz: int = 44100,
        n_samples: int = 44100,
        seed: int = 0,
        corpus_seed: int = 0,
        cache: Path | str | None = None,
    ) -> OneShots:
        """The circuit-model corpus of `circuit_808`, which stands in for recordings that cannot be shipped.

        Args:
            counts: sounds by kind. sample_rate_hz, n_samples: from 8000 Hz and 10 ms on.
            seed: of the split. corpus_seed: of the sounds.
            cache: folder that keeps the corpus, in a file named by what it depends on: see `kept_array`.
        Raises: ValueError for arguments out of their ranges.
        """
        names = circuit_808.corpus_names(counts)
        asked = [circuit_808.VERSION, names, corpus_seed, sample_rate_hz, n_samples]
        name = f"tr808_corpus_{hashlib.sha256(repr(asked).encode()).hexdigest()[:16]}.npy"
        render = partial(circuit_808.render_corpus, counts, corpus_seed, sample_rate_hz, n_samples)
        x = np.array(kept_array(Path(cache, name).absolute(), render)) if cache else render()
        return cls(torch.from_numpy(x)[:, None], names, "circuit-model corpus", seed)


def meso_seeds(seed: int, step: int, batch_size: int, split: str = "train") -> Tensor:
    """Fresh synthesizer seeds (batch_size,), int64, for the reconstructions of one step (the "meso" condition).

    They are a function of (split, seed, step, position in the batch), with the run's seed and the step's number from 0,
    and lie in [2^62, 2^63), away from the data set's own seeds: a reconstruction is never rendered with the draw of its
    reference. Raises ValueError for an unknown split.
    """
    rng = np.random.default_rng([_MESO_STREAM, SPLITS.index(check_name("split", split, SPLITS)), seed, step])
    return torch.from_numpy(rng.integers(_FIRST_MESO_SEED, 2**63 - 1, size=batch_size, dtype=np.int64, endpoint=True))


# ---- one-shots: files -----------------------------------------------------------------------------------------------

_KINDS = {"bd": "BD", "sd": "SD", "tom": "Tom", "oh": "HH", "ch": "HH"}
_AUDIO_SUFFIXES = (".wav", ".flac", ".aif", ".aiff")
_SILENCE = 1e-4  # -80 dB of full scale
_NO_LENGTH = 0x7FFF0000  # from here on, a size in a WAV header stands for "not known": a stream was written


def _kind(name: Path | str) -> str:
    letters = re.match("[a-z]*", Path(name).stem.lower())[0]
    if letters not in _KINDS:
        expected = "a name that begins with BD, SD, Tom, OH or CH"
        raise ValueError(f"{_text(name)} is of unknown kind, expected {expected}: rename it or move it away")
    return _KINDS[letters]


def _text(path: Path | str) -> str:
    """A path as text that can be printed and stored: bytes that are no UTF-8 become \\x and two digits."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def recordings_folder(folder: Path | str | None = None) -> Path:
    """The absolute path of the folder of recordings: the one given or else TR808_DIR, which is made absolute for all
    processes that are started from here. Raises ValueError for neither."""
    given = folder or os.environ.get("TR808_DIR")
    if not given:
        raise ValueError("no folder of one-shots: set the environment variable TR808_DIR to it, or pass its path")
    path = Path(given).expanduser().resolve()
    if not folder:
        os.environ["TR808_DIR"] = str(path)
    return path


def audio_files(folder: Path) -> tuple[dict[str, Path], int]:
    """A folder's and its sub-folders' audio files, by their names from it and in their order, and how many other files
    there are. Hidden ones are left out. Raises ValueError for what is no folder."""
    if not folder.is_dir():
        to_do = "set TR808_DIR (or the parameter) to the folder of the one-shots"
        raise ValueError(f"{_text(folder)} is no folder: {to_do}")
    there = {_text(path.relative_to(folder).as_posix()): path for path in folder.rglob("*")}
    hidden = re.compile(r"(^|/)\.")
    there = {n: path for n, path in there.items() if not (path.is_dir() or path.is_fifo() or hidden.search(n))}
    paths = {name: there[name] for name in sorted(there) if Path(name).suffix.lower() in _AUDIO_SUFFIXES}
    return paths, len(there) - len(paths)


def _read(path: Path, sample_rate_hz: int, n_samples: int) -> tuple[np.ndarray, int]:
    """The first n_samples of a file, which is read to its end, as (samples, channels) float64, and how many it has."""
    import soundfile  # here, so that only recordings need it

    name, again = _text(path), "copy or export it again, as 16 or 24 bit PCM,"
    try:
        with open(path, "rb") as opened, soundfile.SoundFile(opened) as file:
            rate_hz, n_frames, log = file.samplerate, file.frames, file.extra_info
            if n_frames >= 2**62:  # what soundfile makes of a FLAC that was streamed
                raise ValueError("its header tells no length")
            audio = file.read(n_frames, dtype="float64", always_2d=True)  # without a number it would have to seek
    except (soundfile.SoundFileError, OSError, ValueError) as error:
        why = "it has 0 bytes" if path.is_file() and not path.stat().st_size else error
        raise ValueError(f"{name} cannot be read as audio ({why}): {again} or move it away") from error
    if rate_hz != sample_rate_hz:
        old, new = shlex.quote(name), shlex.quote(f"converted{path.suffix}")
        raise ValueError(
            f"{name} has a sample rate of {rate_hz} Hz, expected {sample_rate_hz} Hz, nothing is resampled silently: "
            f"convert it by  ffmpeg -i {old} -ar {sample_rate_hz} {new} && mv {new} {old}"
        )
    if not n_frames:
        raise ValueError(f"{name} is empty, it holds 0 samples by its header: {again} or move it away")
    said = re.search(r"^ *(?:data|SSND) *: *(\d+) .*should be", log, re.MULTILINE)
    if len(audio) < n_frames or (said and int(said[1]) < _NO_LENGTH):
        raise ValueError(f"{name} breaks off: it holds fewer samples than its header says: {again} or move it away")
    return audio[:n_samples], n_frames
