"""P-Adam and P-SAGA against a literal twin of the paper's equations, and their behaviour as torch optimizers."""

import copy
import io
import pickle
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from scrapl_lib.optim import PSAGA, PAdam

BOTH = pytest.mark.parametrize("cls", [PAdam, PSAGA])
SHAPES = [(4, 3), (5,), ()]
OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


class Twin:
    """Algorithm 1 for one weight array: float64, dictionaries with one entry per path, sums taken afresh every step."""

    def __init__(self, w, n_paths, saga, lr, betas, eps, weight_decay):
        self.w, self.n_paths, self.saga = np.asarray(w).astype(np.float64), n_paths, saga
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.k, self.tau, self.m, self.v, self.ghat, self.gamma = 0, {}, {}, {}, {}, set()

    def step(self, p, g):
        (b1, b2), n_paths, zero = self.betas, self.n_paths, np.zeros_like(self.w)
        g = np.asarray(g, dtype=np.float64)
        self.k += 1
        k, a = self.k, (self.k - self.tau.get(p, 0)) / n_paths
        self.m[p] = b1**a * self.m.get(p, zero) + (1 - b1**a) * g
        self.v[p] = b2**a * self.v.get(p, zero) + (1 - b2**a) * g * g
        g_cur = (self.m[p] / (1 - b1 ** (k / n_paths))) / (self.eps + np.sqrt(self.v[p] / (1 - b2 ** (k / n_paths))))
        self.tau[p] = k
        update = g_cur
        if self.saga:
            mean = sum((self.ghat[q] for q in self.gamma), zero) / max(1, len(self.gamma))
            update = g_cur - self.ghat.get(p, zero) + mean
            self.ghat[p] = g_cur
            self.gamma.add(p)
        self.w = self.w - self.lr * update - self.lr * self.weight_decay * self.w


