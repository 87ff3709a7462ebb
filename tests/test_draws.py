"""What a draw takes: a path, all paths of a rate, or a group of one's own. The twin is the loss of single paths."""

from collections import Counter

import pytest
import torch

from scrapl_lib import PSAGA, SCRAPLLoss
from scrapl_lib.curvature import _derivatives_backwards
from scrapl_lib.jets import Jets

KW = dict(shape=1024, J=6, Q1=4, Q2=1, J_fr=2, Q_fr=1)  # 28 paths, 4 rates of 7
GROUPS = [[0, 9, 20], [27], [9, 3]]


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def mean_of(loss, draws, x_hat, x):
    value = torch.stack([loss(x_hat, x, path_idx=i) for i in draws]).mean()
    return value, torch.autograd.grad(value, x_hat)[0]


@pytest.mark.parametrize("options", [{}, dict(log1p=True), dict(T="global", F="global"), dict(J_fr=1, F=1, T=8)])
def test_the_mean_over_rates_is_the_mean_over_paths(options):
    x_hat, x = noise(2, 1, 1024).requires_grad_(), noise(2, 1, 1024, seed=1)
    path, rate = SCRAPLLoss(**{**KW, **options}), SCRAPLLoss(**{**KW, **options}, draw="rate")
    assert rate.n_paths == 4 and sorted(sum(rate.draws, ())) == list(range(path.n_paths))
    for i, draw in enumerate(rate.draws):
        paths = [path.jtfs.paths[p] for p in draw]
        assert len({each.rate for each in paths}) == 1 and len(paths) == path.n_paths // 4
        (value, grad), (one, expected) = mean_of(path, draw, x_hat, x), mean_of(rate, [i], x_hat, x)
        assert value > 0 and abs(value - one) < 1e-12 * value
        assert (grad - expected).abs().max() < 1e-12 * expected.abs().max()
    for ours, theirs in zip(mean_of(rate, range(4), x_hat, x), mean_of(path, range(path.n_paths), x_hat, x)):
        assert (ours - theirs).abs().max() < 1e-12 * theirs.abs().max()


def test_groups_of_ones_own_take_the_mean_over_their_paths():
    x_hat, x = noise(2, 1, 1024).requires_grad_(), noise(2, 1, 1024, seed=1)
    path, groups, subset = SCRAPLLoss(**KW), SCRAPLLoss(**KW, draw=GROUPS), SCRAPLLoss(**KW, draw=[GROUPS[0]])
    assert groups.n_paths == 3 and groups.draws == ((0, 9, 20), (27,), (9, 3))
    for i, group in enumerate(GROUPS):
        assert abs(mean_of(groups, [i], x_hat, x)[0] - mean_of(path, group, x_hat, x)[0]) < 1e-14
    S = groups.coefficients(x, 0)
    for number, p in enumerate(GROUPS[0]):
        assert (S[:, number] - path.coefficients(x, p)).abs().max() < 1e-14 * S.abs().max()
    assert S.shape[1] == 3 and groups(x_hat, x, path_idx=0, S=S) == groups(x_hat, x, path_idx=0)
    assert subset(x_hat, x) == subset(x_hat, x) == groups(x_hat, x, path_idx=0)  # one group: always the same


def test_draws_by_path_are_those_of_single_paths_bit_for_bit():
    x_hat, x = noise(2, 1, 1024, dtype=torch.float32), noise(2, 1, 1024, seed=1, dtype=torch.float32)
    loss = SCRAPLLoss(**KW)
    for p in (0, 8, 27):
        difference = loss.jtfs.path(x_hat, p) - loss.jtfs.path(x, p)
        assert loss(x_hat, x, path_idx=p) == torch.linalg.vector_norm(difference.flatten(1), dim=1).mean() > 0


def test_unbiased_draws_of_rates_have_the_mean_over_all_paths():
    """The expectation over draws, sum_i pi_i w_i L_i: the weights are those of 300 draws, the values known."""
    x_hat, x = noise(2, 1, 1024), noise(2, 1, 1024, seed=1)
    loss = SCRAPLLoss(**KW, draw="rate", unbiased=True)
    loss.probs = [0.4, 0.3, 0.2, 0.1]
    values, weights, times = [float(loss(x_hat, x, path_idx=i)) for i in range(4)], {}, Counter()
    for _ in range(300):
        value = float(loss(x_hat, x))
        weights[loss.path_idx] = value / values[loss.path_idx]
        times[loss.path_idx] += 1
    assert all(abs(times[i] / 300 - p) < 0.1 for i, p in enumerate(loss.probs.tolist()))
    expectation = sum(float(loss.probs[i]) * weights[i] * values[i] for i in range(4))
    expected = mean_of(SCRAPLLoss(**KW), range(28), x_hat.requires_grad_(), x)[0].detach()
    assert abs(expectation - float(expected)) < 1e-12 * float(expected)


