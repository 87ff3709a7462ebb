"""Differentiable synthesizers without weights: theta in [0, 1]^U to audio (paper, section on synthesizers).

A synthesizer may be random. `draw(seeds)` makes all of its random numbers, one independent draw per item and seed, and
`render(theta, *draws)` is a deterministic and differentiable function of theta. Calling the synthesizer does both.

That theta is finite and in [0, 1], ends included (a sigmoid rounds to them, not beyond), is checked where theta lies on the
CPU; on CUDA only its type, shape and dtype are: to look at its values, the host would have to wait for the device.

Domain suffixes: _hz hertz, _s seconds, _oct_per_s octaves per second; lengths without a suffix are samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Parameter:
    """What one coordinate of theta means.

    `value(theta)` maps [0, 1] to [min, max] in `unit`, along `curve`: "linear" or "log2" (linear in octaves).
    """

    name: str
    min: float
    max: float
    unit: str
    curve: str = "linear"

    def value(self, theta: Tensor) -> Tensor:
        """theta in [0, 1], any shape -> the parameter's value, same shape."""
        if self.curve == "log2":
            return self.min * (self.max / self.min) ** theta
        return self.min + (self.max - self.min) * theta


class GranularSynth:
    """Sum of short chirps ("grains") of random pitch and position, scaled to an L2 norm of 1.

    theta[:, 0] is the density d: how many of the grains sound. theta[:, 1] is the slope s, in [-1, 1] after scaling:
    how fast every grain glides, gamma = tan(0.95 s pi / 2) sample_rate / (12 hop) / 4 octaves per second.

    Args:
        sample_rate_hz: sample rate.
        n_samples: length of the audio.
        n_grains: grains per item.
        grain_samples: length of a grain; at most n_samples - 1.
        hop: sets the unit of the slope (one semitone per hop of this many samples, a quarter of it at s = 0.53). A grain
            four times shorter wants a hop four times shorter, or the slope becomes inaudible.
        f0_min_hz, f0_max_hz: range of the grains' centre frequencies, uniform in octaves.

    The defaults are the paper's. Works in float32 and float64 (theta's), on theta's device, and is twice differentiable.
    """

    parameters = (Parameter("density", 0.0, 1.0, ""), Parameter("slope", -1.0, 1.0, ""))
    n_params = len(parameters)

    def __init__(
        self,
        sample_rate_hz: float = 8192,
        n_samples: int = 32768,
        n_grains: int = 64,
        grain_samples: int = 4096,
        hop: int = 256,
        f0_min_hz: float = 256.0,
        f0_max_hz: float = 2048.0,
    ) -> None:
        if min(sample_rate_hz, n_grains, hop) <= 0:
            raise ValueError(
                f"sample_rate_hz, n_grains and hop must be positive, got {sample_rate_hz}, {n_grains} and {hop}"
            )
        if not 2 <= grain_samples < n_samples:
            raise ValueError(
                f"grain_samples must be from 2 to n_samples - 1 = {n_samples - 1}, got {grain_samples}: "
                "shorten the grains or lengthen the audio"
            )
        if not 0 < f0_min_hz <= f0_max_hz:
            raise ValueError(f"expected 0 < f0_min_hz <= f0_max_hz, got {f0_min_hz} and {f0_max_hz}")
        self.sample_rate_hz = sample_rate_hz
        self.n_samples = n_samples
        self.n_grains = n_grains
        self.grain_samples = grain_samples
        self.hop = hop
        self.f0_min_hz = f0_min_hz
        self.f0_max_hz = f0_max_hz

    def draw(self, seeds: Tensor) -> tuple[Tensor, Tensor]:
        """The random part: a grain's centre frequency and first sample.

        An item's draw depends on its own seed only, not on the batch or the device (it is made on the CPU).

        Args:
            seeds: (batch,) int64.
        Returns:
            f0_hz (batch, n_grains) float64, log-uniform in [f0_min_hz, f0_max_hz);
            onset (batch, n_grains) int64, uniform in [0, n_samples - grain_samples).
        """
        u = _uniform(seeds, 2 * self.n_grains).view(len(seeds), self.n_grains, 2)
        f0_hz = self.f0_min_hz * torch.exp2(u[..., 0] * math.log2(self.f0_max_hz / self.f0_min_hz))
        onset = (u[..., 1] * (self.n_samples - self.grain_samples)).long()
        return f0_hz, onset

    def render(self, theta: Tensor, f0_hz: Tensor, onset: Tensor) -> Tensor:
        """The deterministic part.

        Args:
            theta: (batch, 2) density and slope in [0, 1], float32 or float64.
            f0_hz, onset: (batch, n_grains) as from `draw`; onset in [0, n_samples - grain_samples].
        Returns:
            audio (batch, 1, n_samples) in theta's dtype and on its device, L2 norm 1.
        """
        _check_theta(theta, self.n_params)
        batch, n = len(theta), self.grain_samples
        for name, draw in (("f0_hz", f0_hz), ("onset", onset)):
            if draw.shape != (batch, self.n_grains):
                raise ValueError(
                    f"{name} must have shape (batch, n_grains) = {(batch, self.n_grains)}, got {tuple(draw.shape)}"
                )
        if onset.dtype != torch.int64 or onset.min() < 0 or onset.max() > self.n_samples - n:
            raise ValueError(
                f"onset must be int64 in [0, {self.n_samples - n}], so that every grain fits, got {onset.dtype} in "
                f"[{onset.min()}, {onset.max()}]"
            )
        f0_hz = f0_hz.to(theta.device, torch.float64, non_blocking=True)  # else the host would wait for the device
        onset = onset.to(theta.device, non_blocking=True)
        density, slope = (p.value(theta[:, u : u + 1]) for u, p in enumerate(self.parameters))  # (batch, 1) each

        # All grains of an item glide alike, so one phase per item, in cycles per hertz of f0, serves them all. It is
        # cheap to hold in float64, and needed: thousands of radians in float32 would cost half of the digits.
        rate_oct_per_s = torch.tan(0.95 * math.pi / 2 * slope.double()) * self.sample_rate_hz / (12 * self.hop) / 4
        sample = torch.arange(n, device=theta.device)
        t_s = (sample - n / 2).double() / self.sample_rate_hz
        cycles_per_hz = torch.cumsum(torch.exp2(rate_oct_per_s * t_s), dim=1) / self.sample_rate_hz  # (batch, n)
        middle = cycles_per_hz[:, n // 2 : n // 2 + 1]
        radians_at_middle = (2 * math.pi * torch.frac(f0_hz * middle)).to(theta.dtype)  # (batch, n_grains)
        radians = torch.addcmul(
            radians_at_middle[..., None],
            (2 * math.pi * f0_hz).to(theta.dtype)[..., None],
            (cycles_per_hz - middle).to(theta.dtype)[:, None],
        )  # (batch, n_grains, n)

        window = torch.sin(math.pi / n * sample.to(theta.dtype)) ** 2
        gain = self._amplitudes(density) / f0_hz.to(theta.dtype).sqrt()  # (batch, n_grains)
        grains = torch.sin(radians) * window * gain[..., None]

        index = onset[..., None] + sample
        audio = grains.new_zeros(batch, self.n_samples).scatter_add(1, index.flatten(1), grains.flatten(1))
        return (audio / torch.linalg.vector_norm(audio, dim=1, keepdim=True))[:, None]

    def __call__(self, theta: Tensor, seeds: Tensor) -> Tensor:
        """theta (batch, 2) in [0, 1], seeds (batch,) int64 -> audio (batch, 1, n_samples)."""
        _check_call(theta, seeds, self.n_params)
        return self.render(theta, *self.draw(seeds))

    def _amplitudes(self, density: Tensor) -> Tensor:
        """density (batch, 1) -> (batch, n_grains): falls from the first grain to the last, steeply so at low density.

        Not divided by the largest, as the paper has it: the audio's norm is set afterwards.
        """
        offset = 0.25 * density + 0.75 * density**2
        position = torch.arange(self.n_grains, device=density.device, dtype=density.dtype) / self.n_grains
        return torch.sigmoid(-2 * (1 - density) * self.n_grains * (position - offset))


class ChirpletSynth:
    """One amplitude-modulated chirp under a Gaussian window, in the middle of the audio but for a random shift.

    theta[:, 0] is the AM rate in Hz, at which the envelope's lobes follow each other; theta[:, 1] the FM rate, at which the
    chirp glides, in octaves per second. The window's standard deviation is 0.1 bandwidth / FM rate seconds, so that the
    chirplet covers the same octaves at any FM rate; its height is the FM rate, so that its area is the same, too.

    Args:
        am_hz, fm_oct_per_s: ranges (min, max), with theta linear in octaves within them.
        sample_rate_hz: sample rate.
        n_samples: length of the audio; a shorter one wants rates as much higher, and a shift as much smaller.
        f0_hz: frequency in the middle of the chirplet.
        bandwidth_oct: sets the chirplet's length, see above.
        max_shift: largest shift in samples; what is shifted over an end is lost.
        window_gradient: whether gradients know that the window, length and height, depends on the FM rate. In the authors' runs
            it is a constant for them.

    The defaults, with a range of `experiments.CHIRPLETS`, are the paper's. Dtype, device and derivatives as in `GranularSynth`.
    """

    n_params = 2

    def __init__(
        self,
        am_hz: tuple[float, float],
        fm_oct_per_s: tuple[float, float],
        sample_rate_hz: float = 8192,
        n_samples: int = 32768,
        f0_hz: float = 512.0,
        bandwidth_oct: float = 2.0,
        max_shift: int = 2048,
        window_gradient: bool = False,
    ) -> None:
        for name, (low, high) in (("am_hz", am_hz), ("fm_oct_per_s", fm_oct_per_s)):
            if not 0 < low <= high:
                raise ValueError(f"{name} must be a range (min, max) with 0 < min <= max, got {(low, high)}")
        if min(sample_rate_hz, f0_hz, bandwidth_oct) <= 0:
            raise ValueError(
                f"sample_rate_hz, f0_hz and bandwidth_oct must be positive, got {sample_rate_hz}, {f0_hz} and {bandwidth_oct}"
            )
        if not 0 <= max_shift < n_samples:
            raise ValueError(f"max_shift must be from 0 to n_samples - 1 = {n_samples - 1}, got {max_shift}")
        self.parameters = (Parameter("am", *am_hz, "Hz", "log2"), Parameter("fm", *fm_oct_per_s, "octaves/s", "log2"))
        self.sample_rate_hz = sample_rate_hz
        self.n_samples = n_samples
        self.f0_hz = f0_hz
        self.bandwidth_oct = bandwidth_oct
        self.max_shift = max_shift
        self.window_gradient = window_gradient

    def draw(self, seeds: Tensor) -> tuple[Tensor]:
        """The random part, as in `GranularSynth`: seeds (batch,) int64 -> (shift (batch,) int64,), uniform in
        [-max_shift, max_shift]; positive is later."""
        return (_draw_shift(seeds, self.max_shift),)

    def render(self, theta: Tensor, shift: Tensor) -> Tensor:
        """The deterministic part: theta (batch, 2) in [0, 1], float32 or float64, and shift (batch,) int64 as from `draw`
        -> audio (batch, 1, n_samples) in theta's dtype and on its device."""
        _check_theta(theta, self.n_params)
        _check_shift(shift, len(theta), self.max_shift)
        am_hz, fm_oct_per_s = (
            p.value(theta[:, u : u + 1].double()) for u, p in enumerate(self.parameters)
        )  # (batch, 1) each
        # position within the chirplet; what would be beyond its ends before the shift stays silent
        sample = torch.arange(self.n_samples, device=theta.device) - shift.to(theta.device, non_blocking=True)[:, None]
        inside = (sample >= 0) & (sample < self.n_samples)
        t_s = (sample - self.n_samples / 2).double() / self.sample_rate_hz
        # float64 here: thousands of cycles in float32 would cost half of the digits
        cycles = self.f0_hz / (fm_oct_per_s * math.log(2)) * (torch.exp2(fm_oct_per_s * t_s) - 1)
        window_s = t_s + 0.5 / self.sample_rate_hz  # the window's middle lies between two samples, the chirp's on one
        rate = fm_oct_per_s if self.window_gradient else fm_oct_per_s.detach()
        window = rate * torch.exp(-0.5 * (window_s * rate / (0.1 * self.bandwidth_oct)) ** 2) * inside
        carrier, envelope = torch.sin(2 * math.pi * torch.frac(cycles)), torch.sin(math.pi * am_hz * t_s)
        return (carrier * window * envelope).to(theta.dtype)[:, None]

    def __call__(self, theta: Tensor, seeds: Tensor) -> Tensor:
        """theta (batch, 2) in [0, 1], seeds (batch,) int64 -> audio (batch, 1, n_samples)."""
        _check_call(theta, seeds, self.n_params)
        return self.render(theta, *self.draw(seeds))


class SnareSynth:
    """A TR-808 drum: two gliding sines and high-passed noise, each under its own envelope, through a tanh.

    An envelope rises linearly for 1 ms and then falls by 60 dB (6.91 nepers) within its decay time. Both oscillators
    share the frequency envelope e: they sound at f (1 + mod e) Hz and settle at f. The filter is the bilinear one of
    second order; what it returns is clipped to [-1, 1], as in the authors' runs. The sound starts at sample
    common_delay + shift, and what runs over the end is lost. After Shier et al. 2024 (paper, section 6).

    Args:
        sample_rate_hz: sample rate, at least 4000 as oscillators go up to 2000 Hz. The noise's cutoff goes up to half.
        n_samples: length of the audio.
        common_delay: samples of delay that all sounds share.
        max_shift: largest shift in samples, at most common_delay: 2048 in the paper's meso task, 0 in its micro task.
        noise: (n_samples,) the noise that all sounds share, finite; by default uniform in [-1, 1) and always the same.

    The defaults are the paper's. Dtype, device and derivatives as in `GranularSynth`. All is float64 inside but for one
    rounding to theta's dtype, as run: that of an envelope's factor per sample. Taken to the power of thousands, it is
    why float32 audio differs from float64 audio by about 1e-3.
    """

    n_params = 14

    def __init__(
        self,
        sample_rate_hz: float = 44100,
        n_samples: int = 44100,
        common_delay: int = 2048,
        max_shift: int = 2048,
        noise: Tensor | None = None,
    ) -> None:
        if not 4000 <= sample_rate_hz < math.inf:
            raise ValueError(f"sample_rate_hz must be at least 4000 and finite, got {sample_rate_hz}")
        self.attack = round(0.001 * sample_rate_hz)
        if not 0 <= max_shift <= common_delay < n_samples - self.attack:
            raise ValueError(
                f"expected 0 <= max_shift <= common_delay < n_samples - {self.attack} (the attack), got max_shift "
                f"{max_shift}, common_delay {common_delay} and n_samples {n_samples}: shift less or lengthen the audio"
            )
        if noise is None:
            noise = 2 * _uniform(torch.tensor([808]), n_samples)[0] - 1
        if not isinstance(noise, Tensor) or not noise.is_floating_point() or noise.shape != (n_samples,):
            got = f"{noise.dtype} of shape {tuple(noise.shape)}" if isinstance(noise, Tensor) else type(noise).__name__
            raise ValueError(f"noise must be a float tensor of shape (n_samples,) = ({n_samples},), got {got}")
        if not noise.isfinite().all():
            raise ValueError(f"noise must be finite, got {int((~noise.isfinite()).sum())} NaN or infinite values")
        self.parameters = (
            Parameter("osc1_freq", 20.0, 2000.0, "Hz"),
            Parameter("osc1_mod", -1.0, 2.0, ""),
            Parameter("osc2_freq", 20.0, 2000.0, "Hz"),
            Parameter("osc2_mod", -1.0, 2.0, ""),
            Parameter("freq_decay", 10.0, 2000.0, "ms"),
            Parameter("osc1_decay", 10.0, 2000.0, "ms"),
            Parameter("osc2_decay", 10.0, 2000.0, "ms"),
            Parameter("noise_decay", 10.0, 2000.0, "ms"),
            Parameter("noise_cutoff", 20.0, sample_rate_hz / 2, "Hz"),
            Parameter("noise_q", 0.5, 10.0, ""),
            Parameter("osc1_gain", -60.0, 6.0, "dB"),
            Parameter("osc2_gain", -60.0, 6.0, "dB"),
            Parameter("noise_gain", -60.0, 6.0, "dB"),
            Parameter("tanh_gain", -24.0, 24.0, "dB"),
        )
        self.sample_rate_hz = sample_rate_hz
        self.n_samples = n_samples
        self.common_delay = common_delay
        self.max_shift = max_shift
        self.noise = noise.detach().double()

    def draw(self, seeds: Tensor) -> tuple[Tensor]:
        """The random part, as in `ChirpletSynth`: seeds (batch,) int64 -> (shift (batch,) int64,), uniform in
        [-max_shift, max_shift]; positive is later."""
        return (_draw_shift(seeds, self.max_shift),)

    def render(self, theta: Tensor, shift: Tensor) -> Tensor:
        """The deterministic part: theta (batch, 14) in [0, 1], float32 or float64, and shift (batch,) int64 as from
        `draw` -> audio (batch, 1, n_samples) in theta's dtype and on its device, within [-1, 1]."""
        _check_theta(theta, self.n_params)
        _check_shift(shift, len(theta), self.max_shift)
        self.noise = self.noise.to(theta.device)
        value = torch.stack([p.value(theta[:, u].double()) for u, p in enumerate(self.parameters)], dim=1)
        envelopes = self._envelopes(value[:, 4:8], theta.dtype)  # (batch, 4, n_samples)
        gain = 10 ** (value[:, 10:, None] / 20)

        # thousands of radians: float64
        bend = 1 + value[:, 1:4:2, None] * envelopes[:, :1]  # (batch, 2, n_samples)
        step = 2 * math.pi / self.sample_rate_hz * value[:, 0:4:2, None] * bend
        phase = torch.cumsum(torch.nn.functional.pad(step[..., :-1], (1, 0)), dim=2)  # the first sample's is 0
        oscillators = (gain[:, :2] * envelopes[:, 1:3] * torch.sin(phase)).sum(1)
        noise = self._high_pass(self.noise * envelopes[:, 3], value[:, 8:9], value[:, 9:10])
        noise = gain[:, 2] * noise.clamp(-1, 1)
        dry = torch.tanh(gain[:, 3] * (oscillators + noise))  # (batch, n_samples)

        sample = torch.arange(self.n_samples, device=theta.device)
        sample = sample - self.common_delay - shift.to(theta.device, non_blocking=True)[:, None]
        return (dry.gather(1, sample.clamp(min=0)) * (sample >= 0)).to(theta.dtype)[:, None]

    def __call__(self, theta: Tensor, seeds: Tensor) -> Tensor:
        """theta (batch, 14) in [0, 1], seeds (batch,) int64 -> audio (batch, 1, n_samples)."""
        _check_call(theta, seeds, self.n_params)
        return self.render(theta, *self.draw(seeds))

    def _envelopes(self, decay_ms: Tensor, dtype: torch.dtype) -> Tensor:
        """decay_ms (batch, 4) float64 -> (batch, 4, n_samples) float64, in [0, 1]."""
        factor = (1 - 6.91 / (decay_ms * self.sample_rate_hz / 1000)).to(dtype).double()
        attack = torch.linspace(0, 1, self.attack, dtype=torch.float64, device=decay_ms.device)
        n = torch.arange(self.n_samples - self.attack, dtype=torch.float64, device=decay_ms.device)
        return torch.cat([attack.expand(*decay_ms.shape, -1), factor[..., None] ** n], dim=2)

    def _high_pass(self, x: Tensor, cutoff_hz: Tensor, q: Tensor) -> Tensor:
        """x (batch, n_samples), cutoff_hz and q (batch, 1), float64 -> (batch, n_samples), filtered from rest.

        In the frequency domain, with x and the filter's response both times r^n, r^n_samples = 1e-7. What rings on for
        longer than the audio wraps around to its beginning, but 1e-7 times as loud; and as r < 1, the response is
        finite even at a cutoff of half the sample rate, where the poles lie on the unit circle.
        """
        n = self.n_samples
        turn = torch.arange(n, dtype=torch.float64, device=x.device) / n
        r = 1e-7**turn  # r^n of the docstring
        w = 1e-7 ** (1 / n) * torch.exp(-2j * math.pi * turn[: n // 2 + 1])  # 1/z
        omega = 2 * math.pi * cutoff_hz / self.sample_rate_hz
        cos, alpha = torch.cos(omega), torch.sin(omega) / (2 * q)
        response = (1 + cos) / 2 * (1 - w) ** 2 / (1 + alpha - 2 * cos * w + (1 - alpha) * w**2)
        return torch.fft.irfft(torch.fft.rfft(x * r) * response, n) / r


def _check_theta(theta: Tensor, n_params: int) -> None:
    if not isinstance(theta, Tensor):
        raise TypeError(
            f"theta must be a float32 or float64 tensor of shape (batch, {n_params}), got {type(theta).__name__}: write "
            "torch.as_tensor(theta, dtype=torch.float32)"
        )
    if (
        theta.ndim != 2
        or theta.shape[1] != n_params
        or not len(theta)
        or theta.dtype not in (torch.float32, torch.float64)
    ):
        raise ValueError(
            f"theta must be float32 or float64 of shape (batch, {n_params}) with a batch of at least 1, got {theta.dtype} "
            f"of shape {tuple(theta.shape)}"
        )
    if theta.device.type == "cpu" and not ((theta >= 0) & (theta <= 1)).all():  # CUDA would have to be waited for
        if n_bad := int((~theta.isfinite()).sum()):
            raise ValueError(
                f"theta must be finite, got {n_bad} NaN or infinite values: look for the first one in what computes theta"
            )
        raise ValueError(
            f"theta must lie in [0, 1], got values in [{theta.min():g}, {theta.max():g}]: "
            "map physical values to [0, 1] first (see Parameter)"
        )


def _check_seeds(seeds: Tensor) -> None:
    if not isinstance(seeds, Tensor):
        raise TypeError(
            f"seeds must be an int64 tensor of shape (batch,), got {type(seeds).__name__}: write torch.as_tensor(seeds)"
        )
    if seeds.dtype != torch.int64 or seeds.ndim != 1:
        raise ValueError(f"seeds must be int64 of shape (batch,), got {seeds.dtype} of shape {tuple(seeds.shape)}")


def _check_call(theta: Tensor, seeds: Tensor, n_params: int) -> None:
    _check_theta(theta, n_params)
    _check_seeds(seeds)
    if len(seeds) != len(theta):
        raise ValueError(f"one seed per item is needed, got {len(seeds)} seeds for a theta of {len(theta)} items")


def _check_shift(shift: Tensor, batch: int, max_shift: int) -> None:
    if not isinstance(shift, Tensor):
        raise TypeError(f"shift must be a torch tensor, as `draw` returns it, got {type(shift).__name__}")
    if shift.dtype != torch.int64 or shift.shape != (batch,) or shift.abs().max() > max_shift:
        raise ValueError(
            f"shift must be int64 of shape (batch,) = ({batch},) and in [-{max_shift}, {max_shift}], "
            f"got {shift.dtype} of shape {tuple(shift.shape)}: {shift}"
        )


def _draw_shift(seeds: Tensor, max_shift: int) -> Tensor:
    """seeds (batch,) int64 -> (batch,) int64, uniform in [-max_shift, max_shift]."""
    return (_uniform(seeds, 1)[:, 0] * (2 * max_shift + 1)).long() - max_shift


def _uniform(seeds: Tensor, n: int) -> Tensor:
    """seeds (batch,) int64 -> (batch, n) float64 in [0, 1): draw i of a seed is SplitMix64's i-th (Steele et al. 2014).

    The seed is hashed first: SplitMix64's own streams of neighbouring seeds could overlap.
    """
    _check_seeds(seeds)
    seeds = seeds.cpu()
    golden = _signed(0x9E3779B97F4A7C15)
    counter = torch.arange(1, n + 1, dtype=torch.int64) * golden
    bits = _mix64(_mix64(seeds + golden)[:, None] + counter)
    return _shift_right(bits, 11).double() * 2.0**-53


def _mix64(z: Tensor) -> Tensor:
    """SplitMix64's finalizer on the bits of an int64 tensor; products wrap around modulo 2^64."""
    z = (z ^ _shift_right(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift_right(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift_right(z, 31)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Logical shift: int64's own shift copies the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    return x - (1 << 64)
