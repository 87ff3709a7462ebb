"""The data sets, their splits and their batches (paper, section 7): a grid of parameters times a few synthesizer seeds, and
the drum one-shots, recorded or rendered.

Nothing here holds state: a batch is a function of (seed, epoch), a fresh synthesizer seed of (seed, step), so that a
killed run resumes from its step counter alone.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import shlex
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.signal import resample_poly
from torch import Tensor

from . import circuit_808

SPLITS = ("train", "val", "test")
COUNTS = {"BD": 215, "SD": 240, "Tom": 189, "HH": 37}  # the paper's one-shots: 681
_FIRST_MESO_SEED = 2**62
_ORDER_STREAM, _MESO_STREAM, _SPLIT_STREAM = 0, 1, 2  # keep the kinds of random numbers apart


class Split:
    """What belongs to train, val and test: item numbers (n,), int64, ascending, in the attributes of these names."""

    def batches(self, split: str, batch_size: int, epoch: int = 0, seed: int = 0) -> list[Tensor]:
        """Item numbers of one epoch, batch by batch.

        Training items come in an order that depends on (seed, epoch) alone, and an incomplete last batch is dropped;
        validation and test items come in their own order, all of them, the last batch possibly smaller.

        Args:
            split: "train", "val" or "test".
            batch_size: items per batch.
            epoch, seed: numbers from 0; ignored unless split is "train".
        Returns:
            int64 tensors of shape (batch_size,).
        """
        _check_split(split)
        items = getattr(self, split)
        if not 1 <= batch_size <= len(items):
            raise ValueError(
                f"batch_size must be from 1 to the {len(items)} items of split {split!r}, got {batch_size}"
            )
        if split != "train":
            return list(items.split(batch_size))
        order = torch.from_numpy(np.random.default_rng([_ORDER_STREAM, seed, epoch]).permutation(len(items)))
        n_batches = len(items) // batch_size
        return list(items[order[: n_batches * batch_size]].view(n_batches, batch_size))


class ThetaGrid(Split):
    """All pairs of a grid point theta and a data set synthesizer seed.

    Each coordinate takes the interior points (i + 1) / (grid_size + 1) of [0, 1], i = 0 ... grid_size - 1. Items are
    ordered by theta, and by synthesizer seed within one theta.

    Args:
        grid_size: points along each parameter.
        n_params: number of parameters U.
        n_synth_seeds: every theta is rendered with each of the synthesizer seeds 0 ... n_synth_seeds - 1.
        fold_counts: how many of the folds (theta index modulo sum(fold_counts)) go to train, val and test.

    The defaults are the paper's: 32 x 32 x 5 = 5120 items, folds 3/1/1.

    Attributes:
        theta: (N, n_params) float32, in [0, 1].
        theta_index: (N,) int64, the grid point's number; the last parameter varies fastest.
        seed: (N,) int64, the synthesizer seed.
        train, val, test: (n,) int64 item numbers, ascending. No theta is in two of them.
    """

    def __init__(
        self,
        grid_size: int = 32,
        n_params: int = 2,
        n_synth_seeds: int = 5,
        fold_counts: tuple[int, int, int] = (3, 1, 1),
    ) -> None:
        if min(grid_size, n_params, n_synth_seeds) < 1:
            raise ValueError(
                "grid_size, n_params and n_synth_seeds must be at least 1, "
                f"got {grid_size}, {n_params} and {n_synth_seeds}"
            )
        n_folds = sum(fold_counts)
        if len(fold_counts) != 3 or min(fold_counts) < 1 or grid_size**n_params < n_folds:
            raise ValueError(
                f"fold_counts must be three positive numbers of folds (train, val, test), at most one fold per grid point "
                f"({grid_size**n_params}), got {fold_counts}"
            )
        axis = torch.arange(1, grid_size + 1, dtype=torch.float64) / (grid_size + 1)
        points = torch.cartesian_prod(*[axis] * n_params).view(-1, n_params).float()
        self.theta_index = torch.arange(len(points)).repeat_interleave(n_synth_seeds)
        self.theta = points[self.theta_index]
        self.seed = torch.arange(n_synth_seeds).repeat(len(points))

        fold = self.theta_index % n_folds
        n_train, n_val, _ = fold_counts
        self.train = torch.nonzero(fold < n_train).flatten()
        self.val = torch.nonzero((fold >= n_train) & (fold < n_train + n_val)).flatten()
        self.test = torch.nonzero(fold >= n_train + n_val).flatten()

    def __len__(self) -> int:
        return len(self.theta)


class OneShots(Split):
    """Drum sounds of one length and rate, split at random in the paper's proportions.

    Of N items, round(N 128 / 681) go to val, as many to test and the rest to train: 425, 128 and 128 of 681. The split is a
    function of (seed, N) alone; kinds are not balanced over it, nor are they in the paper.

    Args:
        x: (N, 1, n_samples) float32, N at least 3.
        names: of the items; they begin, in upper or lower case, with BD, SD, Tom, or with OH or CH (both of kind HH).
        source: what tables say that they were made from.
        sample_rate_hz: sample rate. seed: the run's seed, from 0.

    Attributes: x, names, source, sample_rate_hz as given; kinds, an item's "BD", "SD", "Tom" or "HH"; train, val, test.
    """

    def __init__(self, x: Tensor, names: Sequence[str], source: str, sample_rate_hz: int, seed: int = 0) -> None:
        if len(x) != len(names) or len(x) < 3:
            raise ValueError(
                f"expected 3 sounds or more (train, val and test) with a name each, got {len(x)} and {len(names)} names"
            )
        self.x, self.names, self.source, self.sample_rate_hz = x, list(names), source, sample_rate_hz
        self.kinds = [_kind(name) for name in names]
        order = torch.from_numpy(np.random.default_rng([_SPLIT_STREAM, seed]).permutation(len(x)))
        parts = order.split(self.sizes(len(x)))
        self.train, self.val, self.test = (part.sort().values for part in parts)

    def __len__(self) -> int:
        return len(self.x)

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
        file_rate_hz: int | None = None,
    ) -> OneShots:
        """Recordings: every WAV, FLAC and AIFF file in a folder and its sub-folders, in the order of their names.

        The paper's are "Samples From Mars TR-808", a commercial product. Channels are averaged; what is longer than
        n_samples is cut, what is shorter is followed by zeros; how many is said on stderr. Nothing is scaled, and nothing resampled
        unless file_rate_hz asks for it, which is said too.
        Hidden files ("._BD 01.wav", as macOS leaves them, too) and files of other types are ignored.

        Args:
            folder: None takes the environment variable TR808_DIR.
            sample_rate_hz: of the sounds. n_samples: their length. seed: of the split. min_files: fewer are refused.
            file_rate_hz: what every file must have, a multiple of sample_rate_hz, to which it is brought; None: the same.
        Raises: ValueError for no folder, too few files, a name of unknown kind, a file that cannot be read to its end, has
            another rate, or is empty, silent or not finite. It names the file and what to do.
        """
        least = {"sample_rate_hz": 1, "n_samples": 1, "seed": 0, "min_files": 0, "file_rate_hz": 1}
        file_rate_hz = sample_rate_hz if file_rate_hz is None else file_rate_hz
        for name, value in zip(least, (sample_rate_hz, n_samples, seed, min_files, file_rate_hz), strict=True):
            if isinstance(value, bool) or not isinstance(value, int) or value < least[name]:
                raise ValueError(f"{name} must be an integer of at least {least[name]}, got {value!r}")
        if file_rate_hz % sample_rate_hz:
            raise ValueError(
                f"file_rate_hz must be a multiple of sample_rate_hz = {sample_rate_hz}, got {file_rate_hz}"
            )
        factor = file_rate_hz // sample_rate_hz
        folder = folder or os.environ.get("TR808_DIR")
        if not folder:
            raise ValueError("no folder of one-shots: set the environment variable TR808_DIR to it, or pass its path")
        folder = Path(folder).expanduser().resolve()
        paths, n_others = audio_files(folder)
        if len(paths) < min_files:
            raise ValueError(
                f"{folder} and its sub-folders hold {len(paths)} audio files ({' '.join(_AUDIO_SUFFIXES)}) and "
                f"{n_others} others, expected at least {min_files} audio files: set TR808_DIR (or the "
                "parameter) to the folder of all one-shots, or lower min_files"
            )
        for path in paths.values():
            _kind(path)
        x = torch.zeros(len(paths), 1, n_samples)
        n_averaged = n_cut = n_padded = 0
        for row, path in zip(x[:, 0], paths.values()):
            audio, n_frames = _read(path, file_rate_hz, factor * n_samples)  # (samples, channels)
            n_averaged += audio.shape[1] > 1
            n_cut, n_padded = n_cut + (n_frames > factor * n_samples), n_padded + (n_frames < factor * n_samples)
            mono = resample_poly(audio.mean(axis=1), 1, factor)
            row[: len(mono)] = torch.from_numpy(mono)
            if not row.isfinite().all() or row.abs().max() < _SILENCE:
                what = "is silent (-80 dB)" if row.isfinite().all() else "holds NaN or infinite values"
                raise ValueError(
                    f"{path} {what} in its first {n_samples} samples, averaged: replace it or move it away"
                )
        source = f"recordings in {folder.name}"
        said = []
        if factor > 1:
            said = [f"resampled from {file_rate_hz} to {sample_rate_hz} Hz"]
            source += f", {said[0]}"
        if n_averaged or n_cut or n_padded:
            said += [
                f"{n_averaged} of several channels, averaged",
                f"{n_cut} longer than {n_samples} samples, cut",
                f"{n_padded} shorter, padded",
            ]
        if said:
            print(f"recordings in {folder.name}: {len(x)} files; {'; '.join(said)}", file=sys.stderr, flush=True)
        return cls(x, list(paths), source, sample_rate_hz, seed)

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
            cache: folder that keeps the corpus, in a file named by what it depends on; None: it is rendered on each call.
                What is not as it was written is rendered again, and that is said on stderr.
        Raises: ValueError for arguments out of their ranges.
        """
        names = circuit_808.corpus_names(counts)
        asked = [circuit_808.VERSION, names, corpus_seed, sample_rate_hz, n_samples]
        key = hashlib.sha256(repr(asked).encode()).digest()
        path = Path(cache) / f"tr808_circuit_{key.hex()[:16]}.npy" if cache is not None else None
        x = _load(path, key) if path else None
        if x is None:
            x = circuit_808.render_corpus(counts, corpus_seed, sample_rate_hz, n_samples)
            if path:
                _store(path, key, x)
        return cls(torch.from_numpy(x)[:, None], names, "circuit-model corpus", sample_rate_hz, seed)


