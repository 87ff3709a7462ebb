"""What a run is made of, and where it is computed: encoder, synthesizer, data set and loss of a config, on a device."""

from __future__ import annotations

import torch
from torch.nn import functional

from scrapl_lib.losses import SCRAPLLoss

from .data import ThetaGrid
from .tasks import RunConfig

CHUNK = 64  # items at a time where no gradient is needed


def check_device(device: str) -> torch.device:
    """Raise ValueError unless the device exists here."""
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"unknown device {device!r}: use cpu, cuda or cuda:<n>") from error
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"unknown device {device!r}: use cpu, cuda or cuda:<n>")
    n = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found.type == "cuda" and (found.index or 0) >= n:
        raise ValueError(
            f"device {device!r} asked for, but this PyTorch sees {n} CUDA devices; use --device cpu, which is slow"
        )
    return found


class Problem:
    """Encoder with its initial weights, synthesizer, data set, sounds x (N, 1, samples) and SCRAPL loss of a config."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.config = config
        torch.manual_seed(config.seed)
        self.encoder = config.encoder().to(device)
        self.synth, self.data = config.synth(), config.data()
        self.loss = SCRAPLLoss(**config.transform(), seed=config.seed)
        with torch.no_grad():
            if isinstance(self.data, ThetaGrid):
                pairs = zip(self.data.theta.to(device).split(CHUNK), self.data.seed.split(CHUNK), strict=True)
                self.x = torch.cat([self.synth(theta, seeds) for theta, seeds in pairs])
            else:
                self.x = functional.pad(self.data.x.to(device), (config.common_delay, 0))
