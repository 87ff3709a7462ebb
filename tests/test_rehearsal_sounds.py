"""Sounds and losses on a GPU, rehearsed without one: tensors that only say that they are on "cuda".

A tensor left on the CPU raises in an operation with them, and so does a look at a value, for which a host would wait.
"""

import functools

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.overrides import TorchFunctionMode

from replication.baselines import MSS_NAMES, EmbeddingLoss, MSSLoss
from replication.encoder import Encoder
from replication.measures import drum_features, log_mel_statistics
from scrapl_lib import JTFSLoss, SCRAPLLoss
from scrapl_lib.synths import ChirpletSynth, GranularSynth, SnareSynth

SIZES = dict(shape=512, J=5, Q1=2, Q2=1, J_fr=2, Q_fr=1)
SYNTHS = [GranularSynth(n_samples=2048, n_grains=4, grain_samples=256), ChirpletSynth((1, 2), (1, 2)), SnareSynth()]


class Indexing(TorchFunctionMode):
    """x[...], and x[...] = y, by operations of its parts: PyTorch's own asks for a CUDA library before it does."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.__setitem__:
            return self.__torch_function__(torch.Tensor.__getitem__, types, args[:2]).zero_().add_(args[2])
        if func is not torch.Tensor.__getitem__:
            return func(*args, **(kwargs or {}))
        x, index = args[0], args[1] if isinstance(args[1], tuple) else (args[1],)
        dim, n_taken = 0, sum(i is not None and i is not Ellipsis for i in index)
        for i in index:
            if i is Ellipsis:
                dim += args[0].ndim - n_taken
            elif i is None:
                x, dim = x.unsqueeze(dim), dim + 1
            elif isinstance(i, int):
                x = x.select(dim, i)
            else:
                x, dim = torch.ops.aten.slice(x, dim, i.start, i.stop, i.step or 1), dim + 1
        return x


@pytest.fixture
def on_cuda():
    """Makes random tensors of a shape on "cuda"; real tensors, such as windows, count as their like on the CPU."""
    with FakeTensorMode(allow_non_fake_inputs=True), Indexing():
        yield lambda *shape, dtype=torch.float32: torch.rand(*shape, device="cuda", dtype=dtype)


def test_the_rehearsal_notices_what_it_is_for(on_cuda):
    x = on_cuda(2, 3)
    assert x[..., None, 1:].shape == (2, 1, 2) and x[1, None, ::2].shape == (1, 2)
    with pytest.raises(DataDependentOutputException):
        bool(x.sum() > 0)
    with pytest.raises(RuntimeError, match="device"):
        x + torch.ones(3)


@pytest.mark.parametrize("synth", SYNTHS, ids=lambda synth: type(synth).__name__)
def test_synthesizers(synth, on_cuda):
    """Seeds lie on the CPU, as those of the data do, and draws are made there."""
    theta, seeds = on_cuda(3, synth.n_params), torch.arange(3)
    for audio in (synth(theta, seeds), synth.render(theta, *(draw.to("cuda:0") for draw in synth.draw(seeds)))):
        assert audio.device.type == "cuda" and audio.shape == (3, 1, synth.n_samples) and audio.dtype == torch.float32


def test_the_encoder(on_cuda):
    encoder = Encoder(n_samples=4096, octaves=3, hop=128, channels=3, pools=((2, 2), (3, 2)), dense=6)
    for module in encoder.modules():
        for held in (module._parameters, module._buffers):
            held.update({name: on_cuda(*value.shape) for name, value in held.items()})
    theta = encoder(encoder.features(on_cuda(2, 1, 4096, dtype=torch.float64)))
    assert theta.device.type == "cuda" and theta.shape == (2, 2)


@pytest.mark.parametrize("name", MSS_NAMES)
def test_losses(name, on_cuda):
    np.random.seed(0)
    for loss in (MSSLoss(name), EmbeddingLoss("ms_clap", 8192, torch.nn.Flatten())):
        value = loss(on_cuda(2, 1, 4096), on_cuda(2, 1, 4096))
        assert value.device.type == "cuda" and value.shape == ()


@pytest.mark.parametrize("make", [SCRAPLLoss, functools.partial(SCRAPLLoss, draw="rate"), JTFSLoss])
def test_scattering_losses(make, on_cuda):
    """The draw is made before: here a CPU has no values."""
    loss = make(**SIZES, log1p=True)
    path = {} if make is JTFSLoss else {"path_idx": 2}
    with torch.no_grad():
        value, S = loss(on_cuda(2, 1, 512), on_cuda(2, 1, 512), **path), loss.jtfs.path(on_cuda(2, 1, 512), 3)
    assert {(found.device.type, found.dtype) for found in (value, S)} == {("cuda", torch.float32)} and value.shape == ()


def test_features(on_cuda):
    found = drum_features(on_cuda(2, 1, 4096))
    assert len(found) == 6 and {value.device.type for value in found.values()} == {"cuda"}
    assert log_mel_statistics(on_cuda(2, 1, 4096), 44100).device.type == "cuda"
