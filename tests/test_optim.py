"""P-Adam and P-SAGA against `scrapl_lib.reference`, and their behaviour as torch optimizers."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import through_file

from replication.teaching import updates_at_rest
from scrapl_lib import reference
from scrapl_lib.optim import PSAGA, PAdam

BOTH = pytest.mark.parametrize("cls", [PAdam, PSAGA])
SHAPES = [(4, 3), (5,), ()]
OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
# of weights of order 1 to 4 over some hundred steps; float32 rounds each up to 1e-7 a few times a step (measured: 5e-6)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}


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
    a, b = (torch.as_tensor(x).detach().double() for x in (a, b))
    assert a.shape == b.shape and a.numel() > 0
    return float((a - b).abs().max())


class Reference:
    """`scrapl_lib.reference` for one weight tensor, in float64, one step at a time."""

    def __init__(self, cls, w, n_paths, **options):
        self.path = self.g = None
        rule = reference.p_saga if cls is PSAGA else reference.p_adam
        self.w = w.detach().double().clone()
        self.steps = rule(self.w, lambda p, w: self.g, iter(lambda: self.path, None), n_paths, **(OPTIONS | options))

    def step(self, path, g):
        self.path, self.g = path, g.double()
        self.w = next(self.steps)


@BOTH
@pytest.mark.parametrize("n_paths", [4, 40])
def test_each_weight_follows_the_reference_over_the_steps_it_takes_part_in(cls, n_paths):
    """At every step: groups with options of their own, one of float32, one that joins later, gradients missing at
    different steps, one frozen. With P = 4 the kept sums are taken afresh several times."""
    options = [{}, {"lr": 3e-2, "betas": (0.5, 0.9)}, {"lr": 1e-3, "weight_decay": 0.5, "eps": 0.1}]
    weights, paths, _ = make(cls, n_paths, shapes=[(4, 3), (), (2,), (2,)])
    weights[1] = weights[1].detach().float().requires_grad_()
    frozen = weights[3].requires_grad_(False).clone()
    groups = [{"params": [w]} | OPTIONS | o for w, o in zip(weights, options, strict=False)]
    groups[0]["params"].append(weights[3])
    optimizer = cls(groups[:2], paths)
    twins = [Reference(cls, w, n_paths, **o) for w, o in zip(weights, options, strict=False)]
    for k, path, generator in draws(400, n_paths):
        if k == 50:
            optimizer.add_param_group(groups[2])
        paths.path_idx = path
        for i, (w, twin) in enumerate(list(zip(weights, twins, strict=False))[: 2 + (k >= 50)]):
            w.grad = None
            if (k + i) % 3 and not (i and path == 2):
                w.grad = torch.randn(w.shape, generator=generator, dtype=w.dtype) + (path % 3 - 1)
                twin.step(path, w.grad)
        optimizer.step()
        assert all(gap(w, twin.w) < TOLERANCE[w.dtype] for w, twin in zip(weights, twins, strict=False))
    assert torch.equal(weights[3], frozen) and optimizer.state[weights[3]] == {"k": 0, "tau": {}, "table": {}}


@BOTH
def test_with_one_path_and_a_scheduler_it_is_adamw(cls):
    """P = 1: a = 1 and k/P = k, and P-SAGA's correction cancels; the learning rate changes at every step."""
    weights, paths, optimizer = make(cls, 1)
    others, _, _ = make(cls, 1)
    optimizers = [(weights, optimizer), (others, torch.optim.AdamW(others, **OPTIONS))]
    schedulers = [torch.optim.lr_scheduler.LambdaLR(o, lambda k: 1 / (1 + k / 50)) for _, o in optimizers]
    for k in range(300):
        for (some, rule), scheduler in zip(optimizers, schedulers, strict=True):
            advance(some, paths, rule, k + 1, k)
            scheduler.step()
    assert max(gap(a, b) for a, b in zip(weights, others, strict=True)) < 1e-12
    assert gap(weights[0], make(cls, 1)[0][0]) > 0.1