def make(cls, n_paths, dtype=torch.float64, shapes=SHAPES, **options):
    """Weights of the given shapes, a stand-in for the loss, and the optimizer."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]
    paths = SimpleNamespace(n_paths=n_paths, path_idx=None)
    return weights, paths, cls(weights, paths, **(OPTIONS | options))


def draws(n_steps, n_paths):
    """(step, path, generator of that step's gradients) for n_steps uniform draws of a path."""
    rng = np.random.default_rng(1)
    for k in range(n_steps):
        yield k, int(rng.integers(n_paths)), torch.Generator().manual_seed(k)


def advance(weights, paths, optimizer, n_steps, start=0):
    """Steps number start to n_steps of one stream of draws and gradients (a path's gradients share a mean)."""
    for k, path, generator in draws(n_steps, paths.n_paths):
        if k >= start:
            paths.path_idx = path
            for w in weights:
                w.grad = torch.randn(w.shape, generator=generator, dtype=w.dtype) + (path % 3 - 1)
            optimizer.step()


def gap(a, b):
    a, b = (np.asarray(x.detach() if isinstance(x, torch.Tensor) else x, dtype=np.float64) for x in (a, b))
    assert a.shape == b.shape and a.size > 0
    return np.abs(a - b).max()


@BOTH
@pytest.mark.parametrize(
    "dtype, tolerance",
    # weights of order 1 to 4: float32 rounds them by up to 1e-7 a few times in each of 400 steps (measured: 5e-6)
    [(torch.float64, 1e-12), (torch.float32, 2e-5)],
)
@pytest.mark.parametrize("n_paths", [1, 7, 40])
def test_equals_the_literal_twin_at_every_step(cls, dtype, tolerance, n_paths):
    weights, paths, optimizer = make(cls, n_paths, dtype)
    twins = [Twin(w.detach(), n_paths, cls is PSAGA, **OPTIONS) for w in weights]
    for _, path, generator in draws(400, n_paths):
        paths.path_idx = path
        for w, twin in zip(weights, twins, strict=True):
            w.grad = torch.randn(w.shape, generator=generator, dtype=dtype) + (path % 3 - 1)
            twin.step(path, w.grad)
        optimizer.step()
        for w, twin in zip(weights, twins, strict=True):
            state = optimizer.state[w]
            assert state["k"] == twin.k and state["tau"] == twin.tau and w.dtype == dtype
            assert gap(w, twin.w) < tolerance
            expected = [twin.m, twin.v, twin.ghat] if cls is PSAGA else [twin.m, twin.v]
            for row, by_path in zip(state["table"][path], expected, strict=True):
                assert gap(row, by_path[path]) < tolerance


@BOTH
def test_the_first_draw_of_each_path_gives_the_sign_of_its_gradient(cls):
    """w = 0, no decay, lr 1: P-Adam moves by g / (|g| + eps) however late the path comes; P-SAGA's table holds it."""
    weights, paths, optimizer = make(cls, 50, shapes=[(6,)], lr=1.0, weight_decay=0.0)
    for path in range(50):
        before = weights[0].detach().clone()
        paths.path_idx = path
        g = weights[0].grad = torch.randn(6, generator=torch.Generator().manual_seed(path), dtype=torch.float64)
        optimizer.step()
        move = optimizer.state[weights[0]]["table"][path][2] if cls is PSAGA else before - weights[0]
        assert gap(move, g / (g.abs() + 1e-8)) < 1e-12


@BOTH
def test_with_one_path_it_is_adamw(cls):
    """P = 1: a = 1 and k/P = k, and P-SAGA's correction cancels."""
    weights, paths, optimizer = make(cls, 1)
    others, _, _ = make(cls, 1)
    adamw = torch.optim.AdamW(others, **OPTIONS)
    advance(weights, paths, optimizer, 300)
    advance(others, SimpleNamespace(n_paths=1), adamw, 300)
    assert max(gap(a, b) for a, b in zip(weights, others, strict=True)) < 1e-12
    assert gap(weights[0], make(cls, 1)[0][0]) > 0.1


@BOTH
def test_gradients_are_left_as_they_are(cls):
    weights, paths, optimizer = make(cls, 3, torch.float32)
    advance(weights, paths, optimizer, 10)
    before = [w.grad.clone() for w in weights]
    same = [w.grad for w in weights]
    optimizer.step()
    for w, value, tensor in zip(weights, before, same, strict=True):
        assert w.grad is tensor and torch.equal(w.grad, value)


@BOTH
def test_a_path_never_drawn_owns_no_state(cls):
    weights, paths, optimizer = make(cls, 1000)
    assert len(optimizer.state) == 0
    for paths.path_idx in (7, 3, 7):
        for w in weights:
            w.grad = torch.ones_like(w)
        optimizer.step()
    n_rows = 3 if cls is PSAGA else 2
    for w in weights:
        state = optimizer.state[w]
        assert set(state["tau"]) == set(state["table"]) == {3, 7}
        tensors = [row for rows in state["table"].values() for row in rows]
        assert sum(row.numel() for row in tensors) == 2 * n_rows * w.numel()
        assert set(state) == {"k", "tau", "table"} | ({"ghat_sum"} if cls is PSAGA else set())


def test_the_kept_sum_stays_at_the_exact_sum():
    """6000 float32 steps, updates near 1 in size: the kept mean is within 1e-5 of the mean taken in float64."""
    weights, paths, optimizer = make(PSAGA, 30, torch.float32, shapes=[(200,)])
    checked = 0
    for start in range(0, 6000, 479):  # just before the sum is taken afresh, every 480 steps
        advance(weights, paths, optimizer, start + 479, start)
        state = optimizer.state[weights[0]]
        exact = sum(rows[2].double() for rows in state["table"].values())
        assert gap(state["ghat_sum"] / len(state["tau"]), exact / len(state["tau"])) < 1e-5
        checked += float(exact.abs().max()) > 1
    assert checked > 5


def test_the_kept_sum_is_taken_afresh_every_16_draws_per_path():
    weights, paths, optimizer = make(PSAGA, 5, shapes=[(4,)])
    advance(weights, paths, optimizer, 79)
    state = optimizer.state[weights[0]]
    state["ghat_sum"] += 1
    exact = sum(rows[2] for rows in state["table"].values())
    assert gap(state["ghat_sum"], exact) > 0.9
    advance(weights, paths, optimizer, 80, 79)
    exact = sum(rows[2] for rows in state["table"].values())
    assert gap(state["ghat_sum"], exact) < 1e-12


def test_weights_that_saw_different_paths_take_their_sums_afresh_apart():
    """Two weights of one k and one |Gamma|, one of which never saw path 1 and the other never path 0."""
    weights, paths, optimizer = make(PSAGA, 4, shapes=[(3,), (3,)])
    for k in range(65):  # each takes part in 64 = 16 * 4 steps, the last one together
        paths.path_idx = k if k < 2 else 2 + k % 2
        for i, w in enumerate(weights):
            w.grad = None if k < 2 and k != i else torch.full_like(w, 1.0 + i + k)
        optimizer.step()
    for i, w in enumerate(weights):
        state = optimizer.state[w]
        assert state["k"] == 64 and set(state["tau"]) == {i, 2, 3}
        assert gap(state["ghat_sum"], sum(rows[2] for rows in state["table"].values())) < 1e-12


@BOTH
def test_groups_have_options_of_their_own_and_may_join_later(cls):
    """Each weight tensor follows its twin over the steps it takes part in, with its group's options."""
    paths = SimpleNamespace(n_paths=6, path_idx=None)
    weights = [torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    options = [
        OPTIONS,
        OPTIONS | {"lr": 3e-2, "betas": (0.5, 0.9)},
        OPTIONS | {"lr": 1e-3, "weight_decay": 0.5, "eps": 0.1},
    ]
    optimizer = cls([{"params": [weights[0]]} | options[0], {"params": [weights[1]]} | options[1]], paths)
    twins = [Twin(w.detach(), 6, cls is PSAGA, **o) for w, o in zip(weights, options, strict=True)]
    for k, path, generator in draws(200, 6):
        if k == 50:
            optimizer.add_param_group({"params": [weights[2]]} | options[2])
        paths.path_idx = path
        for w, twin in list(zip(weights, twins, strict=True))[: 2 + (k >= 50)]:
            w.grad = torch.randn(3, generator=generator, dtype=torch.float64)
            twin.step(path, w.grad)
        optimizer.step()
    assert max(gap(w, twin.w) for w, twin in zip(weights, twins, strict=True)) < 1e-12


@BOTH
def test_weights_without_gradient_are_skipped_whole(cls):
    """Weights in one group that miss different steps each follow a twin that saw only the others."""
    weights, paths, optimizer = make(cls, 4, shapes=[(3,), (3,), (2,)])
    frozen = weights[2].detach().clone()
    weights[2].requires_grad_(False)
    twins = [Twin(w.detach(), 4, cls is PSAGA, **OPTIONS) for w in weights[:2]]
    for k, path, generator in draws(200, 4):  # at 128 = 2 * 64 the sums of both are taken afresh, at different steps
        paths.path_idx = path
        for i, (w, twin) in enumerate(zip(weights, twins, strict=False)):
            w.grad = None
            if (k + i) % 3 and not (i and path == 2):
                w.grad = torch.randn(3, generator=generator, dtype=torch.float64)
                twin.step(path, w.grad)
        optimizer.step()
    assert max(gap(w, twin.w) for w, twin in zip(weights, twins, strict=False)) < 1e-12
    assert torch.equal(weights[2], frozen) and weights[2] not in optimizer.state


@BOTH
def test_memory_layout_of_weights_and_gradients_does_not_matter(cls):
    """A channels-last weight, with gradients of either layout, moves like a contiguous one."""
    plain, paths, optimizer = make(cls, 3, shapes=[(4, 3, 5, 2)])
    last = [plain[0].detach().clone(memory_format=torch.channels_last).requires_grad_()]
    other = cls(last, paths, **OPTIONS)
    assert last[0].stride() != plain[0].stride()
    for k, paths.path_idx, generator in draws(30, 3):
        g = torch.randn(plain[0].shape, generator=generator, dtype=torch.float64)
        plain[0].grad, last[0].grad = g, g.clone(memory_format=torch.channels_last) if k % 2 else g.clone()
        optimizer.step()
        other.step()
    assert gap(plain[0], last[0]) == 0


@BOTH
def test_weights_of_different_dtypes_share_an_optimizer(cls):
    weights, paths, _ = make(cls, 3)
    weights = [weights[0], weights[1].detach().float().requires_grad_()]
    optimizer = cls(weights, paths, **OPTIONS)
    twins = [Twin(w.detach(), 3, cls is PSAGA, **OPTIONS) for w in weights]
    for _, path, generator in draws(50, 3):
        paths.path_idx = path
        for w, twin in zip(weights, twins, strict=True):
            w.grad = torch.randn(w.shape, generator=generator, dtype=w.dtype)
            twin.step(path, w.grad)
        optimizer.step()
    assert gap(weights[0], twins[0].w) < 1e-12 and gap(weights[1], twins[1].w) < 1e-5


def through_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("carry", [through_file, copy.deepcopy], ids=["file", "deepcopy"])
def test_resumes_bit_for_bit(cls, dtype, carry):
    """Stopped after 90 of 200 steps, with some of 60 paths not drawn yet."""
    weights, paths, optimizer = make(cls, 60, dtype)
    advance(weights, paths, optimizer, 90)
    saved = carry(optimizer.state_dict())
    resumed = [w.detach().clone().requires_grad_() for w in weights]
    advance(weights, paths, optimizer, 200, 90)

    paths = SimpleNamespace(n_paths=60, path_idx=None)
    other = cls(resumed, paths, lr=123.0)
    other.load_state_dict(saved)
    assert 20 < len(other.state[resumed[0]]["tau"]) < 60
    advance(resumed, paths, other, 200, 90)
    for a, b in zip(weights, resumed, strict=True):
        assert torch.equal(a, b)
        ours, theirs = optimizer.state[a], other.state[b]
        assert ours["k"] == theirs["k"] == 200 and ours["tau"] == theirs["tau"] and len(ours["table"]) > 20
        for path, rows in ours["table"].items():
            for row, twin in zip(rows, theirs["table"][path], strict=True):
                assert row.dtype == twin.dtype == dtype and torch.equal(row, twin)
        if cls is PSAGA:
            assert torch.equal(ours["ghat_sum"], theirs["ghat_sum"])


@BOTH
def test_a_loaded_state_is_a_copy(cls):
    """Two optimizers loaded from one live state do not write into each other's tables."""
    weights, paths, optimizer = make(cls, 3)
    advance(weights, paths, optimizer, 20)
    clones = [w.detach().clone().requires_grad_() for w in weights]
    other = cls(clones, paths, **OPTIONS)
    other.load_state_dict(optimizer.state_dict())
    before = copy.deepcopy(optimizer.state_dict()["state"])
    advance(clones, paths, other, 30, 20)
    after = optimizer.state_dict()["state"]
    assert len(before) == len(SHAPES)
    for i, state in before.items():
        assert state["tau"] == after[i]["tau"] and len(state["table"]) == 3
        for path, rows in state["table"].items():
            assert all(torch.equal(a, b) for a, b in zip(rows, after[i]["table"][path], strict=True))


def test_a_deep_copied_or_pickled_optimizer_still_knows_its_paths():
    weights, paths, optimizer = make(PSAGA, 3)
    advance(weights, paths, optimizer, 5)
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        twin = other.param_groups[0]["params"]
        advance(twin, other.paths, other, 10, 5)
        assert other.state[twin[0]]["k"] == 10
    assert optimizer.state[weights[0]]["k"] == 5


@BOTH
def test_schedulers_set_the_learning_rate(cls):
    weights, paths, optimizer = make(cls, 5, shapes=[(4,)])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 / (1 + k))
    twin = Twin(weights[0].detach(), 5, cls is PSAGA, **OPTIONS)
    for k, path, generator in draws(60, 5):
        paths.path_idx = path
        weights[0].grad = torch.randn(4, generator=generator, dtype=torch.float64)
        twin.lr = OPTIONS["lr"] / (1 + k)
        twin.step(path, weights[0].grad)
        optimizer.step()
        scheduler.step()
    assert gap(weights[0], twin.w) < 1e-12


@BOTH
def test_a_closure_draws_the_path_of_its_own_step(cls):
    """The closure runs with gradients enabled, before path_idx is read; its value is returned."""
    weights, paths, optimizer = make(cls, 5, shapes=[(4,)])

    def closure():
        optimizer.zero_grad()
        paths.path_idx = 4
        value = (weights[0] ** 2).sum()
        value.backward()
        return value

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first
    assert set(optimizer.state[weights[0]]["tau"]) == {4}


@BOTH
def test_step_before_any_draw_says_what_to_call(cls):
    weights, _, optimizer = make(cls, 5)
    weights[0].grad = torch.ones_like(weights[0])
    with pytest.raises(RuntimeError, match=rf"{cls.__name__}.step.*path_idx is None.*loss\(x_hat, x\).*backward"):
        optimizer.step()
    assert len(optimizer.state) == 0


@BOTH
@pytest.mark.parametrize(
    "path, error, said", [(5, IndexError, "got 5"), (-1, IndexError, "got -1"), (1.0, TypeError, "float")]
)
def test_a_path_that_does_not_exist_is_refused(cls, path, error, said):
    weights, paths, optimizer = make(cls, 5)
    weights[0].grad = torch.ones_like(weights[0])
    paths.path_idx = path
    with pytest.raises(error, match=said):
        optimizer.step()
    assert len(optimizer.state) == 0


@BOTH
def test_a_state_of_other_paths_or_another_optimizer_is_refused(cls):
    weights, paths, optimizer = make(cls, 5)
    advance(weights, paths, optimizer, 3)
    _, _, larger = make(cls, 315)
    with pytest.raises(ValueError, match=r"5 paths.* has 315: give it"):
        larger.load_state_dict(optimizer.state_dict())
    other = PAdam if cls is PSAGA else PSAGA
    with pytest.raises(ValueError, match=rf"state is of {cls.__name__}, but this is {other.__name__}"):
        make(other, 5)[2].load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="keeps no paths"):
        optimizer.load_state_dict(torch.optim.AdamW(weights).state_dict())
    with pytest.raises(ValueError, match=r"expected what state_dict\(\) of a .* returned, got NoneType"):
        optimizer.load_state_dict(None)
    assert len(larger.state) == 0 and optimizer.state[weights[0]]["k"] == 3