def test_psaga_keeps_a_table_for_each_rate():
    torch.manual_seed(0)
    model, loss, x = torch.nn.Linear(2, 1024), SCRAPLLoss(**KW, draw="rate"), noise(2, 1, 1024, dtype=torch.float32)
    optimizer = PSAGA(model.parameters(), loss, lr=1e-3)
    for _ in range(6):
        optimizer.zero_grad()
        loss(model(torch.ones(2, 2))[:, None], x).backward()
        optimizer.step()
    table = optimizer.state[model.weight]["table"]
    assert set(table) <= {0, 1, 2, 3} and len(table) > 1 and all(len(rows) == 3 for rows in table.values())


@pytest.mark.parametrize("draw", ["rate", GROUPS])
def test_derivatives_of_draws_are_those_of_autograd(draw):
    theta = torch.tensor([[0.3, 0.6], [0.7, 0.2]], dtype=torch.float64)
    t, jets = torch.arange(1024, dtype=torch.float64) / 1024, Jets(2)
    a, b = theta[:, :1], theta[:, 1:]
    tone, ramp = torch.sin(40 * t), torch.cos(300 * t)  # audio a^2 tone + a b ramp
    value = a**2 * tone + a * b * ramp
    firsts, zero = [2 * a * tone + b * ramp, a * ramp], torch.zeros_like(value)
    moving = torch.stack([value, *firsts, 2 * tone + zero, ramp + zero, zero], dim=1)  # second ones: 00, 01, 11
    loss, x = SCRAPLLoss(**KW, draw=draw, log1p=True), noise(2, 1, 1024, seed=1)
    ours = {p: found for p, *found in loss.derivatives(moving, x, jets, range(loss.n_paths))}
    assert list(ours) == list(range(loss.n_paths))
    for p, *theirs in _derivatives_backwards(loss, moving, x, jets, list(ours)):
        for mine, expected in zip(ours[p], theirs, strict=True):
            assert expected.abs().max() > 0 and (mine - expected).abs().max() < 1e-9 * expected.abs().max()


def test_a_state_of_other_draws_is_refused():
    by_rate, same = SCRAPLLoss(**KW, draw="rate"), SCRAPLLoss(**KW, draw="rate", seed=3)
    by_rate.draw()
    same.set_extra_state(by_rate.get_extra_state())
    assert same.path_idx == by_rate.path_idx and same.draw() == by_rate.draw()
    four = SCRAPLLoss(**KW, draw=[[0], [1], [2], [3]])
    with pytest.raises(ValueError, match="the state is of a loss with draws = "):
        four.set_extra_state(by_rate.get_extra_state())
    with pytest.raises(ValueError, match="one entry per path"):
        SCRAPLLoss(**KW).set_extra_state(by_rate.get_extra_state())


@pytest.mark.parametrize(
    ("draw", "error", "message"),
    [
        ("rates", ValueError, "unknown draw 'rates'.*rate"),
        ([], ValueError, "none of them empty"),
        ([[1], []], ValueError, "none of them empty"),
        ([[1, 1]], ValueError, "different path numbers"),
        ([[28]], IndexError, "path number = 28 is out of range"),
        ([1, 2], TypeError, "a list of groups of path numbers"),
        ([["a"]], TypeError, "a list of groups of path numbers"),
        (None, TypeError, "a list of groups of path numbers"),
    ],
)
def test_wrong_draws_are_refused(draw, error, message):
    with pytest.raises(error, match=message):
        SCRAPLLoss(**KW, draw=draw)
    loss = SCRAPLLoss(**KW, draw="rate")
    with pytest.raises(IndexError, match="path_idx = 4 is out of range"):
        loss(noise(1, 1, 1024), noise(1, 1, 1024), path_idx=4)


# ---- weights and gradients outside of training ----------------------------------------------------------------------


def test_the_weight_of_the_last_path_stays_readable():
    """For the parts of an accumulated batch, for a path drawn outside of a checkpoint, and after resuming."""
    loss, x_hat, x = SCRAPLLoss(**KW, unbiased=True), noise(3, 1, 1024), noise(3, 1, 1024, seed=1)
    loss.probs = torch.arange(1.0, 29, dtype=torch.float64) / 406
    assert loss.weight == 1
    path = loss.draw()
    expected = 1 / (28 * (path + 1) / 406)
    for _ in range(3):
        loss(x_hat, x, path_idx=path)
        assert abs(loss.weight - expected) < 1e-12 * expected
    resumed = SCRAPLLoss(**KW, unbiased=True)
    resumed.load_state_dict(loss.state_dict())
    assert resumed.weight == loss.weight
    value = float(loss(x_hat, x))
    again = loss.weight * float(loss(x_hat, x, path_idx=loss.path_idx))
    assert value > 0 and abs(value - again) < 1e-12 * value
    with pytest.raises(ValueError, match="of a loss with unbiased = True .here None."):
        SCRAPLLoss(**KW).load_state_dict(loss.state_dict())


