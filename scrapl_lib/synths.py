"""Differentiable synthesizers without weights, theta in [0, 1]^U to audio: granular, chirplet, TR-808 snare.

A synthesizer may be random. `draw(seeds)` makes all of its random numbers, one independent draw per item and seed, and
`render(theta, *draws)` is a deterministic and differentiable function of theta. Calling the synthesizer does both.
Suffixes: _hz hertz, _s seconds, _oct_per_s octaves per second; lengths without a suffix are samples.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from .checks import SINGLE_OR_DOUBLE, check_name, check_tensor


@dataclass(frozen=True)
class Parameter:
    """What one coordinate of theta means: [0, 1] stands for [min, max] in `unit`, along `curve`."""

    name: str
    min: float
    max: float
    unit: str
    curve: str = "linear"  # or "log2": linear in octaves

    def __post_init__(self) -> None:
        check_name("curve", self.curve, ("linear", "log2"))
        least = 0 if self.curve == "log2" else -math.inf
        if not least < self.min <= self.max < math.inf:
            raise ValueError(f"{self.name} must have a range {least} < min <= max, got {self.min} and {self.max}")

    def value(self, theta: Tensor) -> Tensor:
        """theta in [0, 1], any shape -> the parameter's value, same shape."""
        if self.curve == "log2":
            return self.min * (self.max / self.min) ** theta
        return self.min + (self.max - self.min) * theta

    def theta(self, value: Tensor) -> Tensor:
        """The way back: a value from min to max, any shape -> theta in [0, 1], same shape; 0 where min is max."""
        if self.curve == "log2":
            return torch.log2(value / self.min) / (math.log2(self.max / self.min) or 1)
        return (value - self.min) / ((self.max - self.min) or 1)


class Synth(ABC):
    """A sound of theta, in theta's dtype and on its device, twice differentiable. Subclasses fill in what is below."""

    parameters: tuple[Parameter, ...]
    n_params: int
    n_samples: int
    max_shift: int
    controls_dtype: torch.dtype | None = torch.float64  # None: theta's

    @property
    def drawn(self) -> dict[str, tuple[tuple[int, ...], tuple[int, int] | None]]:
        """What `draw` returns, by name: the shape of an item's, and its range if it is int64."""
        return {"shift": ((), (-self.max_shift, self.max_shift))}

    def draw(self, seeds: Tensor) -> tuple[Tensor, ...]:
        """The random part, on the CPU: seeds (batch,) int64, from 0 -> what `render` takes beside theta.

        By default a shift of the sound, (batch,) int64, uniform in [-max_shift, max_shift]; positive is later.
        An item's draw depends on its own seed only, not on the batch or the device.
        """
        return ((uniform(seeds, 1)[:, 0] * (2 * self.max_shift + 1)).long() - self.max_shift,)

    def render(self, theta: Tensor, *draws: Tensor) -> Tensor:
        """The deterministic part: theta (batch, n_params) in [0, 1], float32 or float64, and draws as from `draw`
        -> audio (batch, 1, n_samples) in theta's dtype and on its device."""
        mend = ": Parameter.theta maps values in their units to [0, 1]"
        check_tensor("theta", theta, ("batch", self.n_params), SINGLE_OR_DOUBLE, (0, 1), mend)
        if len(draws) != len(self.drawn):
            raise TypeError(f"render takes theta and {', '.join(self.drawn)}, got theta and {len(draws)} others")
        for draw, (name, (item_shape, limits)) in zip(draws, self.drawn.items()):
            dtypes = (torch.int64,) if limits else SINGLE_OR_DOUBLE
            check_tensor(name, draw, (len(theta), *item_shape), dtypes, limits)
        draws = [draw.to(theta.device, non_blocking=True) for draw in draws]  # else the host would wait for the device
        dtype = self.controls_dtype or theta.dtype
        controls = [p.value(theta[:, u : u + 1].to(dtype)) for u, p in enumerate(self.parameters)]
        return self.signal(controls, theta.dtype, *draws).to(theta.dtype)[:, None]

    def __call__(self, theta: Tensor, seeds: Tensor) -> Tensor:
        """theta (batch, n_params) in [0, 1], seeds (batch,) int64 -> audio (batch, 1, n_samples)."""
        draws = self.draw(seeds)
        if len(seeds) != len(theta):
            raise ValueError(f"one seed per item is needed, got {len(seeds)} seeds for a theta of {len(theta)} items")
        return self.render(theta, *draws)

    @abstractmethod
    def signal(self, controls: list[Tensor], dtype: torch.dtype, *draws: Tensor) -> Tensor:
        """Each parameter's value in its unit, (batch, 1), theta's dtype, draws on its device -> (batch, n_samples)."""