def meso_seeds(seed: int, step: int, batch_size: int, split: str = "train") -> Tensor:
    """Fresh synthesizer seeds for the reconstructions of one step (the "meso" condition).

    They are a function of (split, seed, step, position in the batch) and lie in [2^62, 2^63), away from the data set's own
    seeds: a reconstruction is never rendered with the draw of its reference.

    Args:
        seed: the run's seed, from 0.
        step: the step's number, from 0.
        batch_size: number of seeds.
        split: "train", "val" or "test".
    Returns:
        (batch_size,) int64.
    """
    _check_split(split)
    rng = np.random.default_rng([_MESO_STREAM, SPLITS.index(split), seed, step])
    return torch.from_numpy(rng.integers(_FIRST_MESO_SEED, 2**63 - 1, size=batch_size, dtype=np.int64, endpoint=True))


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")


# ---- one-shots: files ---------------------------------------------------------------------------------------------------

_KINDS = {"bd": "BD", "sd": "SD", "tom": "Tom", "oh": "HH", "ch": "HH"}
_AUDIO_SUFFIXES = (".wav", ".flac", ".aif", ".aiff")
_SILENCE = 1e-4  # -80 dB of full scale


def _kind(name: Path | str) -> str:
    letters = re.match("[a-z]*", Path(name).stem.lower())[0]
    if letters not in _KINDS:
        raise ValueError(
            f"{name} is of unknown kind, expected a name that begins with BD, SD, Tom, OH or CH: rename it or move it away"
        )
    return _KINDS[letters]