def test_gradients_taken_in_evaluation_before_zero_grad_are_not_booked():
    """A saliency map before the step's zero_grad(); later it would count as one of the step's gradients."""
    torch.manual_seed(0)
    model, loss, x = torch.nn.Linear(2, 1024), SCRAPLLoss(**KW), noise(2, 1, 1024, dtype=torch.float32)
    optimizer = PSAGA(model.parameters(), loss, lr=1e-3)

    def saliency():
        loss.eval()
        sound = x.clone().requires_grad_()
        assert torch.autograd.grad(loss(sound, x + 1), sound)[0].abs().max() > 0
        loss.train()

    for _ in range(4):
        saliency()
        optimizer.zero_grad()
        loss(model(torch.ones(2, 2))[:, None], x).backward()
        optimizer.step()
    saliency()
    assert optimizer.state[model.weight]["k"] == 4
    with pytest.raises(RuntimeError, match="would book under path"):
        optimizer.step()


# ---- steps of other loops -------------------------------------------------------------------------------------------


def stepper():
    torch.manual_seed(0)
    model, loss, x = torch.nn.Linear(2, 1024), SCRAPLLoss(**KW), noise(2, 1, 1024, dtype=torch.float32)
    optimizer = PSAGA(model.parameters(), loss, lr=1e-3)

    def backward():
        loss(model(torch.ones(2, 2))[:, None], x).backward()

    return model, optimizer, backward


@pytest.mark.parametrize("drop", ["optimizer", "model", "none", "bucket views"])
def test_gradients_are_booked_once(drop):
    """DistributedDataParallel puts the same views of its buckets back in place after zero_grad() of the model."""
    model, optimizer, backward = stepper()
    if drop == "bucket views":
        for weight in model.parameters():
            weight.grad = torch.zeros(weight.numel() + 1)[1:].view_as(weight)
        views = [weight.grad for weight in model.parameters()]
    for _ in range(2):
        backward()
        if drop == "none" and optimizer.state[model.weight]["k"]:
            with pytest.raises(RuntimeError, match=r"the last step has booked already: call zero_grad\(\)"):
                optimizer.step()
            optimizer.zero_grad()
            backward()
        optimizer.step()
        {"optimizer": optimizer.zero_grad, "model": model.zero_grad}.get(drop, int)()
        if drop == "bucket views":
            for weight, view in zip(model.parameters(), views, strict=True):
                weight.grad = view.zero_()
    assert optimizer.state[model.weight]["k"] == 2


def test_a_step_that_finds_no_memory_for_its_tables_moves_nothing(monkeypatch):
    model, optimizer, backward = stepper()
    backward()
    before, zeros, made = model.weight.clone(), torch.zeros_like, []

    def few(tensor):
        made.append(tensor)
        if len(made) == 6:
            raise torch.OutOfMemoryError("no memory")
        return zeros(tensor)

    monkeypatch.setattr(torch, "zeros_like", few)
    with pytest.raises(RuntimeError, match="no memory"):
        optimizer.step()
    monkeypatch.undo()
    assert torch.equal(model.weight, before) and [state["k"] for state in optimizer.state.values()] == [0, 0]
    optimizer.step()
    assert [state["k"] for state in optimizer.state.values()] == [1, 1] and not torch.equal(model.weight, before)


def test_a_whole_step_may_be_compiled():
    (model, optimizer, backward), (twin, its_optimizer, its_backward) = stepper(), stepper()

    def step():
        its_optimizer.zero_grad()
        its_backward()
        its_optimizer.step()

    compiled = torch.compile(step, backend="eager")
    for _ in range(3):
        optimizer.zero_grad()
        backward()
        optimizer.step()
        compiled()
    assert torch.equal(model.weight, twin.weight) and its_optimizer.state[twin.weight]["k"] == 3


def test_a_state_without_its_tables_is_refused():
    """What torch.distributed.checkpoint.load makes of a fresh optimizer's state: k, and nothing else."""
    model, optimizer, backward = stepper()
    backward()
    optimizer.step()
    state = optimizer.state_dict()
    for k, kept in ((1, False), (40, True)):  # of an optimizer that is fresh, and of one that has taken a step
        lacking = {"k": k} | ({} if kept else {"tau": {}, "table": {}})
        with pytest.raises(ValueError, match=f"weight 0 has taken {k} steps in the state, which lacks its tables"):
            stepper()[1].load_state_dict(state | {"state": {key: s | lacking for key, s in state["state"].items()}})
    with pytest.raises(ValueError, match=r"entries \['0', '1'\] of no weight"):
        stepper()[1].load_state_dict(state | {"state": {str(key): s for key, s in state["state"].items()}})