@dataclass(eq=False)
class GranularSynth(Synth):
    """Sum of short chirps ("grains") of random pitch and position, scaled to an L2 norm of 1.

    theta[:, 0] is the density d: how many of the grains sound. theta[:, 1] is the slope s, in [-1, 1] after scaling:
    how fast every grain glides, gamma = tan(0.95 s pi / 2) sample_rate / (12 hop) / 4 octaves per second. Grains four
    times shorter want a hop four times shorter, or the slope becomes inaudible. The defaults are the paper's.
    """

    sample_rate_hz: float = 8192
    n_samples: int = 32768
    n_grains: int = 64  # of an item
    grain_samples: int = 4096  # length of a grain
    hop: int = 256
    f0_min_hz: float = 256.0  # range of the grains' centre frequencies, uniform in octaves
    f0_max_hz: float = 2048.0

    parameters = (Parameter("density", 0.0, 1.0, ""), Parameter("slope", -1.0, 1.0, ""))
    n_params = len(parameters)
    controls_dtype = None

    def __post_init__(self) -> None:
        if min(sizes := (self.sample_rate_hz, self.n_grains, self.hop)) <= 0:
            raise ValueError(f"sample_rate_hz, n_grains and hop must be positive, got {sizes}")
        if not 2 <= self.grain_samples < self.n_samples:
            limits = f"from 2 to n_samples - 1 = {self.n_samples - 1}"
            raise ValueError(f"grain_samples must be {limits}, got {self.grain_samples}: shorten the grains")
        if not 0 < self.f0_min_hz <= self.f0_max_hz:
            raise ValueError(f"expected 0 < f0_min_hz <= f0_max_hz, got {self.f0_min_hz} and {self.f0_max_hz}")

    @property
    def drawn(self) -> dict[str, tuple[tuple[int, ...], tuple[int, int] | None]]:
        onsets = (0, self.n_samples - self.grain_samples)
        return {"f0_hz": ((self.n_grains,), None), "onset": ((self.n_grains,), onsets)}

    def draw(self, seeds: Tensor) -> tuple[Tensor, ...]:
        """seeds (batch,) int64 -> f0_hz, float64, centre frequencies, log-uniform in [f0_min_hz, f0_max_hz), and onset,
        int64, first samples, uniform in [0, n_samples - grain_samples); both (batch, n_grains)."""
        u = uniform(seeds, 2 * self.n_grains).view(len(seeds), self.n_grains, 2)
        f0_hz = self.f0_min_hz * torch.exp2(u[..., 0] * math.log2(self.f0_max_hz / self.f0_min_hz))
        return f0_hz, (u[..., 1] * (self.n_samples - self.grain_samples)).long()

    def signal(self, controls: list[Tensor], dtype: torch.dtype, *draws: Tensor) -> Tensor:
        (density, slope), (f0_hz, onset), n = controls, draws, self.grain_samples
        f0_hz = f0_hz.double()

        # All grains of an item glide alike: one phase per item, in cycles per hertz of f0, serves them all. It is
        # float64: thousands of radians in float32 would cost half of the digits.
        rate_oct_per_s = torch.tan(0.95 * math.pi / 2 * slope.double()) * self.sample_rate_hz / (12 * self.hop) / 4
        sample = torch.arange(n, device=density.device)
        t_s = (sample.double() - n / 2) / self.sample_rate_hz
        cycles_per_hz = torch.cumsum(torch.exp2(rate_oct_per_s * t_s), dim=1) / self.sample_rate_hz  # (batch, n)
        middle = cycles_per_hz[:, n // 2 : n // 2 + 1]
        radians_at_middle = (2 * math.pi * torch.frac(f0_hz * middle)).to(dtype)[..., None]  # (batch, n_grains, 1)
        radians_per_cycle, cycles = (2 * math.pi * f0_hz).to(dtype)[..., None], (cycles_per_hz - middle).to(dtype)
        radians = torch.addcmul(radians_at_middle, radians_per_cycle, cycles[:, None])  # (batch, n_grains, n)

        window = torch.sin(math.pi / n * sample.to(dtype)) ** 2
        # falls from the first grain to the last, steeply so at low density; the norm is set afterwards
        place = torch.arange(self.n_grains, device=density.device, dtype=density.dtype) / self.n_grains
        offset = 0.25 * density + 0.75 * density**2
        amplitude = torch.sigmoid(-2 * (1 - density) * self.n_grains * (place - offset))
        gain = amplitude / f0_hz.to(dtype).sqrt()  # (batch, n_grains)
        grains = torch.sin(radians) * window * gain[..., None]
        index = onset[..., None] + sample
        audio = grains.new_zeros(len(grains), self.n_samples).scatter_add(1, index.flatten(1), grains.flatten(1))
        return audio / torch.linalg.vector_norm(audio, dim=1, keepdim=True)


@dataclass(eq=False)
class ChirpletSynth(Synth):
    """One amplitude-modulated chirp under a Gaussian window, in the middle of the audio but for a random shift.

    theta[:, 0] is the AM rate in Hz, at which the envelope's lobes follow each other; theta[:, 1] the FM rate in
    octaves per second, at which the chirp glides. The window's standard deviation is 0.1 bandwidth / FM rate seconds,
    its height the FM rate: octaves covered and area are the same at any. What is shifted over an end is lost. Shorter
    audio wants rates as much higher and a shift as much smaller. The defaults are the paper's.
    """

    am_hz: tuple[float, float]  # range, theta is linear in octaves within it
    fm_oct_per_s: tuple[float, float]  # likewise
    sample_rate_hz: float = 8192
    n_samples: int = 32768
    f0_hz: float = 512.0  # frequency in the middle of the chirplet
    bandwidth_oct: float = 2.0
    max_shift: int = 2048
    window_gradient: bool = False  # whether gradients know that the window depends on the FM rate; not so as run

    n_params = 2

    def __post_init__(self) -> None:
        if min(sizes := (self.sample_rate_hz, self.f0_hz, self.bandwidth_oct)) <= 0:
            raise ValueError(f"sample_rate_hz, f0_hz and bandwidth_oct must be positive, got {sizes}")
        if not 0 <= self.max_shift < self.n_samples:
            raise ValueError(f"max_shift must be from 0 to n_samples - 1 = {self.n_samples - 1}, got {self.max_shift}")
        am, fm = ("am", *self.am_hz, "Hz"), ("fm", *self.fm_oct_per_s, "octaves/s")
        self.parameters = (Parameter(*am, "log2"), Parameter(*fm, "log2"))

    def signal(self, controls: list[Tensor], dtype: torch.dtype, *draws: Tensor) -> Tensor:
        (am_hz, fm_oct_per_s), (shift,) = controls, draws
        # position within the chirplet; what would be beyond its ends before the shift stays silent
        sample = torch.arange(self.n_samples, device=shift.device) - shift[:, None]
        inside = (sample >= 0) & (sample < self.n_samples)
        t_s = (sample.double() - self.n_samples / 2) / self.sample_rate_hz
        # float64 here: thousands of cycles in float32 would cost half of the digits
        cycles = self.f0_hz / (fm_oct_per_s * math.log(2)) * (torch.exp2(fm_oct_per_s * t_s) - 1)
        window_s = t_s + 0.5 / self.sample_rate_hz  # the window's middle lies between two samples, the chirp's on one
        rate = fm_oct_per_s if self.window_gradient else fm_oct_per_s.detach()
        window = rate * torch.exp(-0.5 * (window_s * rate / (0.1 * self.bandwidth_oct)) ** 2) * inside
        carrier, envelope = torch.sin(2 * math.pi * torch.frac(cycles)), torch.sin(math.pi * am_hz * t_s)
        return carrier * window * envelope


@dataclass(eq=False)
class SnareSynth(Synth):
    """A TR-808 drum: two gliding sines and high-passed noise, each under its own envelope, through a tanh.

    An envelope rises linearly for 1 ms and then falls by 60 dB (6.91 nepers) within its decay time. Both oscillators
    share the frequency envelope e: they sound at f (1 + mod e) Hz and settle at f. The filter is the bilinear one of
    second order, clipped to [-1, 1] as in the authors' runs. The sound starts at sample common_delay + shift; what runs
    over the end is lost. After Shier et al. 2024; the defaults are the paper's; audio lies within [-1, 1].

    All is float64 inside but, as run, an envelope's factor per sample, rounded to theta's dtype. To the power of
    thousands, it is why float32 audio differs from float64 audio by about 1e-3.
    """

    sample_rate_hz: float = 44100  # at least 4000: oscillators go up to 2000 Hz, the noise's cutoff to half of this
    n_samples: int = 44100
    common_delay: int = 2048  # of all sounds
    max_shift: int = 2048  # at most common_delay; 2048 in the paper's meso task, 0 in its micro task
    noise: Tensor | None = None  # (n_samples,) shared by all sounds; None: uniform in [-1, 1), always the same

    n_params = 14

    def __post_init__(self) -> None:
        if not 4000 <= self.sample_rate_hz < math.inf:
            raise ValueError(f"sample_rate_hz must be at least 4000 and finite, got {self.sample_rate_hz}")
        self.attack = round(0.001 * self.sample_rate_hz)
        if not 0 <= self.max_shift <= self.common_delay < self.n_samples - self.attack:
            raise ValueError(
                f"expected 0 <= max_shift <= common_delay < n_samples - {self.attack} (the attack), got "
                f"{self.max_shift}, {self.common_delay} and n_samples {self.n_samples}"
            )
        if self.noise is None:
            self.noise = 2 * uniform(torch.tensor([808], device="cpu"), self.n_samples)[0] - 1
        check_tensor("noise", self.noise, (self.n_samples,))
        self.noise = self.noise.detach().double()
        freq, mod, decay, gain = (20.0, 2000.0, "Hz"), (-1.0, 2.0, ""), (10.0, 2000.0, "ms"), (-60.0, 6.0, "dB")
        ranges = {"osc1_freq": freq, "osc1_mod": mod, "osc2_freq": freq, "osc2_mod": mod}
        ranges |= dict.fromkeys(("freq_decay", "osc1_decay", "osc2_decay", "noise_decay"), decay)
        ranges |= {"noise_cutoff": (20.0, self.sample_rate_hz / 2, "Hz"), "noise_q": (0.5, 10.0, "")}
        ranges |= dict.fromkeys(("osc1_gain", "osc2_gain", "noise_gain"), gain) | {"tanh_gain": (-24.0, 24.0, "dB")}
        self.parameters = tuple(Parameter(name, *of_name) for name, of_name in ranges.items())

    def signal(self, controls: list[Tensor], dtype: torch.dtype, *draws: Tensor) -> Tensor:
        value, (shift,) = torch.cat(controls, dim=1), draws
        envelopes = self._envelopes(value[:, 4:8], dtype)
        gain = 10 ** (value[:, 10:, None] / 20)

        # thousands of radians: float64
        bend = 1 + value[:, 1:4:2, None] * envelopes[:, :1]  # (batch, 2, n_samples)
        step = 2 * math.pi / self.sample_rate_hz * value[:, 0:4:2, None] * bend
        phase = torch.cumsum(pad(step[..., :-1], (1, 0)), dim=2)  # the first sample's is 0
        oscillators = (gain[:, :2] * envelopes[:, 1:3] * torch.sin(phase)).sum(1)
        noise = self.noise.to(shift.device, non_blocking=True)
        noise = self._high_pass(noise * envelopes[:, 3], value[:, 8:9], value[:, 9:10])
        dry = torch.tanh(gain[:, 3] * (oscillators + gain[:, 2] * noise.clamp(-1, 1)))  # (batch, n_samples)

        sample = torch.arange(self.n_samples, device=shift.device) - self.common_delay - shift[:, None]
        return dry.gather(1, sample.clamp(min=0)) * (sample >= 0)

    def _envelopes(self, decay_ms: Tensor, dtype: torch.dtype) -> Tensor:
        """decay_ms (batch, 4) float64 -> (batch, 4, n_samples) float64, in [0, 1]."""
        factor = (1 - 6.91 / (decay_ms * self.sample_rate_hz / 1000)).to(dtype).double()
        attack = torch.linspace(0, 1, self.attack, dtype=torch.float64, device=decay_ms.device)
        n = torch.arange(self.n_samples - self.attack, dtype=torch.float64, device=decay_ms.device)
        return torch.cat([attack.expand(*decay_ms.shape, -1), factor[..., None] ** n], dim=2)

    def _high_pass(self, x: Tensor, cutoff_hz: Tensor, q: Tensor) -> Tensor:
        """x (batch, n_samples), cutoff_hz and q (batch, 1), float64 -> (batch, n_samples), filtered from rest.

        By FFT, with sample t of x and of the filter's response both times r = 1e-7^(t / n_samples): what rings on past
        the audio's end wraps around to its beginning, but 1e-7 times as loud, and the response is finite even at a
        cutoff of half the sample rate, where the poles lie on the unit circle.
        """
        n = self.n_samples
        turn = torch.arange(n, dtype=torch.float64, device=x.device) / n
        r = 1e-7**turn
        w = 1e-7 ** (1 / n) * torch.exp(-2j * math.pi * turn[: n // 2 + 1])  # 1/z
        omega = 2 * math.pi * cutoff_hz / self.sample_rate_hz
        cos, alpha = torch.cos(omega), torch.sin(omega) / (2 * q)
        response = (1 + cos) / 2 * (1 - w) ** 2 / (1 + alpha - 2 * cos * w + (1 - alpha) * w**2)
        return torch.fft.irfft(torch.fft.rfft(x * r) * response, n) / r


def uniform(seeds: Tensor, n: int) -> Tensor:
    """seeds (batch,) int64 -> (batch, n) float64 in [0, 1): draw i of a seed is SplitMix64's i-th (Steele et al. 2014).

    The seed is hashed first: SplitMix64's own streams of neighbouring seeds could overlap.
    """
    check_tensor("seeds", seeds, ("batch",), (torch.int64,), (0, 2**63 - 1))
    counter = torch.arange(1, n + 1, dtype=torch.int64, device="cpu") * _GOLDEN
    bits = _mix64(_mix64(seeds.cpu() + _GOLDEN)[:, None] + counter)
    return _shift_right(bits, 11).double() * 2.0**-53


# SplitMix64's constants, as int64
_GOLDEN, _MIX_1, _MIX_2 = (x - (1 << 64) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _mix64(z: Tensor) -> Tensor:
    """SplitMix64's finalizer on the bits of an int64 tensor; products wrap around modulo 2^64."""
    z = (z ^ _shift_right(z, 30)) * _MIX_1
    z = (z ^ _shift_right(z, 27)) * _MIX_2
    return z ^ _shift_right(z, 31)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Logical shift: int64's own shift copies the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
