"""Transforms other than the JTFS: images (twin: kymatio), one of the tests' own, and the JTFS in disguise."""

import pytest
import torch
from conftest import TINY, noise
from kymatio.torch import Scattering2D as Kymatio

from scrapl_lib import JTFS, PSAGA, PAdam, Scattering2D, ScatteringLoss, SCRAPLLoss, reference, theta_importance

IMAGES = dict(shape=(12, 20), J=2, L=2)  # 8 paths


class TimeScattering:
    """Energies in bands of an octave, over time: | x * psi_j |, averaged."""

    n_paths = 4
    groups = {"half": [(0, 1), (2, 3)]}

    def path(self, x, index):
        k = torch.fft.rfftfreq(x.shape[-1]).to(x) * 2 ** (index + 1.5)
        band = torch.fft.irfft(torch.fft.rfft(x) * torch.exp(-((k - 0.7) ** 2) * 8))
        return torch.nn.functional.avg_pool1d((band**2 + 1e-6).sqrt(), 16)

    def check(self, x):
        if x.ndim != 3 or x.shape[1:] != (1, 64):
            raise ValueError(f"x must be (batch, 1, 64), got {tuple(x.shape)}")


class Disguised:
    """The JTFS with nothing but what a transform must have: its paths one by one, derivatives backwards."""

    def __init__(self):
        self.own = JTFS(**TINY)
        self.n_paths, self.path, self.check = self.own.n_paths, self.own.path, self.own.check


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_every_path_of_images_is_kymatio_s(dtype, tolerance):
    """Path by path, and all at once; two channels, which kymatio takes as a batch."""
    ours, twin, x = Scattering2D((40, 56), 3, 4), Kymatio(3, (40, 56), 4, out_type="list"), noise(2, 2, 40, 56)
    found = {tuple(zip(c["j"], c["theta"])): c["coef"] for c in twin.to(dtype)(x.to(dtype)) if c["j"]}
    assert len(found) == ours.n_paths == 60
    together = ours(x.to(dtype))
    assert together.shape == (2, 60, 2, 5, 7) and together.dtype == dtype
    for i, path in enumerate(ours.paths):
        expected = found[(path[:2],) if path.j2 is None else (path[:2], path[2:])]
        limit = tolerance * expected.abs().max()
        assert limit > 0 and (ours.path(x.to(dtype), i) - expected).abs().max() <= limit
        assert (together[:, i] - expected).abs().max() <= limit


@pytest.mark.parametrize("index", [1, 6])
def test_images_are_twice_differentiable(index):
    """A path of each order, by finite differences (torch's tolerances)."""
    scattering, x = Scattering2D((5, 7), 2, 2), noise(1, 1, 5, 7).requires_grad_()
    assert scattering.paths[index].j2 == (None if index == 1 else 1)
    assert torch.autograd.gradcheck(lambda x: scattering.path(x, index), x)
    assert torch.autograd.gradgradcheck(lambda x: scattering.path(x, index), x)


@pytest.mark.parametrize("draw", ["scale", "wavelet"])
def test_groups_of_images_and_the_full_loss_are_means_over_paths(draw):
    x_hat, x, scattering = noise(2, 1, 12, 20).requires_grad_(), noise(2, 1, 12, 20, seed=1), Scattering2D(**IMAGES)
    path, group = SCRAPLLoss(transform=scattering), SCRAPLLoss(transform=scattering, draw=draw)
    paths = scattering.paths
    assert sorted(sum(group.draws, ())) == list(range(8)) and len(group.draws) == {"scale": 3, "wavelet": 4}[draw]
    for i, members in enumerate(group.draws):
        assert len({(paths[p].j1, paths[p].j2 if draw == "scale" else paths[p].l1) for p in members}) == 1
        expected = torch.stack([path(x_hat, x, path_idx=p) for p in members]).mean()
        assert expected > 0 and abs(group(x_hat, x, path_idx=i) - expected) < 1e-12 * expected
    full = ScatteringLoss(scattering)(x_hat, x)
    mean = torch.stack([path(x_hat, x, path_idx=p) for p in range(8)]).mean()
    ours, theirs = (torch.autograd.grad(value, x_hat)[0] for value in (full, mean))
    assert abs(full - mean) < 1e-12 * mean and (ours - theirs).abs().max() < 1e-12 * theirs.abs().max()


def stroke(theta):
    """(batch, 2) -> images (batch, 1, 12, 20): a wave of that frequency and slope."""
    rows, columns = torch.meshgrid(torch.arange(12.0), torch.arange(20.0), indexing="ij")
    frequency, slope = theta[:, 0, None, None], theta[:, 1, None, None]
    return torch.cos((1 + frequency) * (columns + slope * rows))[:, None]


def tone(theta):
    """(batch, 2) -> audio (batch, 1, 64): a tone of that frequency that swells by that much."""
    t = torch.arange(64) / 64
    return ((1 + theta[:, 1:] * t) * torch.cos(20 * (1 + theta[:, :1]) * t))[:, None]