@BOTH
def test_gradients_stay_and_a_path_never_drawn_owns_no_table(cls):
    weights, paths, optimizer = make(cls, 1000)
    for paths.path_idx in (7, 3, 7):
        for w in weights:
            w.grad = torch.ones_like(w)
        same = [w.grad for w in weights]
        optimizer.step()
        assert all(w.grad is g and bool((g == 1).all()) for w, g in zip(weights, same, strict=True))
    for w in weights:
        state = optimizer.state[w]
        assert set(state["tau"]) == set(state["table"]) == {3, 7} and set(state) - {"ghat_sum"} == {"k", "tau", "table"}
        assert all([row.shape for row in rows] == [w.shape] * cls.n_rows for rows in state["table"].values())


def test_the_kept_sum_stays_at_the_exact_sum():
    """3000 float32 steps, updates near 1 in size: the kept mean is within 1e-5 of the mean taken in float64, and an
    error put into the sum is gone when it is taken afresh, every 16 P = 480 steps."""
    weights, paths, optimizer = make(PSAGA, 30, torch.float32, shapes=[(200,)])
    state = optimizer.state[weights[0]]

    def error():
        exact = sum(rows[2].double() for rows in state["table"].values())
        assert len(state["tau"]) == 30 and float(exact.abs().max()) > 1
        return gap(state["ghat_sum"] / 30, exact / 30)

    for start in range(0, 2880, 480):
        advance(weights, paths, optimizer, start + 479, start)
        assert error() < 1e-5
        state["ghat_sum"] += 1
        assert error() > 0.03
        advance(weights, paths, optimizer, start + 480, start + 479)
        assert error() < 1e-6