def audio_files(folder: Path) -> tuple[dict[str, Path], int]:
    """The audio files of a folder and its sub-folders by their names from it, in order, and how many others there are, hidden
    ones left out. Raises ValueError for what is no folder."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: set TR808_DIR (or the parameter) to the folder of the one-shots")
    there = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if not path.is_dir()}
    there = {name: path for name, path in there.items() if not re.search(r"(^|/)\.", name)}
    paths = {name: there[name] for name in sorted(there) if Path(name).suffix.lower() in _AUDIO_SUFFIXES}
    return paths, len(there) - len(paths)


def _read(path: Path, sample_rate_hz: int, n_samples: int) -> tuple[np.ndarray, int]:
    """The first n_samples of a file, which is read to its end, as (samples, channels) float64, and how many it has."""
    import soundfile  # here, so that only recordings need it

    try:
        with soundfile.SoundFile(path) as file:
            rate_hz, n_frames, log = file.samplerate, file.frames, file.extra_info
            audio = file.read(dtype="float64", always_2d=True)
    except (soundfile.SoundFileError, OSError) as error:
        why = "it has 0 bytes" if path.is_file() and not path.stat().st_size else error
        raise ValueError(f"{path} cannot be read as audio ({why}): copy or export it again, or move it away") from error
    if rate_hz != sample_rate_hz:
        old, new = shlex.quote(str(path)), shlex.quote(f"converted{path.suffix}")
        raise ValueError(
            f"{path} has a sample rate of {rate_hz} Hz, expected {sample_rate_hz} Hz, and nothing is resampled silently: "
            f"convert it by  ffmpeg -i {old} -ar {sample_rate_hz} {new} && mv {new} {old}"
        )
    if not n_frames:
        raise ValueError(f"{path} is empty, it holds 0 samples: copy or export it again, or move it away")
    if len(audio) < n_frames or re.search(r"^ *(data|SSND) *:.*should be", log, re.MULTILINE):
        raise ValueError(f"{path} breaks off: it holds fewer samples than its header says: copy or export it again")
    return audio[:n_samples], n_frames


def _sha256(key: bytes, data: memoryview) -> bytes:
    return hashlib.sha256(key + hashlib.sha256(data).digest()).digest()


def _store(path: Path, key: bytes, x: np.ndarray) -> None:
    """`x` as an .npy file, the SHA-256 of key and file appended, renamed into place; without room, `x` goes unkept."""
    file = io.BytesIO()
    np.save(file, x)
    file.write(_sha256(key, file.getbuffer()))
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(file.getbuffer())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        print(f"the corpus is not kept, {path}: {error}", file=sys.stderr, flush=True)


def _load(path: Path, key: bytes) -> np.ndarray | None:
    """What `_store` wrote; None when there is none, or when it is not that: this is said."""
    try:
        data = path.read_bytes()
        if _sha256(key, memoryview(data)[:-32]) == data[-32:]:
            return np.load(io.BytesIO(data))
        why = "its SHA-256 is another"
    except FileNotFoundError:
        return None
    except OSError as error:
        why = error
    print(f"{path} is not what was written there ({why}): rendering the corpus again", file=sys.stderr, flush=True)
    return None
