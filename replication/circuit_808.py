"""One-shots of a Roland TR-808 from a model of its circuits: what the TR-808 task uses without the paper's recordings.

The model shares no code and no parameter with the synthesizer that is fitted, though a struck resonator rings as a
decaying sine, as bass drums and toms there do. Where its numbers come from:

- [N] TR-808 Service Notes (Roland, 1981): bridged-T networks as drums; the bass drum starts at twice its frequency for
  half a cycle; frequencies and decay times. Snare drums from June 1981 on (180 and 330 Hz, as here) are lower than
  earlier ones (about 240 and 480 to 500 Hz).
- [B] Werner, Abel and Smith, "A physically-informed, circuit-bendable, digital model of the Roland TR-808 bass drum
  circuit", DAFx-14, 2014: a trigger of 4 to 14 V carries the accent and is heard as a click; the attack is more than an
  octave too high; a pitch "sigh" after it.
- [C] the same, "The TR-808 cymbal: a physically-informed, circuit-bendable, digital model", ICMC/SMC 2014: frequencies
  of the six Schmitt trigger oscillators and of the two band-passes behind them; the distorting amplifiers.

The rest (widths, mixes, cutoffs) is a plausible choice of ours, marked "chosen". Each sound draws its knobs over
the machine's range, every component within 5 % of its value, and an onset below 0.9 ms. A decay time is that to a tenth
of the amplitude (20 dB). All is computed at 176.4 kHz, where squares and distortion hardly alias, and band-limited to
the wanted rate last: at another rate or length it is the same sound, but for its scale.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import partial

import numpy as np
from numpy.typing import NDArray
from scipy import signal, special
from tqdm.auto import tqdm

VERSION = 1  # part of the cached corpus's name: raise it with every change that can be heard
INTERNAL_HZ = 176_400
OSCILLATORS_HZ = (205.3, 304.4, 369.6, 522.7, 540.0, 800.0)  # [C]
TOMS = ((80.0, 100.0, 0.20), (120.0, 160.0, 0.13), (165.0, 220.0, 0.10))  # low, mid, high: tuning in Hz, decay in s [N]
LATEST_ONSET_S = 0.9e-3

Audio = NDArray[np.float64]
Settings = dict[str, float]


def bass_drum(rng: np.random.Generator, t_s: Audio, settings: Settings) -> Audio:
    """One resonator at 49 to 56 Hz [B, N], 2 to 2.6 times as high for the first 6 ms, then up to 8 % sharp and
    "sighing" down; the trigger as a click beside it; the tone knob's low-pass (chosen). Decay knob: 50 to 800 ms [N].

    Args (of all voices): what all is drawn from; time (n,) at INTERNAL_HZ, 0 at the onset; the settings so far, with
        `accent`, to which the voice adds its own.
    Returns: audio (n,), unscaled.
    """
    settings.update(f_hz=rng.uniform(49, 56), decay_s=_log_uniform(rng, 0.05, 0.8))
    settings.update(tone_hz=_log_uniform(rng, 500, 7000), attack_ratio=rng.uniform(2, 2.6), attack_s=_part(rng, 6e-3))
    settings.update(sigh=rng.uniform(0.02, 0.08), click=rng.uniform(0.1, 0.4))
    high = special.expit((settings["attack_s"] - t_s) / 0.5e-3)
    sharp = np.exp(-np.maximum(t_s, 0) / 0.06)
    f_hz = settings["f_hz"] * (1 + (settings["attack_ratio"] - 1) * high + settings["sigh"] * sharp)
    trigger = _trigger(t_s, settings["accent"])
    audio = _resonate(trigger, f_hz, settings["decay_s"]) + settings["click"] * _unit(trigger)
    return _filter(audio, 1, settings["tone_hz"], "lowpass")


def snare_drum(rng: np.random.Generator, t_s: Audio, settings: Settings) -> Audio:
    """Two resonators at 180 and 330 Hz [N], balanced by the tone knob; noise above 2 kHz, loud as the snappy knob says.
    The noise decays in 100 to 250 ms (chosen)."""
    settings.update(low_hz=_part(rng, 180), high_hz=_part(rng, 330))
    settings.update(low_decay_s=_part(rng, 0.12), high_decay_s=_part(rng, 0.08))
    settings.update(tone=rng.random(), snappy=rng.random())
    settings.update(noise_decay_s=_log_uniform(rng, 0.1, 0.25), noise_hz=_part(rng, 2000))
    trigger = _trigger(t_s, settings["accent"])
    low, high = (_resonate(trigger, settings[f"{name}_hz"], settings[f"{name}_decay_s"]) for name in ("low", "high"))
    noise = _amplify(rng.standard_normal(len(t_s)), _fall(t_s, settings["noise_decay_s"]))
    noise = _filter(_filter(noise, 2, settings["noise_hz"], "highpass"), 1, 10_000, "lowpass")
    audio = (1 - 0.7 * settings["tone"]) * low + (0.3 + 0.7 * settings["tone"]) * high
    return _unit(audio) + settings["snappy"] * _unit(noise)


def tom(rng: np.random.Generator, t_s: Audio, settings: Settings) -> Audio:
    """Low, mid or high tom (setting `tom` 0, 1 or 2): one resonator tuned within `TOMS` that starts 5 to 20 % sharp
    (chosen), and soft low noise."""
    which = int(rng.integers(len(TOMS)))
    lowest_hz, highest_hz, decay_s = TOMS[which]
    settings.update(tom=which, f_hz=_log_uniform(rng, lowest_hz, highest_hz), decay_s=_part(rng, decay_s))
    settings.update(drop=rng.uniform(0.05, 0.2), noise=rng.uniform(0.02, 0.12))
    settings.update(noise_decay_s=_log_uniform(rng, 0.1, 0.3), click=rng.uniform(0.02, 0.15))
    f_hz = settings["f_hz"] * (1 + settings["drop"] * np.exp(-np.maximum(t_s, 0) / 0.02))
    trigger = _trigger(t_s, settings["accent"])
    noise = _filter(rng.standard_normal(len(t_s)), 1, 700, "lowpass") * _fall(t_s, settings["noise_decay_s"])
    audio = _resonate(trigger, f_hz, settings["decay_s"])
    return audio + (settings["click"] * _unit(trigger) + settings["noise"] * _unit(noise))


def hat(rng: np.random.Generator, t_s: Audio, settings: Settings, is_open: bool) -> Audio:
    """Six free-running square oscillators through the band-pass at 7100 Hz, an amplifier and a high-pass [C].
    A little of the cymbal's band at 3440 Hz is mixed in (chosen). Decay: closed 50 ms, open 90 to 600 ms [N]."""
    settings.update(decay_s=_log_uniform(rng, 0.09, 0.6) if is_open else _part(rng, 0.05))
    settings.update(band_hz=_part(rng, 7100), low_band_hz=_part(rng, 3440))
    settings.update(low_band=rng.uniform(0, 0.3), highpass_hz=_part(rng, 6000))
    f_hz, start = _part(rng, np.array(OSCILLATORS_HZ))[:, None], rng.random((len(OSCILLATORS_HZ), 1))
    # a sample is the mean of the square over its own time, the difference of a triangle: its aliases are weak
    triangle = 0.5 - np.abs((f_hz * np.arange(len(t_s) + 1) / INTERNAL_HZ + start) % 1 - 0.5)
    metal = np.sum(np.diff(triangle) * INTERNAL_HZ / f_hz, axis=0)
    high, low = (signal.iirpeak(settings[name], 3, fs=INTERNAL_HZ) for name in ("band_hz", "low_band_hz"))
    metal = signal.lfilter(*high, metal) + settings["low_band"] * signal.lfilter(*low, metal)
    return _filter(_amplify(metal, _fall(t_s, settings["decay_s"])), 3, settings["highpass_hz"], "highpass")


