"""Gradients against those of scrapl-loss 0.1.0, every path on noise, and in (density, slope) on granular textures.

tests/reference/README.md tells what accuracy.npz holds. Losses of every path: test_losses.py.
"""

import functools

import numpy as np
import torch
from accuracy_reference import FIVE_OF_EACH_N2, N_ITEMS, REFERENCE, scrapl, sketch, texture_gradient, waveform_gradient


@functools.cache
def reference(name):
    with np.load(REFERENCE / f"{name}.npz") as file:
        return dict(file)


def test_waveform_gradient_of_every_path_on_noise():
    """Relative L2 norm of the difference below 1e-4, estimated by 64 projections within about 20 %."""
    noise, official = reference("granular"), reference("accuracy")
    x_hat, x = (torch.from_numpy(noise[key])[:, None] for key in ("x_hat", "x"))
    assert official["noise_grad_sketch"].shape == (scrapl().n_paths, 64) and (official["noise_grad_norm"] > 0).all()
    for path, (projected, norm) in enumerate(zip(official["noise_grad_sketch"], official["noise_grad_norm"])):
        gradient = waveform_gradient(x_hat, x, path)[0, 0].double().numpy()
        assert np.linalg.norm(sketch() @ gradient - projected) / 8 < 1e-4 * norm, path
        assert abs(np.linalg.norm(gradient) / norm - 1) < 1e-4, path


def test_parameter_gradients_on_textures_are_as_accurate_as_the_official_ones():
    """Error of float32 against float64 in (density, slope), ours over theirs, of each of 12 textures on five paths of
    each n2: for no n2 is the geometric mean above 1 (found: 0.27 to 0.63, over all 0.45).

    A geometric mean over textures, because the largest errors are of a few whose |u| comes near 0, and those are a
    matter of luck on both sides: relative L2 norms over the textures have ratios of 0.29 to 1.09 (over all 0.53; with a
    first FFT in float32 0.91).
    """
    stored = reference("accuracy")
    official, truth = stored["theta_grad_official_float32"], stored["theta_grad_ours_float64"]
    drift = np.linalg.norm(texture_gradient(FIVE_OF_EACH_N2[-1], torch.float64) - truth[-1])
    assert drift < 1e-8 * np.linalg.norm(truth[-1])  # the truth that float32 is held against
    assert stored["paths"].tolist() == FIVE_OF_EACH_N2
    assert {scrapl().jtfs.paths[i].n2 for i in FIVE_OF_EACH_N2} == set(range(4, 25))
    ratios = []
    for path, theirs, true in zip(FIVE_OF_EACH_N2, official, truth, strict=True):
        ours, theirs = (np.linalg.norm(g - true, axis=1) for g in (texture_gradient(path, torch.float32), theirs))
        assert len(ours) == N_ITEMS and theirs.min() > 0
        ratios.append(np.log(ours / theirs))
    of_n2 = np.exp(np.reshape(ratios, (21, 5 * N_ITEMS)).mean(axis=1))
    assert of_n2.max() < 1, np.round(of_n2, 2)