def test_p_saga_weighs_all_paths_alike_however_often_they_are_drawn():
    """Weights at rest, one batch, seed 0: a path's update is the sign of its gradient. Once all paths were drawn each
    P-SAGA step is the uniform mean of these (1e-5: steps are kept in float32); P-Adam's are the paths' own, so that
    their mean goes by the probabilities (5 standard errors of 4,000 draws)."""
    probs = torch.tensor([0.5, 0.2, 0.1, 0.1, 0.05, 0.05], dtype=torch.float64)
    gradients = torch.randn(1, 6, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    signs = gradients[0].sign()
    uniform, weighted = signs.mean(dim=0), probs @ signs
    assert (uniform - weighted).abs().max() > 0.3  # or there would be nothing to tell
    steps, paths = updates_at_rest("psaga", gradients, 4000, 0, probs)
    seen = max(int((paths == p).nonzero()[0]) for p in range(6)) + 1
    assert seen < 1000 and gap(steps[seen:], uniform.expand(4000 - seen, -1)) < 1e-5
    steps, _ = updates_at_rest("padam", gradients, 4000, 0, probs)
    assert gap(steps.mean(dim=0), weighted) < 5 / 4000**0.5 < (uniform - weighted).abs().max() / 3


@BOTH
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("carry", [through_file, copy.copy])
def test_resumes_bit_for_bit(cls, dtype, carry):
    """Stopped after 90 of 200 steps, with some of 60 paths not drawn yet; the states do not write into each other."""
    weights, paths, optimizer = make(cls, 60, dtype)
    advance(weights, paths, optimizer, 90)
    resumed = [w.detach().clone().requires_grad_() for w in weights]
    other = cls(resumed, paths, lr=123.0)
    other.load_state_dict(carry(optimizer.state_dict()))
    assert 20 < len(other.state[resumed[0]]["tau"]) < 60
    advance(weights, paths, optimizer, 200, 90)
    advance(resumed, paths, other, 200, 90)
    for a, b in zip(weights, resumed, strict=True):
        assert torch.equal(a, b)
        ours, theirs = optimizer.state[a], other.state[b]
        assert ours["k"] == theirs["k"] == 200 and ours["tau"] == theirs["tau"] and len(ours["table"]) > 20
        for path, rows in ours["table"].items():
            assert all(row.dtype == dtype for row in rows) and all(map(torch.equal, rows, theirs["table"][path]))


@BOTH
def test_a_state_of_another_optimizer_or_other_weights_is_refused(cls):
    weights, paths, optimizer = make(cls, 5, shapes=[(3,), (4,)])
    advance(weights, paths, optimizer, 3)
    larger, other = make(cls, 315)[2], make(PAdam if cls is PSAGA else PSAGA, 5)[2]
    state, of = optimizer.state_dict(), f"is of {cls.__name__} with 5 paths, this is"

    def changed(rename=int, **change):
        return state | {"state": {rename(key): kept | change for key, kept in state["state"].items()}}

    for refusing, given, said in (
        (larger, state, f"{of} {cls.__name__} with 315: take"),
        (other, state, f"{of} {type(other).__name__} with 5"),
        (optimizer, torch.optim.AdamW(weights).state_dict(), "is of an optimizer without paths"),
        (optimizer, None, "expected what state_dict.* got None"),
        (make(cls, 5, shapes=[(3,), (5,)])[2], state, r"weight 1 has shape \(4,\) in the .* \(5,\)"),
        # what torch.distributed.checkpoint.load makes of a fresh optimizer's state, and of one that has taken a step
        (optimizer, changed(k=1, tau={}, table={}), "weight 0 has taken 1 steps in the state, which lacks its tables"),
        (optimizer, changed(k=40), "weight 0 has taken 40 steps in the state, which lacks its tables"),
        (optimizer, changed(str), r"entries \['0', '1'\] of no weight"),
    ):
        with pytest.raises(ValueError, match=said):
            refusing.load_state_dict(given)
    assert not any(state["k"] for state in larger.state.values()) and optimizer.state[weights[0]]["k"] == 3


def test_a_closure_draws_the_path_of_its_own_step():
    """The closure runs with gradients enabled, before path_idx is read; its value is returned."""
    weights, paths, optimizer = make(PSAGA, 5, shapes=[(4,)])

    def closure():
        optimizer.zero_grad()
        paths.path_idx = 4
        value = (weights[0] ** 2).sum()
        value.backward()
        return value

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first and set(optimizer.state[weights[0]]["tau"]) == {4}


# ---- what is refused ------------------------------------------------------------------------------------------------

NAN, SPARSE = torch.full((2, 2), torch.nan), torch.eye(2).to_sparse()
REFUSED = [
    ({"path": None}, RuntimeError, r"step\(\): .* drawn no path .*path_idx is None.*loss\(x_hat, x\).*backward"),
    ({"path": 5}, IndexError, "path_idx = 5 is out of range: the loss has paths 0 .. 4"),
    ({"path": 1.0}, TypeError, "path_idx must be an integer, got 1.0"),
    ({"grad": NAN}, FloatingPointError, r"weight 'b' \(2, 2\) has a gradient with 4 NaN or infinite values"),
    ({"grad": SPARSE}, TypeError, r"weight 'b' \(2, 2\) has a sparse gradient.*sparse=False"),
    ({"dtype": torch.float16}, TypeError, "weight 'b' .* must be float32 or float64, got torch.float16.*autocast"),
    ({"dtype": torch.float64}, TypeError, "weight 'b' .* is torch.float64 on cpu now, its tables are torch.float32"),
    ({"lr": "a"}, TypeError, "lr must be a plain number"),
]


@BOTH
@pytest.mark.parametrize(("broken", "error", "said"), REFUSED)
def test_a_refused_step_changes_nothing(cls, broken, error, said):
    """The second weight is at fault, or the path, or the second group: the first weight and all tables stay."""
    a, b = torch.ones(3, requires_grad=True), torch.ones(2, 2, requires_grad=True)
    paths = SimpleNamespace(n_paths=5, path_idx=2)
    optimizer = cls([{"params": [("a", a)]}, {"params": [("b", b)]}], paths)
    a.grad, b.grad = torch.ones(3), torch.ones(2, 2)
    optimizer.step()
    paths.path_idx = broken.get("path", 3)
    b.data, b.grad = b.data.to(broken.get("dtype", b.dtype)), None
    b.grad = broken.get("grad", torch.ones_like(b))
    optimizer.param_groups[1]["lr"] = broken.get("lr", 1e-5)
    before, weight = copy.deepcopy(optimizer.state_dict()["state"]), a.detach().clone()
    with pytest.raises(error, match=said):
        optimizer.step()
    after = optimizer.state_dict()["state"]
    assert torch.equal(a, weight) and [s["tau"] for s in after.values()] == [{2: 1}] * 2
    for i, state in before.items():
        assert state["k"] == after[i]["k"] == 1 and set(after[i]["table"]) == {2}
        assert all(torch.equal(*rows) for rows in zip(state["table"][2], after[i]["table"][2], strict=True))


@BOTH
def test_a_step_that_finds_no_memory_for_its_tables_moves_nothing(cls, monkeypatch):
    weights, paths, optimizer = make(cls, 5)
    before, zeros_like, made = [w.detach().clone() for w in weights], torch.zeros_like, []

    def few(tensor):
        made.append(tensor)
        if len(made) == 6:
            raise torch.OutOfMemoryError("no memory")
        return zeros_like(tensor)

    monkeypatch.setattr(torch, "zeros_like", few)
    with pytest.raises(RuntimeError, match="no memory"):
        advance(weights, paths, optimizer, 1)
    monkeypatch.undo()
    assert all(map(torch.equal, weights, before)) and not any(state["k"] for state in optimizer.state.values())
    advance(weights, paths, optimizer, 1)
    assert [state["k"] for state in optimizer.state.values()] == [1, 1, 1] and not torch.equal(weights[0], before[0])


def test_a_moved_model_goes_on_once_its_tables_moved_too():
    weights, paths, optimizer = make(PSAGA, 5, torch.float32)
    advance(weights, paths, optimizer, 10)
    for w in weights:
        w.data, w.grad = w.data.double(), None
    with pytest.raises(TypeError, match=r"call optimizer.load_state_dict\(optimizer.state_dict\(\)\) after moving"):
        advance(weights, paths, optimizer, 11, 10)
    optimizer.load_state_dict(optimizer.state_dict())
    advance(weights, paths, optimizer, 20, 10)
    assert optimizer.state[weights[0]]["k"] == 20 and optimizer.state[weights[0]]["ghat_sum"].dtype == torch.float64


WRONG_OPTIONS = [
    ("lr", math.nan, ValueError, "lr must be at least 0"),
    ("weight_decay", math.inf, ValueError, "weight_decay must be at least 0 and below inf, got inf"),
    ("betas", (0.9, 1.0), ValueError, r"betas\[1\] must be at least 0 and below 1, got 1.0"),
    *[("eps", value, TypeError, "eps must be a plain number") for value in ("a", None, True, torch.ones(1))],
    *[("betas", value, TypeError, "betas must be a pair of plain") for value in (0.9, "ab", (0.9,), torch.ones(2))],
    ("betas", (0.9, None), TypeError, r"betas\[1\] must be a plain number such as 1e-5, got None"),
]


def test_wrong_arguments_are_refused():
    """When the optimizer is made, and when a group is added."""
    weights, paths, optimizer = make(PAdam, 5)
    for wrong, error, said in (
        (1e-3, TypeError, "n_paths.*got 0.001"),
        (None, TypeError, r"must have `n_paths` and `path_idx`.*got None. Write PAdam\(model"),
        (SimpleNamespace(n_paths=0, path_idx=None), ValueError, "at least 1, got 0"),
    ):
        with pytest.raises(error, match=said):
            PAdam(weights, wrong)
    groups = [({name: value}, error, said) for name, value, error, said in WRONG_OPTIONS]
    for dtype in (torch.float16, torch.bfloat16, torch.complex64):
        odd = {"params": [torch.zeros(2, dtype=dtype, requires_grad=True)]}
        groups.append((odd, TypeError, rf"weight 0 \(2,\) must be float32 or float64, got {dtype}"))
    for group, error, said in groups:
        group = {"params": [torch.zeros(2, requires_grad=True)]} | group
        for refusing in (lambda group=group: PSAGA([group], paths), lambda g=group: optimizer.add_param_group(g)):
            with pytest.raises(error, match=said):
                refusing()
    assert len(optimizer.param_groups) == 1 and len(optimizer.state) == len(weights)
    PSAGA(weights, paths, lr=np.float32(0.1), betas=[0, np.float64(0.9)], eps=0, weight_decay=1)


@pytest.mark.cuda
@BOTH
def test_on_cuda_it_equals_the_reference_and_never_waits_for_the_device(cls):
    paths = SimpleNamespace(n_paths=7, path_idx=None)
    w = torch.zeros(50, dtype=torch.float64, device="cuda", requires_grad=True)
    optimizer, twin = cls([w], paths, **OPTIONS), Reference(cls, w.cpu(), 7)
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
