"""What a run is made of, and where it is computed: encoder, synthesizer, data set and loss of a config, on a device."""

from __future__ import annotations

import os
import re
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .data import ThetaGrid
from .measures import theta_l1
from .records import n_cores
from .tasks import RunConfig

CHUNK = 64  # items at a time where no gradient is needed
PER_GPU, RUN_GIB = 4, 8  # runs at once on a CUDA device: at most so many, each with so much of its memory


def default_device(profile: str) -> str:
    """cuda for the paper profile, cpu for the others."""
    return "cuda" if profile == "paper" else "cpu"


def check_device(device: str) -> torch.device:
    """Raise ValueError unless the device exists here."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ValueError(f"unknown device {device!r}: use cpu, cuda or cuda:<n>")
    found, n = torch.device(device), torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found.type == "cuda" and (found.index or 0) >= n:
        mend = f"but this PyTorch sees {n} CUDA devices; use --device cpu, which is slow"
        raise ValueError(f"device {device!r} asked for, {mend}")
    return found


def default_workers(device: str) -> int:
    """Runs at once on a device that is here: one per core on a CPU.

    On a CUDA device, whose small kernels one run seldom fills, as many as find RUN_GIB GiB of its memory, at most
    PER_GPU and one per core: a guess, benchmarks/throughput.py measures.
    """
    if device == "cpu":
        return n_cores()
    fit = torch.cuda.get_device_properties(device).total_memory // (RUN_GIB * 2**30)
    return max(1, min(PER_GPU, n_cores(), fit))


def make_deterministic(device: str) -> None:
    """Have this process compute the same bits again, on one type of device and with one version of PyTorch.

    By deterministic algorithms, and in full float32 (TF32 is for some GPUs only). Call it before anything is computed.
    On a CPU an operation without such an algorithm raises RuntimeError; on CUDA a warning names it.
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True, warn_only=torch.device(device).type != "cpu")
    torch.backends.cudnn.benchmark = torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


@torch.no_grad()
def in_chunks(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """`function` of the inputs, CHUNK items at a time, without a gradient."""
    return torch.cat([function(*parts) for parts in zip(*(x.split(CHUNK) for x in inputs), strict=True)])


class Problem:
    """Encoder, synthesizer, data set and loss of a config; initial weights and draws come from its seed.

    probs: path probabilities (P,) of a SCRAPL loss; None: uniform.

    Attributes: config, device, encoder, synth, data; loss, between sounds, or for p_loss between parameters; theta
    (N, U), None for sounds whose parameters nobody knows; x, the sounds (N, 1, samples), rendered here, once; features,
    what the encoder sees of them.
    """

    def __init__(self, config: RunConfig, device: torch.device | str = "cpu", probs: Tensor | None = None) -> None:
        self.config, self.device = config, torch.device(device)
        torch.manual_seed(config.seed)
        np.random.seed(config.seed)
        self.encoder, self.synth, self.data = config.encoder().to(device), config.synth(), config.data()
        self.theta = self.data.theta.to(device) if isinstance(self.data, ThetaGrid) else None
        loss = config.make_loss(probs)
        self.loss = loss.to(device) if isinstance(loss, torch.nn.Module) else loss
        if self.theta is None:
            self.x = functional.pad(self.data.x.to(device), (config.common_delay, 0))
        else:
            self.x = in_chunks(self.synth, self.theta, self.data.seed)
        self.features = in_chunks(self.encoder.features, self.x)

    def estimate(self, items: Tensor) -> Tensor:
        """What the encoder, in evaluation mode, makes of the data set's `items`: theta (n, U)."""
        self.encoder.eval()
        return in_chunks(lambda part: self.encoder(self.features[part]), items)

    def theta_errors(self, theta_hat: Tensor, items: Tensor) -> dict[str, float]:
        """Mean absolute error of each parameter in per mille, by metric; theta_synth_l1 is the mean over parameters."""
        per_parameter = theta_l1(theta_hat, self.theta[items]).tolist()
        names = [f"theta_{parameter.name}_l1" for parameter in self.synth.parameters]
        return {"theta_synth_l1": sum(per_parameter) / len(names)} | dict(zip(names, per_parameter, strict=True))