KINDS = ("BD", "SD", "Tom", "HH")
HATS = {"OH": partial(hat, is_open=True), "CH": partial(hat, is_open=False)}
VOICES: dict[str, Callable[..., Audio]] = {"BD": bass_drum, "SD": snare_drum, "Tom": tom, **HATS}


@np.errstate(all="ignore")
def strike(voice: str, rng: np.random.Generator, sample_rate_hz: int, n_samples: int) -> tuple[Audio, Settings]:
    """One sound of a voice among `VOICES`.

    Args: what all is drawn from; an integer sample rate of at least 8000 Hz; a length of at least 10 ms.
    Returns: audio (n_samples,), its largest magnitude equal to the accent; the settings by name, `onset_s` and `accent`
        (4/14 to 1, the trigger's volts / 14) among them.
    Raises: ValueError for a rate or length out of range.
    """
    if sample_rate_hz % 1 or sample_rate_hz < 8000 or n_samples < sample_rate_hz / 100:
        expected, got = "at least 8000 Hz and at least 10 ms of sound", f"{sample_rate_hz} Hz and {n_samples} samples"
        raise ValueError(f"expected an integer sample rate of {expected}, got {got}")
    settings = {"onset_s": rng.uniform(0, LATEST_ONSET_S), "accent": rng.uniform(4, 14) / 14}
    n = math.ceil((n_samples + 16) * INTERNAL_HZ / sample_rate_hz)  # the last filter looks 10 samples ahead
    audio = VOICES[voice](rng, np.arange(n) / INTERNAL_HZ - settings["onset_s"], settings)
    audio = _filter(audio, 1, 10, "highpass")  # the output's coupling capacitor
    rate = Fraction(int(sample_rate_hz), INTERNAL_HZ)
    return settings["accent"] * _unit(signal.resample_poly(audio, *rate.as_integer_ratio())[:n_samples]), settings