@pytest.mark.parametrize(
    ("make", "synthesize", "draw"),
    [(TimeScattering, tone, "path"), (TimeScattering, tone, "half"), (lambda: Scattering2D(**IMAGES), stroke, "path")],
)
def test_theta_importance_of_any_transform_is_that_of_the_definition(make, synthesize, draw):
    """Against the dense matrices M of reference.py."""
    loss, theta = SCRAPLLoss(transform=make(), draw=draw, log1p=True), noise(2, 2).sigmoid()
    x = synthesize(theta)
    x, W = x + 0.1 * noise(*x.shape, seed=2), (0.1 * noise(8, 2, seed=1)).requires_grad_()

    def encode(x):
        return (x.flatten(1)[:, :8] @ W).sigmoid()

    found = theta_importance(loss, encode, synthesize, x, [W], n_iter=16, tol=1e-10)
    assert loss.path_idx is None and found.probs.shape == (loss.n_paths,)
    for p in range(loss.n_paths):
        for u in range(2):
            M = reference.dense_m(loss, encode, synthesize, x, [W], p, u)
            expected = reference.dense_curvature(M)
            assert expected > 0 and abs(found.curvature[u, p] - expected) < 1e-6 * expected


def test_a_transform_of_ones_own_computes_in_full_precision_under_autocast():
    class Products:
        n_paths, check = 2, staticmethod(lambda x: None)

        def path(self, x, index):
            return x @ noise(64, 8, seed=index, dtype=torch.float32)

    x_hat, x = noise(2, 1, 64, dtype=torch.float32), noise(2, 1, 64, seed=1, dtype=torch.float32)
    for loss in (ScatteringLoss(Products()), SCRAPLLoss(transform=Products(), draw=[[0, 1]])):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = loss(x_hat, x)
        assert found == loss(x_hat, x) > 0 and found.dtype == torch.float32


def test_the_jtfs_given_as_a_transform_is_the_same_loss_bit_for_bit():
    x_hat, x = noise(2, 1, 512, dtype=torch.float32), noise(2, 1, 512, seed=1, dtype=torch.float32)
    plain, given, disguised = (SCRAPLLoss(**TINY), *(SCRAPLLoss(transform=t) for t in (JTFS(**TINY), Disguised())))
    for _ in range(5):
        assert plain(x_hat, x) == given(x_hat, x) == disguised(x_hat, x) > 0
        assert plain.path_idx == given.path_idx == disguised.path_idx
    given.load_state_dict(plain.state_dict())
    with pytest.raises(ValueError, match="the state is of a loss with .*shape = 512 .here None.*"):
        disguised.load_state_dict(plain.state_dict())
    groups = [[0, 9, 20], [3]]
    values = [
        SCRAPLLoss(**options, draw=groups)(x_hat, x, path_idx=0) for options in (TINY, {"transform": Disguised()})
    ]
    assert abs(values[0] - values[1]) < 1e-6 * values[0]


@pytest.mark.parametrize("kind", [PAdam, PSAGA])
@pytest.mark.parametrize("draw", ["path", "half"])
def test_a_transform_of_ones_own_trains(kind, draw):
    """From one tone towards another; a state taken half-way goes on with the same draws."""
    theta = torch.zeros(1, 2, requires_grad=True)
    x = tone(torch.tensor([[0.1, 0.8]]))
    losses = [SCRAPLLoss(transform=TimeScattering(), draw=draw, unbiased=True, seed=3) for _ in range(2)]
    full, optimizer = ScatteringLoss(TimeScattering()), kind([theta], losses[0], lr=5e-3, weight_decay=0.0)
    before = full(tone(theta), x).item()
    for step in range(120):
        optimizer.zero_grad()
        losses[0](tone(theta), x).backward()
        optimizer.step()
        if step == 60:
            losses[1].load_state_dict(losses[0].state_dict())
        if step > 60:
            assert losses[1].draw() == losses[0].path_idx
    assert len(optimizer.state[theta]["table"]) == losses[0].n_paths == {"path": 4, "half": 2}[draw]
    assert full(tone(theta), x).item() < 0.5 * before


class Odd:
    """Of two paths, with attributes as given."""

    n_paths = 2

    def __init__(self, **attributes):
        vars(self).update({"path": lambda x, i: x, "check": lambda x: None} | attributes)

    @classmethod
    def loss(cls, path, draw):
        return SCRAPLLoss(transform=cls(path=path), draw=draw)(noise(2, 1, 64), noise(2, 1, 64, seed=1))


