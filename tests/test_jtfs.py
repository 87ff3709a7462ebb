"""The transform against official values, against its definition as a loop, and by its own properties.

Losses, derivatives and official distances: test_losses.py. Illegal configurations: test_properties.py.
"""

import contextlib
import copy
import functools
import io
import pathlib
import pickle

import numpy as np
import pytest
import torch
from conftest import TINY, noise, relative_error
from odd_surroundings import odd_surroundings

from scrapl_lib import JTFS, _fast
from scrapl_lib import jtfs as jtfs_module
from scrapl_lib.jets import Jets
from scrapl_lib.reference import path_by_definition

OFFICIAL = {  # configuration, number of paths; values computed with scrapl-loss 0.1.0
    "small": (dict(shape=4096, J=8, Q1=4, Q2=1, J_fr=2, Q_fr=1), 42),
    "granular": (dict(shape=32768, J=12, Q1=8, Q2=2, J_fr=3, Q_fr=2), 315),
    "tr808": (dict(shape=44100, J=12, Q1=8, Q2=2, J_fr=5, Q_fr=2, T=2048, F=1), 483),
}


# ---- official values ------------------------------------------------------------------------------------------------


@functools.cache
def official_and_ours(name):
    with np.load(pathlib.Path(__file__).parent / "reference" / f"{name}.npz") as file:
        return dict(file), JTFS(**OFFICIAL[name][0])


@pytest.mark.parametrize("name", OFFICIAL)
def test_path_table_is_the_official_one(name):
    (config, n_paths), (official, jtfs) = OFFICIAL[name], official_and_ours(name)
    assert jtfs.n_paths == len(jtfs.paths) == len(official["keys"]) == n_paths
    assert [(p.n2, p.n_fr) for p in jtfs.paths] == [tuple(key) for key in official["keys"]]
    assert [p.index for p in jtfs.paths] == list(range(n_paths))
    rate, scale = official["rate_cycles_per_sample"], official["scale_cycles_per_filter"]
    assert np.abs(np.array([p.rate for p in jtfs.paths]) - rate).max() <= 1e-12
    assert np.abs(np.array([p.scale for p in jtfs.paths]) - np.abs(scale) * config["Q1"]).max() <= 1e-12
    assert [p.spin for p in jtfs.paths] == list(np.sign(scale))


@pytest.mark.parametrize("name", OFFICIAL)
def test_coefficients_are_the_official_ones(name):
    """In float32, to 1e-5 of the peak: two orders above what two float32 implementations differ by."""
    official, jtfs = official_and_ours(name)
    x = torch.from_numpy(official["x_hat"])[:, None]
    indices = [int(key[5:]) for key in official if key.startswith("coef_")]
    assert len(indices) >= 2
    for index in indices:
        assert relative_error(jtfs.path(x, index), official[f"coef_{index}"]) < 1e-5


# ---- the definition -------------------------------------------------------------------------------------------------

TINY_CONFIGS = {
    "plain": TINY,
    "T < 2^J": dict(TINY, T=8),
    "T = 1": dict(TINY, shape=100, T=1),
    "T no power of two": dict(TINY, T=23),
    "T > 2^J, no power of two": dict(TINY, T=100),
    "T global": dict(TINY, T="global"),
    "F = 1": dict(TINY, F=1),
    "F no power of two": dict(TINY, F=3),
    "F > 2^J_fr": dict(TINY, F=9),
    "F global": dict(TINY, F="global"),
    "both global": dict(TINY, T="global", F="global"),
    "odd shape": dict(TINY, shape=397, T=20, F=1),
    "several per octave": dict(TINY, shape=300, J=6, Q1=5, Q2=2, J_fr=3, Q_fr=2, T=33, F=2),
}


@pytest.mark.parametrize("case", TINY_CONFIGS)
def test_every_path_is_the_one_of_the_definition_and_its_slice_of_the_full_transform(case):
    """To 1e-9 of its peak, in float64 (found: 2e-11); the slice to 1e-12, the same numbers summed in another order.

    What makes it more than rounding: rows of the log-frequency axis below 1e-10 of the peak are left out, and what lies
    beyond the new Nyquist frequency is dropped where the definition folds it back.
    """
    config = TINY_CONFIGS[case]
    jtfs, x = JTFS(**config), noise(2, 1, config["shape"], seed=1)
    by_definition = functools.partial(path_by_definition, x[1, 0].numpy(), **dict(list(config.items())[1:]))
    first, S = jtfs.first_order_and_bands(x)[0], jtfs(x)
    assert len(first) == jtfs.first_order_paths and jtfs.n_paths >= 7
    assert S.dtype == torch.float64 and S.shape[:2] == (2, jtfs.first_order_paths + jtfs.n_paths)
    for n_fr, found in enumerate(first):
        assert relative_error(found[1], by_definition(None, n_fr)) < 1e-9
        assert relative_error(S[:, n_fr], jtfs.unpad(found)) < 1e-12
    for path in jtfs.paths:
        found = jtfs.path(x, path.index)
        assert relative_error(found[1], by_definition(path.n2, path.n_fr)) < 1e-9
        assert relative_error(jtfs.unpad(found), S[:, jtfs.first_order_paths + path.index]) < 1e-12


# ---- two ways to compute, one number --------------------------------------------------------------------------------