def corpus_names(counts: Mapping[str, int]) -> list[str]:
    """The corpus's items in order: "BD 000", "BD 001", ...; every other hat is open ("OH 000", "CH 001", ...)."""
    prefixes = {"HH": list(HATS)}
    return [f"{prefixes.get(kind, [kind] * 2)[i % 2]} {i:03d}" for kind in KINDS for i in range(counts.get(kind, 0))]


def render_corpus(counts: Mapping[str, int], seed: int, sample_rate_hz: int, n_samples: int) -> NDArray[np.float32]:
    """The sounds of `corpus_names(counts)`, (N, n_samples), each scaled to a largest magnitude equal to its accent.

    A sound depends on seed, kind and its number within the kind alone, whatever the counts. Shows a progress bar.
    """
    names = corpus_names(counts)
    x = np.empty((len(names), n_samples), np.float32)
    interval_s = 0.5 if sys.stderr.isatty() else 10
    for row, name in zip(x, tqdm(names, desc="TR-808 circuit model", unit="sound", mininterval=interval_s)):
        voice, number = name.split()
        kind = KINDS.index("HH" if voice in HATS else voice)
        row[:] = strike(voice, np.random.default_rng([seed, kind, int(number)]), sample_rate_hz, n_samples)[0]
    return x


# ---- circuits: audio and time t_s (n,) at INTERNAL_HZ, t_s is 0 at the onset -----------------------------------------


def _trigger(t_s: Audio, accent: float) -> Audio:
    """A pulse of 1 ms behind an RC differentiator of 0.5 ms; a diode keeps what is negative above -0.7 of 14 V."""
    return np.maximum(accent * (_fall(t_s, 1.15e-3) - _fall(t_s - 1e-3, 1.15e-3)), -0.05)


def _resonate(pulse: Audio, f_hz: Audio | float, decay_s: float) -> Audio:
    """A bridged-T network's answer to a short pulse, scaled to a largest magnitude of 1: the imaginary part of y in
    y' = (2 pi i f - ln(10) / decay_s) y + pulse, f constant or a function of time."""
    cycles = np.cumsum(np.broadcast_to(f_hz, pulse.shape)) / INTERNAL_HZ
    free = _fall(np.arange(len(pulse)) / INTERNAL_HZ, decay_s) * np.exp(2j * np.pi * cycles)
    return _unit((free * np.cumsum(pulse / free)).imag)


def _amplify(audio: Audio, envelope: Audio) -> Audio:
    """The one-transistor amplifier of noise and hats: one polarity passes well, of the other a fifth (chosen) [C]."""
    return envelope * np.where(audio > 0, audio, 0.2 * audio)


def _fall(t_s: Audio, decay_s: float) -> Audio:
    """0 before the onset, 1 at it, a tenth after decay_s; not below exp(-600): a resonator divides by it."""
    return np.where(t_s >= 0, np.exp(np.maximum(-math.log(10) / decay_s * np.maximum(t_s, 0), -600)), 0.0)


def _filter(audio: Audio, order: int, f_hz: float, kind: str) -> Audio:
    return signal.sosfilt(signal.butter(order, f_hz, kind, fs=INTERNAL_HZ, output="sos"), audio)


def _unit(audio: Audio) -> Audio:
    return audio / np.abs(audio).max()


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return low * (high / low) ** rng.random()


def _part(rng: np.random.Generator, value: float | Audio) -> float | Audio:
    """A component value, or several, at most 5 % off."""
    return value * rng.triangular(0.95, 1, 1.05, np.shape(value) or None)