class SquaredOnce(torch.autograd.Function):
    """x squared, whose gradient has no derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2 * g * ctx.saved_tensors[0]


def test_theta_importance_refuses_a_path_without_second_derivative():
    W, x = (0.1 * noise(8, 2, seed=1)).requires_grad_(), tone(noise(2, 2).sigmoid())
    loss = SCRAPLLoss(transform=Odd(path=lambda x, i: SquaredOnce.apply(x)))
    with pytest.raises(ValueError, match="gradient of path 0 cannot be differentiated in x_hat: .*once_differentiable"):
        theta_importance(loss, lambda x: (x.flatten(1)[:, :8] @ W).sigmoid(), tone, x, [W])


GOOD = noise(2, 1, 12, 20)


@pytest.mark.parametrize(
    ("x_hat", "x", "error", "message"),
    [
        (GOOD[:, 0], GOOD[:, 0], ValueError, r"^x_hat must be .* of shape \(batch, channels, 12, 20\), got .*12, 20\)"),
        (GOOD, GOOD[..., 1:], ValueError, r"^x must be .* of shape \(batch, channels, 12, 20\)"),
        (GOOD, GOOD[:1], ValueError, "x_hat and x must have one shape"),
        (GOOD, GOOD.float(), TypeError, "x_hat and x must have one dtype"),
        (GOOD.int(), GOOD, ValueError, "^x_hat must be float32 or float64"),
        (GOOD.numpy(), GOOD, TypeError, "^x_hat must be float32 or float64.*got ndarray"),
        (GOOD / 0, GOOD, ValueError, "^x_hat must be finite, got .* look where the image is made"),
    ],
)
def test_wrong_images_are_refused(x_hat, x, error, message):
    for loss in (SCRAPLLoss(transform=Scattering2D(**IMAGES)), ScatteringLoss(Scattering2D(**IMAGES))):
        with pytest.raises(error, match=message):
            loss(x_hat, x)


def of_own(**options):
    return SCRAPLLoss(transform=TimeScattering(), **options)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Scattering2D(16, 2), TypeError, r"shape must be \(H, W\).*got 16"),
        (lambda: Scattering2D((16, 8), 3), ValueError, "J = 3 needs images of more than 2.3 pixels.*lower J"),
        (lambda: Scattering2D((16, 16), 2, L=0), ValueError, "L must be at least 1"),
        (lambda: Scattering2D(**IMAGES).path(GOOD, 8), IndexError, "path_idx = 8 is out of range: .* 0 .. 7"),
        (lambda: of_own(J=5), TypeError, "shape, J, ..., F describe a JTFS, and a tr"),
        (lambda: SCRAPLLoss(transform=torch.stft), TypeError, r"n_paths, path\(x, index\) and check\(x\).*got <"),
        (lambda: SCRAPLLoss(transform=TimeScattering), TypeError, "got <class .*, a class: make one"),
        (lambda: of_own(draw="rate"), ValueError, "unknown draw 'rate': .*path, half"),
        (lambda: of_own(draw=7), TypeError, "draw must be 'path', 'half' or a list of groups of path numbers"),
        (lambda: of_own(draw=[1, 2]), TypeError, "a list of groups of path numbers"),
        (lambda: of_own(draw=[["a"]]), TypeError, "a list of groups of path numbers"),
        (lambda: of_own(draw=[]), ValueError, "none of them empty"),
        (lambda: of_own(draw=[[1], []]), ValueError, "none of them empty"),
        (lambda: of_own(draw=[[1, 1]]), ValueError, "groups of different path numbers"),
        (lambda: of_own(draw=[[4]]), IndexError, "path number = 4 is out of range"),
        (lambda: SCRAPLLoss(transform=Odd(groups={"far": [(0, 99)]}), draw="far"), IndexError, "path number = 99 is"),
        (lambda: Odd.loss(lambda x, i: x.mean((0, 1)), "path"), ValueError, r"\(batch, ...\) of 2 items, got \(64,\)"),
        (lambda: Odd.loss(lambda x, i: x.numpy(), "path"), ValueError, "coefficients .* got ndarray"),
        (lambda: Odd.loss(lambda x, i: x[..., i:], [[0, 1]]), ValueError, r"one shape, got .* \(2, 1, 63\) of path 1"),
    ],
)
def test_wrong_transforms_and_draws_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
    assert SCRAPLLoss(transform=Odd(groups={"path": [(0, 1)]})).draws == ((0,), (1,))  # "path" is always a single one


class OtherImages(Scattering2D):
    """Measures something else."""


def test_a_state_of_another_transform_is_refused():
    images, others = (SCRAPLLoss(transform=kind(**IMAGES)) for kind in (Scattering2D, OtherImages))
    with pytest.raises(ValueError, match=r"of a loss with transform = OtherImages .here Scattering2D."):
        images.load_state_dict(others.state_dict())
    small, large = (SCRAPLLoss(transform=Scattering2D(shape, 2, 2)) for shape in ((12, 20), (12, 24)))
    with pytest.raises(ValueError, match=r"of a loss with shape = \[12, 24\] .here \[12, 20\]."):
        small.load_state_dict(large.state_dict())