@BOTH
def test_a_state_of_other_weights_is_refused(cls):
    weights, paths, small = make(cls, 5, shapes=[(3,), (4,)])
    advance(weights, paths, small, 3)
    _, _, large = make(cls, 5, shapes=[(3,), (5,)])
    with pytest.raises(ValueError, match=r"weight tensor 1 has shape \(4,\), that of this optimizer \(5,\)"):
        large.load_state_dict(small.state_dict())
    assert len(large.state) == 0


def test_wrong_arguments_are_refused():
    weights, paths, optimizer = make(PAdam, 5)
    with pytest.raises(TypeError, match="n_paths.*got 0.001"):
        PAdam(weights, 1e-3)
    with pytest.raises(
        TypeError, match=r"must have `n_paths` and `path_idx`.*got None. Write PSAGA\(model.parameters\(\), loss"
    ):
        PSAGA(weights, lr=1e-3)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        PAdam(weights, SimpleNamespace(n_paths=0, path_idx=None))
    nan = float("nan")
    wrong = {"lr": [-1.0, nan], "eps": [-1.0], "weight_decay": [-0.1], "betas": [(0.9, 1.0), (-0.1, 0.9), (0.9,)]}
    for name, value in [(name, value) for name, values in wrong.items() for value in values]:
        with pytest.raises(ValueError, match=name):
            PSAGA(weights, paths, **{name: value})
        with pytest.raises(ValueError, match=name):
            optimizer.add_param_group({"params": [torch.zeros(2, requires_grad=True)], name: value})
    number, pair = (
        "must be a plain number such as 1e-5, got",
        r"must be a pair of plain numbers such as \(0.9, 0.999\), got",
    )
    wrong = [
        (name, value, number)
        for name in ("lr", "eps", "weight_decay")
        for value in ("a", None, [0.1], True, torch.tensor(0.1))
    ]
    wrong += [
        ("betas", value, pair)
        for value in (0.9, None, "ab", ("a", "b"), (0.9, None), torch.tensor([0.9, 0.9]), {0.8, 0.9})
    ]
    for name, value, expected in wrong:
        said = rf"{name} {expected} {re.escape(repr(value))} \({type(value).__name__}\)"
        with pytest.raises(TypeError, match=said):
            PSAGA(weights, paths, **{name: value})
        with pytest.raises(TypeError, match=said):
            optimizer.add_param_group({"params": [torch.zeros(2, requires_grad=True)], name: value})
    assert len(optimizer.param_groups) == 1
    PSAGA(weights, paths, lr=np.float32(0.1), betas=[0, np.float64(0.9)], eps=0, weight_decay=1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@BOTH
def test_on_cuda_it_equals_the_twin_and_never_waits_for_the_device(cls):
    paths = SimpleNamespace(n_paths=7, path_idx=None)
    w = torch.zeros(50, dtype=torch.float64, device="cuda", requires_grad=True)
    optimizer, twin = cls([w], paths, **OPTIONS), Twin(np.zeros(50), 7, cls is PSAGA, **OPTIONS)
    for _, path, generator in draws(150, 7):  # 112 = 16 * 7: the sum is taken afresh
        paths.path_idx = path
        g = torch.randn(50, generator=generator, dtype=torch.float64)
        twin.step(path, g)
        w.grad = g.cuda()
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert gap(w.cpu(), twin.w) < 1e-12
