"""The neural encoder E: audio -> constant-Q transform -> CNN -> theta in (0, 1)^U."""

from __future__ import annotations

import torch
from nnAudio.features import CQT1992v2
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from scrapl_lib.checks import check_audio

from .surroundings import own_surroundings

_LOG_FLOOR = 1e-3


class Encoder(nn.Module):
    """Log-CQT and CNN; `forward(features(audio))` estimates theta.

    features: log(1 + CQT / 1e-3), 12 bins per octave from 0.4 sample_rate / 2^octaves on. The CQT is nnAudio's, fixed:
    its kernels are neither weights nor part of the state_dict. It carries no graph: a data set needs it once only.
    forward: one block per entry of `pools` (layer norm over both axes without weights, 3 x 3 convolution, max-pool,
    PReLU), mean over both axes, dense layer, and a small head per parameter, ended by a sigmoid.

    Args:
        sample_rate_hz, n_samples: of the audio. n_params: number of parameters U.
        octaves, hop: of the CQT; hop in samples.
        channels: of every block. pools: (log-frequency, time) pooling of each block.
        dense: width of the dense layer; a head's hidden layer has half.
        dropout: probability, after the dense layer and in the heads.

    The defaults are the paper's granular and chirplet encoder: features 60 x 129, 604,106 weights in 28 tensors.
    Weights are drawn from torch's global generator, on the CPU and in float32 whatever its defaults: move them by `to`.
    """

    @own_surroundings()
    def __init__(
        self,
        sample_rate_hz: float = 8192,
        n_samples: int = 32768,
        n_params: int = 2,
        octaves: int = 5,
        hop: int = 256,
        channels: int = 128,
        pools: tuple[tuple[int, int], ...] = ((2, 2),) * 5,
        dense: int = 64,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.n_samples, self.n_params = n_samples, n_params
        self.feature_shape = bins, frames = 12 * octaves, n_samples // hop + 1
        for pool in pools:
            bins, frames = bins // pool[0], frames // pool[1]
        if min(bins, frames) < 1:
            shape = "{} bins x {} frames".format(*self.feature_shape)
            raise ValueError(f"pools {pools} leave nothing of {shape}: use fewer or smaller ones")
        fmin_hz = 0.4 * sample_rate_hz / 2**octaves
        self.cqt = CQT1992v2(sample_rate_hz, hop, fmin_hz, n_bins=12 * octaves, bins_per_octave=12, verbose=False)
        if (length := self.cqt.kernel_width) // 2 >= n_samples:
            raise ValueError(
                f"the lowest CQT filter is {length} samples long and reflects half of that beyond the audio's ends, "
                f"too much for {n_samples} samples: use fewer octaves or longer audio"
            )
        for name, kernel in list(self.cqt.named_buffers()):
            self.cqt.register_buffer(name, kernel, persistent=False)

        widths = [1, *[channels] * len(pools)]
        self.convolutions = nn.ModuleList(nn.Conv2d(*pair, 3, padding="same") for pair in zip(widths, widths[1:]))
        # what follows takes over their layout: on a CPU, pooling by rows of channels is nine times as fast
        for convolution in self.convolutions:
            weight = convolution.weight.detach().contiguous(memory_format=torch.channels_last)
            convolution.weight = nn.Parameter(weight)
        self.pools = nn.ModuleList(nn.MaxPool2d(pool) for pool in pools)
        self.activations = nn.ModuleList(nn.PReLU() for _ in pools)
        self.dense = nn.Sequential(nn.Linear(channels, dense), nn.PReLU(), nn.Dropout(dropout))
        half = dense // 2
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(dense, half), nn.PReLU(), nn.Dropout(dropout), nn.Linear(half, 1), nn.Sigmoid())
            for _ in range(n_params)
        )

    @torch.no_grad()
    @own_surroundings()
    def features(self, audio: Tensor) -> Tensor:
        """audio (batch, 1, n_samples) -> log-CQT (batch, 1, bins, frames), without a graph and in the encoder's dtype.

        float64 audio is converted to it, and autocast is off. Raises ValueError or TypeError as `check_audio` does.
        """
        check_audio(audio, "audio", self.n_samples)
        return torch.log1p(self.cqt(audio.to(self.cqt.cqt_kernels_real.dtype))[:, None] / _LOG_FLOOR)

    def forward(self, features: Tensor) -> Tensor:
        """features (batch, 1, bins, frames) -> theta (batch, n_params) in (0, 1), in the features' dtype.

        Raises: ValueError for another shape, TypeError for another dtype than the weights' (but under autocast).
        """
        if features.shape[1:] != (1, *self.feature_shape):
            shape, got = "(batch, 1, {}, {})".format(*self.feature_shape), tuple(features.shape)
            raise ValueError(f"expected features of shape {shape}, got {got}: call encoder(encoder.features(audio))")
        dtype, kind = self.dense[0].weight.dtype, features.device.type
        cast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        if features.dtype != dtype and not (cast and features.dtype != torch.float64):
            advice = "take encoder.features(audio), or encoder.to(dtype) first"
            raise TypeError(f"expected features of the weights' dtype {dtype}, got {features.dtype}: {advice}")
        hidden = features
        for convolution, pool, activation in zip(self.convolutions, self.pools, self.activations):
            hidden = activation(pool(convolution(layer_norm(hidden, hidden.shape[-2:]))))
        hidden = self.dense(hidden.mean(dim=(-2, -1)))
        return torch.cat([head(hidden) for head in self.heads], dim=1).to(features.dtype)
