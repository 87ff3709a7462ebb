"""The CQT and CNN encoder against a NumPy twin, and its sizes against the paper's."""

import numpy as np
import pytest
import torch
from odd_surroundings import odd_surroundings
from scipy.signal import correlate

from replication.encoder import Encoder
from replication.tasks import make_config

TINY = dict(n_samples=4096, octaves=3, hop=128, channels=3, pools=((2, 2), (3, 2)), dense=6, dropout=0.25)


def tiny(seed=0):
    torch.manual_seed(seed)
    return Encoder(**TINY)


def rand(*shape, seed, dtype=torch.float32):
    return torch.rand(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def test_sizes_of_the_paper():
    granular, drums = (make_config(task, "jtfs", 0, "paper").encoder() for task in ("granular", "tr808_micro"))
    assert sum(p.numel() for p in granular.parameters()) == 604_106 and granular.feature_shape == (60, 129)
    assert sum(p.numel() for p in drums.parameters()) == 724_642 and drums.feature_shape == (108, 173)
    assert drums(torch.zeros(1, 1, 108, 173)).shape == (1, 14)


def test_features_equal_a_literal_constant_q_transform():
    """Each bin: the audio around the frame times a Hann-windowed exponential of unit L1 norm, times sqrt(length); 1e-3
    absolute on log values of about 5, as float32 sums thousands of products."""
    encoder = tiny()
    audio = torch.randn(1, 1, 4096, generator=torch.Generator().manual_seed(1))
    features = encoder.features(audio)[0, 0].numpy()
    assert features.shape == (36, 33) and features.mean() > 3

    q = 1 / (2 ** (1 / 12) - 1)
    padded = np.pad(audio[0, 0].double().numpy(), 2048, mode="reflect")
    for bin_, frame in ((0, 0), (0, 16), (13, 7), (35, 32)):
        f_hz = 0.4 * 8192 / 2**3 * 2 ** (bin_ / 12)
        length = int(np.ceil(q * 8192 / f_hz))
        window = np.sin(np.pi * np.arange(length) / length) ** 2
        start = 2048 + frame * 128 - (length + 1) // 2
        segment = padded[start : start + length]
        magnitude = abs(np.sum(segment * window * np.exp(-2j * np.pi * f_hz * np.arange(length) / 8192)))
        magnitude *= np.sqrt(length) / window.sum()
        assert abs(features[bin_, frame] - np.log(1 + magnitude / 1e-3)) < 1e-3


def prelu(x, weight):
    return np.where(x > 0, x, weight * x)


def literal_forward(encoder, features):
    """Encoder in eval mode on one item (bins, frames), float64, loop by loop from section 5 of the paper."""
    weights = {name: w.detach().double().numpy() for name, w in encoder.state_dict().items()}
    x = features[None]
    for i, (p, q) in enumerate(TINY["pools"]):
        x = np.stack([(c - c.mean()) / np.sqrt(c.var() + 1e-5) for c in x])
        kernel, bias = weights[f"convolutions.{i}.weight"], weights[f"convolutions.{i}.bias"]
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
        x = np.stack([correlate(padded, k, mode="valid", method="direct")[0] for k in kernel]) + bias[:, None, None]
        rows, columns = x.shape[1] // p, x.shape[2] // q
        x = x[:, : rows * p, : columns * q].reshape(-1, rows, p, columns, q).max((2, 4))
        x = prelu(x, weights[f"activations.{i}.weight"])
    hidden = prelu(weights["dense.0.weight"] @ x.mean((1, 2)) + weights["dense.0.bias"], weights["dense.1.weight"])
    theta = []
    for u in range(encoder.n_params):
        y = weights[f"heads.{u}.0.weight"] @ hidden + weights[f"heads.{u}.0.bias"]
        y = weights[f"heads.{u}.3.weight"] @ prelu(y, weights[f"heads.{u}.1.weight"]) + weights[f"heads.{u}.3.bias"]
        theta.append(1 / (1 + np.exp(-y[0])))
    return np.array(theta)


def test_forward_equals_a_literal_twin():
    """Float64, 1e-10; weights scaled up so that theta leaves the middle."""
    encoder = tiny().double().eval()
    with torch.no_grad():
        for i, w in enumerate(encoder.parameters()):
            w.mul_(3).add_(0.1 * (-1) ** i)
    features = rand(3, 1, 36, 33, dtype=torch.float64, seed=2)
    theta = encoder(features)
    assert theta.shape == (3, 2) and (theta - 0.5).abs().max() > 0.05
    for i in range(3):
        assert np.abs(theta[i].detach().numpy() - literal_forward(encoder, features[i, 0].numpy())).max() < 1e-10


def test_every_weight_learns_but_no_kernel_does():
    encoder = tiny()
    features = encoder.features(torch.randn(2, 1, 4096, requires_grad=True, generator=torch.Generator().manual_seed(3)))
    assert not features.requires_grad
    encoder.eval()(features).sum().backward()
    assert all(w.grad is not None and w.grad.abs().max() > 0 for w in encoder.parameters())
    assert not any(buffer.requires_grad for buffer in encoder.buffers())
    assert encoder.state_dict().keys() == dict(encoder.named_parameters()).keys()


def test_seed_makes_the_weights_and_dropout_acts_in_training_only():
    a, b, c = tiny(1), tiny(1), tiny(2)
    features = rand(2, 1, 36, 33, seed=5)
    assert (a(features) - a(features)).abs().max() > 1e-4
    one, same, other = (encoder.eval()(features) for encoder in (a, b, c))
    assert torch.equal(one, same) and torch.equal(one, a(features)) and not torch.equal(one, other)


def test_surroundings_change_no_bit():
    """Neither weights nor features; autocast still serves the CNN, whose theta keeps the features' dtype."""
    encoder, audio = tiny().eval(), rand(2, 1, 4096, seed=6)
    features = encoder.features(audio)
    theta = encoder(features)
    with odd_surroundings():
        other = tiny().eval()
        assert all(map(torch.equal, encoder.parameters(), other.parameters()))
        found = other.features(audio)
        assert found.dtype == torch.float32 and torch.equal(found, features)
        with torch.autocast("cpu", enabled=False):
            assert torch.equal(other(found), theta)
        assert other(found).dtype == torch.float32 and 0 < (other(found) - theta).abs().max() < 0.02


def test_features_come_in_the_encoder_s_dtype():
    """Converted from the audio's: 1e-4 of log values of about 3, float32's."""
    audio, encoder = rand(1, 1, 4096, seed=7, dtype=torch.float64), tiny()
    single, double = encoder.features(audio), encoder.double().features(audio.float())
    assert single.dtype == torch.float32 and double.dtype == torch.float64 and single.mean() > 2
    assert (single - double).abs().max() < 1e-4


def test_bad_input_is_refused():
    encoder = tiny()
    with pytest.raises(ValueError, match="audio must have 4096 samples, got 4000"):
        encoder.features(torch.zeros(1, 1, 4000))
    with pytest.raises(ValueError, match=r"features of shape \(batch, 1, 36, 33\), got \(1, 1, 4096\)"):
        encoder(torch.zeros(1, 1, 4096))
    with pytest.raises(TypeError, match="weights' dtype torch.float32, got torch.float64: take encoder.features"):
        encoder(torch.zeros(1, 1, 36, 33, dtype=torch.float64))
    with pytest.raises(ValueError, match="leave nothing of 36 bins x 33 frames"):
        Encoder(**{**TINY, "pools": ((2, 2),) * 6})
    with pytest.raises(ValueError, match="use fewer octaves or longer audio"):
        Encoder(n_samples=1024, hop=8)