@pytest.fixture
def both_ways(monkeypatch):
    """Coefficients and gradient before and after `change(monkeypatch)`, compared to 1e-12 and 1e-10."""

    def compare(change, T=200):
        jtfs, x = JTFS(**dict(TINY, T=T)), noise(2, 1, 512, seed=5).requires_grad_()
        results = []
        for setting in (lambda _: None, change):
            setting(monkeypatch)
            S = jtfs(x)
            results += [S, *torch.autograd.grad((S * noise(*S.shape, seed=6)).sum(), x)]
        assert relative_error(results[2], results[0]) < 1e-12 and relative_error(results[3], results[1]) < 1e-10

    return compare


@pytest.mark.parametrize("T", [None, 8, 23, "global"])
def test_matrix_and_fft_averages_agree(both_ways, T):
    both_ways(lambda patch: patch.setattr(jtfs_module, "MATRIX_LIMIT", 0), T)


def test_the_backward_pass_is_the_plain_formula(both_ways):
    def plain(patch):
        patch.setattr(jtfs_module, "averaged_modulus", lambda Y, psi, phi: (psi @ Y).abs() @ phi)
        patch.setattr(jtfs_module, "modulus", torch.abs)

    both_ways(plain)


@pytest.mark.parametrize("chunk", [1, 10**9])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_neither_chunks_nor_lanes_nor_threads_matter(both_ways, chunk, threads):
    """A lane for each thread (a power of two); pieces of 64 samples, or one. (All at once: test_rehearsal_gpu.py.)"""
    before = torch.get_num_threads()

    def change(patch):
        patch.setattr(_fast, "CHUNK", chunk)
        torch.set_num_threads(threads)
        Y = torch.zeros(2, 5, 512, dtype=torch.complex128)
        lanes = _fast._Lanes(Y, Y[0, :, :5], Y[0, 0, :, None].real)
        assert lanes.n == lanes.at_once == min(threads, 2)
        assert len(lanes.times) == (512 // lanes.n // 64 if chunk == 1 else 1)

    try:
        both_ways(change)
    finally:
        torch.set_num_threads(before)


def test_modulus_has_the_closed_forms_gradient_and_none_at_zero():
    """g z / |z|, 0 at 0 and where |z| underflows; the second derivative is at most about g there."""
    z = torch.tensor([3 + 4j, -1e-3j, 0, 1e-25 + 1e-25j, -2], dtype=torch.complex64, requires_grad=True)
    g = torch.tensor([2.0, -1, 1e8, 1, 0.5])
    expected = torch.tensor([1.2 + 1.6j, 1j, 0, 0, -0.5], dtype=torch.complex64)
    for create_graph in (False, True):
        r = _fast.modulus(z)
        (grad,) = torch.autograd.grad(r, z, g, create_graph=create_graph)
        assert (r.detach() - torch.tensor([5, 1e-3, 0, 0, 2])).abs().max() < 1e-6
        assert (grad.detach() - expected).abs().max() < 1e-5 and grad[2] == 0
    (second,) = torch.autograd.grad(torch.view_as_real(grad).sum(), z)
    assert second.abs().max() < 2 * g.max() and second[0] != 0


def everything(T=None, x=None):
    """Coefficients and gradients of whatever is public, in float32; the transform is built anew."""
    jtfs, jets = JTFS(**dict(TINY, T=T)), Jets(2)
    x = noise(2, 1, 512, dtype=torch.float32) if x is None else x
    found = []
    for y in (jtfs(x.requires_grad_()), jtfs.path(x, 3), *jtfs.first_order_and_bands(x)[0]):
        found += [y, *torch.autograd.grad(y.square().sum(), x, retain_graph=True)]
    (_, S), *_ = jtfs.path_jets(torch.cat([x.detach()] * jets.K, dim=1), jets, [3, 7])
    return [*found, S, *jets.distance(S)]


@contextlib.contextmanager
def deterministic():
    """New memory is filled with NaN, too."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("T", [None, 8, 500, "global"])
@pytest.mark.parametrize("surroundings", [odd_surroundings, deterministic])
def test_surroundings_do_not_move_a_bit(surroundings, T):
    """Values and gradients, forward and backward, under the setting; T = 500 of 512 samples makes kymatio warn."""
    expected, x = everything(T), noise(2, 1, 512, dtype=torch.float32)
    with surroundings():
        found = everything(T, x)
    assert len(found) > 8 and all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(found, expected))


def test_filters_made_in_inference_mode_serve_training_and_copies_make_their_own():
    expected = everything()[:4]
    with torch.inference_mode():
        jtfs = JTFS(**TINY)
        jtfs(noise(2, 1, 512, dtype=torch.float32)), jtfs.path(noise(2, 1, 512, dtype=torch.float32), 3)
    file = io.BytesIO()
    torch.save(jtfs, file)
    file.seek(0)
    for copied in (jtfs, copy.deepcopy(jtfs), pickle.loads(pickle.dumps(jtfs)), torch.load(file, weights_only=False)):
        x = noise(2, 1, 512, dtype=torch.float32).requires_grad_()
        for i, y in enumerate((copied(x), copied.path(x, 3))):
            assert torch.equal(y, expected[2 * i])
            assert torch.equal(*torch.autograd.grad(y.square().sum(), x), expected[2 * i + 1])
    assert len(file.getvalue()) < 100_000  # no filters


def test_configurations_without_room_say_what_is_wrong():
    for change, said in (
        (dict(J=1), "J = 1, Q1 = 2, Q2 = 1 leave no second-order path; raise J"),
        (dict(J=6, Q1=3, J_fr=4, F=1), "17 first-order wavelets do not fit 16 bins; raise F or lower J_fr"),
    ):
        with pytest.raises(ValueError, match=said):
            JTFS(**TINY | change)
