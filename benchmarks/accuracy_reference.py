"""Makes tests/reference/accuracy.npz: gradients by scrapl-loss 0.1.0 that tests/test_accuracy.py holds ours against.

    python benchmarks/accuracy_reference.py [--peers INTERPRETER]

The authors' package runs in an interpreter of its own (`make peers`). Two things are kept, both of the granular
configuration: the waveform gradient of every path on the white noise of tests/reference/granular.npz, as its norm and
64 random projections (a sketch, from which the norm of a difference is found within about 20 %); and on 12 granular
textures the gradient of five paths of each n2 in (density, slope), theirs in float32 and ours in float64. A loss's
waveform gradient, in its own precision, is taken through the synthesizer in float64, so that nothing but the loss's
rounding differs. (Theirs in float64 differs from ours by 2e-7 to 5e-5, nearly as much as in float32: no measure of
rounding.)
"""

import argparse
import functools
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scrapl_lib.synths import GranularSynth

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "tests/reference"
N_ITEMS = 12
# for each of the 21 n2 five of its 15 paths, other log-frequency wavelets from one n2 to the next
FIVE_OF_EACH_N2 = [15 * i + (7 * i + 3 * j) % 15 for i in range(21) for j in range(5)]


@functools.cache
def sketch() -> np.ndarray:
    """64 random directions (64, 32768), from NumPy's frozen legacy generator."""
    return np.random.RandomState(0).standard_normal((64, 32768))


@functools.cache
def textures() -> tuple[Tensor, Tensor, Tensor]:
    """theta_hat (12, 2) in float64, x_hat and x (12, 1, 32768) in float32: other parameters and other grains."""
    theta_hat, theta = torch.from_numpy(np.random.RandomState(1).uniform(0.1, 0.9, (2, N_ITEMS, 2)))
    seeds = torch.arange(N_ITEMS)
    return theta_hat, GranularSynth()(theta_hat, seeds + 100).float(), GranularSynth()(theta, seeds).float()


def through_the_synth(gradient: Tensor) -> Tensor:
    """Gradient of the loss in x_hat (12, 1, 32768) -> in theta_hat (12, 2), by the synthesizer in float64."""
    theta_hat = textures()[0].clone().requires_grad_()
    x_hat = GranularSynth()(theta_hat, torch.arange(N_ITEMS) + 100)
    return torch.autograd.grad(x_hat, theta_hat, gradient.double())[0]


@functools.cache
def scrapl() -> torch.nn.Module:
    """Our loss, in the paper's granular configuration."""
    from scrapl_lib.losses import SCRAPLLoss  # needs kymatio, which the other side has not

    return SCRAPLLoss()


def waveform_gradient(x_hat: Tensor, x: Tensor, path: int) -> Tensor:
    """Gradient of one path's loss in x_hat, by our loss."""
    x_hat = x_hat.clone().requires_grad_()
    return torch.autograd.grad(scrapl()(x_hat, x, path), x_hat)[0]


def texture_gradient(path: int, dtype: torch.dtype) -> np.ndarray:
    """Gradient of each texture's own loss, computed by ours in `dtype`, in (density, slope): (12, 2)."""
    parts = zip(*(audio.to(dtype).split(4) for audio in textures()[1:]))
    return 4 * through_the_synth(torch.cat([waveform_gradient(x_hat, x, path) for x_hat, x in parts])).numpy()


def peer(source: str, target: str) -> None:
    """The waveform gradients: sketch and norm of all paths on noise, the whole of `paths` on textures, item by item."""
    from scrapl import SCRAPLLoss

    logging.disable()
    torch.set_num_threads(2)
    loss = SCRAPLLoss(shape=32768, J=12, Q1=8, Q2=2, J_fr=3, Q_fr=2, grad_mult=1.0, use_p_adam=False, use_p_saga=False)
    given = {key: torch.from_numpy(value) for key, value in np.load(source).items()}

    def gradient(x_hat: Tensor, x: Tensor, path: int) -> Tensor:
        x_hat = x_hat[:, None].clone().requires_grad_()
        return torch.autograd.grad(loss(x_hat, x[:, None], path_idx=path), x_hat)[0][:, 0].double()

    found = {"sketch": [], "norm": [], "textures": []}
    for path in range(len(given["path_loss"])):
        g = gradient(given["noise_hat"], given["noise"], path)[0]
        found["sketch"].append(given["sketch"] @ g)
        found["norm"].append(g.norm())
        print(f"noise: path {path}", file=sys.stderr)
    for path in given["paths"].tolist():
        pairs = zip(given["x_hat"].split(1), given["x"].split(1))
        found["textures"].append(torch.cat([gradient(x_hat, x, path) for x_hat, x in pairs]))
        print(f"textures: path {path}", file=sys.stderr)
    np.savez(target, **{key: torch.stack(values).numpy() for key, values in found.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", default=str(ROOT / ".venv-peers/bin/python"), help="an interpreter with scrapl-loss")
    parser.add_argument("--side", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        return peer(*args.side)
    _, x_hat, x = textures()
    with np.load(REFERENCE / "granular.npz") as noise, tempfile.TemporaryDirectory() as folder:
        source, target = f"{folder}/given.npz", f"{folder}/found.npz"
        np.savez(
            source,
            noise_hat=noise["x_hat"],
            noise=noise["x"],
            path_loss=noise["path_loss"],
            sketch=sketch(),
            paths=FIVE_OF_EACH_N2,
            x_hat=x_hat[:, 0].numpy(),
            x=x[:, 0].numpy(),
        )
        subprocess.run(
            [args.peers, __file__, "--side", source, target],
            check=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            start_new_session=True,  # the authors' package asks the terminal for its width: not in the background
        )
        found = dict(np.load(target))
    theirs = [through_the_synth(torch.from_numpy(g)[:, None]).numpy() for g in found["textures"]]
    ours = [texture_gradient(path, torch.float64) for path in FIVE_OF_EACH_N2]
    np.savez_compressed(
        REFERENCE / "accuracy.npz",
        noise_grad_sketch=found["sketch"].astype(np.float32),
        noise_grad_norm=found["norm"],
        paths=np.array(FIVE_OF_EACH_N2),
        theta_grad_official_float32=np.stack(theirs),
        theta_grad_ours_float64=np.stack(ours),
    )


if __name__ == "__main__":
    main()
