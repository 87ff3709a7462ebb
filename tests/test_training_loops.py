"""SCRAPLLoss, P-Adam and P-SAGA in other people's training loops: what docs/training_loops.md promises."""

import copy
import io
import math
import multiprocessing
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import through_file
from odd_surroundings import odd_surroundings
from torch import nn
from torch.utils.checkpoint import checkpoint

from scrapl_lib import PSAGA, JTFSLoss, PAdam, SCRAPLLoss

ROOT = Path(__file__).parents[1]
KW = dict(shape=1024, J=6, Q1=4, Q2=1, J_fr=2, Q_fr=1)
BOTH = pytest.mark.parametrize("cls", [PAdam, PSAGA])


class Model(nn.Module):
    """theta (batch, 2) -> audio (batch, 1, 1024)."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(2, 1024)

    def forward(self, theta):
        return torch.tanh(self.lin(theta))[:, None]


def sounds(n=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.rand(2, 2, generator=generator), torch.randn(2, 1, 1024, generator=generator)) for _ in range(n)]


def made(cls=PSAGA, seed=0, **options):
    torch.manual_seed(0)
    model, loss = Model(), SCRAPLLoss(**KW, seed=seed, **options)
    return model, loss, cls(model.parameters(), loss, lr=1e-3)


def backward(model, loss, batch, **options):
    theta, x = batch
    (1e8 * loss(model(theta), x, **options)).backward()


def trained(model, loss, optimizer, n, start=0):
    for batch in sounds(start + n)[start:]:
        optimizer.zero_grad()
        backward(model, loss, batch)
        optimizer.step()
    return model.lin.weight.detach().clone()


# ---- which path a gradient is booked under --------------------------------------------------------------------------


def until_another_path(loss, call):
    path = loss.path_idx
    while loss.path_idx == path:
        call()


def two_draws(model, loss, optimizer, batch):
    until_another_path(loss, lambda: backward(model, loss, batch))


def a_call_in_training_mode_between(model, loss, optimizer, batch):
    until_another_path(loss, lambda: loss(model(batch[0]).detach(), batch[1]))


def two_steps(model, loss, optimizer, batch):
    optimizer.step()


def training_in_evaluation_mode(model, loss, optimizer, batch):
    loss.eval()
    backward(model, loss, batch, path_idx=(loss.path_idx + 1) % loss.n_paths)


NOT_BOOKED = [
    (two_draws, r"would book under path \d+ gradients that are not all of it.*path_idx=loss.path_idx"),
    (a_call_in_training_mode_between, r"would book under path .*evaluate in loss.eval\(\) or torch.no_grad"),
    (two_steps, r"no backward pass went through this optimizer's loss since its last step or zero_grad\(\)"),
    (training_in_evaluation_mode, "would book under path"),
]


@BOTH
@pytest.mark.parametrize(("between", "said"), NOT_BOOKED)
def test_a_gradient_of_another_path_is_not_booked(cls, between, said):
    """And training goes on at once after the next zero_grad()."""
    model, loss, optimizer = made(cls)
    batch = sounds()[0]
    backward(model, loss, batch)
    between(model, loss, optimizer, batch)
    weights, state = model.lin.weight.detach().clone(), copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises(RuntimeError, match=said):
        optimizer.step()
    assert torch.equal(model.lin.weight, weights)
    assert [(s["k"], s["tau"]) for s in state.values()] == [(s["k"], s["tau"]) for s in optimizer.state.values()]
    loss.train()
    assert not torch.equal(trained(model, loss, optimizer, 1), weights)


@pytest.mark.parametrize("drop", ["optimizer", "model", "none", "bucket views"])
def test_gradients_are_booked_once(drop):
    """DistributedDataParallel puts the same views of its buckets back in place after zero_grad() of the model."""
    (model, loss, optimizer), batch, views = made(), sounds()[0], []
    if drop == "bucket views":
        for weight in model.parameters():
            weight.grad = torch.zeros(weight.numel() + 1)[1:].view_as(weight)
        views = [weight.grad for weight in model.parameters()]
    for step in range(2):
        backward(model, loss, batch)
        if drop == "none" and step:
            with pytest.raises(RuntimeError, match=r"the last step has booked already: call zero_grad\(\)"):
                optimizer.step()
            optimizer.zero_grad()
            backward(model, loss, batch)
        optimizer.step()
        {"optimizer": optimizer.zero_grad, "model": model.zero_grad}.get(drop, int)()
        for weight, view in zip(model.parameters(), views):
            weight.grad = view.zero_()
    assert optimizer.state[model.lin.weight]["k"] == 2


@BOTH
@pytest.mark.parametrize("unbiased", [False, True])
def test_accumulated_parts_are_the_whole_batch(cls, unbiased):
    """Two parts of one path against one batch of both, to 1e-5 of the step in float32."""
    batches = sounds()
    whole = [torch.cat(tensors) for tensors in zip(*batches, strict=True)]
    (model, loss, optimizer), (twin, twin_loss, twin_optimizer) = (made(cls, unbiased=unbiased) for _ in range(2))
    loss.probs = twin_loss.probs = torch.arange(1.0, loss.n_paths + 1) / sum(range(loss.n_paths + 1))
    start = model.lin.weight.detach().clone()
    for _ in range(3):
        optimizer.zero_grad(), twin_optimizer.zero_grad()
        (0.5e8 * loss(model(batches[0][0]), batches[0][1])).backward()
        assert (loss.weight != 1) == unbiased
        (0.5e8 * loss.weight * loss(model(batches[1][0]), batches[1][1], path_idx=loss.path_idx)).backward()
        backward(twin, twin_loss, whole)
        optimizer.step(), twin_optimizer.step()
    moved = (twin.lin.weight - start).norm()
    assert loss.path_idx == twin_loss.path_idx and (model.lin.weight - twin.lin.weight).norm() < 1e-5 * moved


def test_a_copied_optimizer_alone_cannot_book_and_copied_together_all_goes_on():
    model, loss, optimizer = made()
    trained(model, loss, optimizer, 3)
    for copied in (copy.deepcopy((model, loss, optimizer)), pickle.loads(pickle.dumps((model, loss, optimizer)))):
        assert copied[2].paths is copied[1] and copied[2].param_groups[0]["params"][0] is copied[0].lin.weight
        expected = copy.deepcopy((model, loss, optimizer))
        assert torch.equal(trained(*copied, 3, 3), trained(*expected, 3, 3))
    alone = copy.deepcopy(optimizer)
    for w in alone.param_groups[0]["params"]:
        w.grad = torch.ones_like(w)
    backward(model, loss, sounds()[0])
    with pytest.raises(RuntimeError, match="no backward pass.*copy model, loss and optimizer in one deepcopy"):
        alone.step()


def test_grad_scaler_may_leave_out_steps_and_optimizers_share_a_loss():
    """An infinite gradient: no step, and the next one books its own path only; the decoder's optimizer goes on."""
    model, loss, optimizer = made()
    other = PAdam([torch.zeros(1, requires_grad=True)], loss)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    for step, (theta, x) in enumerate(sounds(3)):
        value = loss(model(theta), x)  # before zero_grad(), as many loops have it
        optimizer.zero_grad()
        scaler.scale((math.inf if step == 1 else 1e8) * value).backward()
        scaler.step(optimizer)
        scaler.update()
        other.step()
    assert optimizer.state[model.lin.weight]["k"] == 2 and torch.isfinite(model.lin.weight).all()


@pytest.mark.parametrize("how", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_evaluation_leaves_training_as_it_is(how):
    """With validation between backward() and step() the weights are, bit for bit, those without."""
    (model, loss, optimizer), plain = made(unbiased=True), made(unbiased=True)
    expected, drawn = trained(*plain, 6), []
    for batch in sounds(6):
        optimizer.zero_grad()
        backward(model, loss, batch)
        loss.train(how is not torch.enable_grad)
        with how():
            drawn += [loss.draw(), loss.draw()]
            loss(model(batch[0]), batch[1]), loss(model(batch[0]), batch[1], path_idx=5)
        loss.train()
        optimizer.step()
    assert torch.equal(model.lin.weight, expected) and len(set(drawn)) > 5
    assert (loss.path_idx, loss.weight) == (plain[1].path_idx, plain[1].weight)
    twin = SCRAPLLoss(**KW, seed=0, unbiased=True)
    assert drawn[:2] != [twin.draw(), twin.draw()]  # a stream of their own, with a state of its own
    loss.eval(), twin.load_state_dict(loss.state_dict()), twin.eval()
    assert [loss.draw() for _ in range(9)] == [twin.draw() for _ in range(9)]


def rank(number, file):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=number, world_size=2)
    w, loss, said = torch.ones(1024, requires_grad=True), SCRAPLLoss(**KW), None
    optimizer = PSAGA([w], loss, lr=1e-3)
    for step in range(12):
        loss.train(step != 4)
        if number == 0 and step in (4, 8):
            loss.draw()
        loss.train()
        optimizer.zero_grad()
        x = torch.randn(2, 1, 1, 1024, generator=torch.Generator().manual_seed(2 * step + number))
        (1e8 * loss(w * x[0], x[1])).backward()
        torch.distributed.all_reduce(w.grad)
        try:
            optimizer.step()
        except RuntimeError as error:
            said = (step, str(error))
            break
    torch.save((said, w.detach()), f"{file}.{number}")
    torch.distributed.destroy_process_group()


def test_ranks_that_draw_different_paths_are_told(tmp_path):
    """Two gloo processes; rank 0 draws once more before step 4, in evaluation, and before step 8, in training."""
    file, fork = tmp_path / "rendezvous", multiprocessing.get_context("fork")
    made()  # the first optimizer imports for seconds: here, not in each of the two
    ranks = [fork.Process(target=rank, args=(number, file), daemon=True) for number in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(300)
    (said, weights), (said_1, weights_1) = (torch.load(f"{file}.{number}") for number in range(2))
    assert said == said_1 and said[0] == 8 and torch.equal(weights, weights_1) and not (weights == 1).all()
    assert re.match(r"the ranks drew different paths, \[\d+, \d+\]: give the losses of all ranks one seed", said[1])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_of_the_loss(use_reentrant):
    (theta, x), (model, loss, optimizer) = sounds()[0], made()
    theta.requires_grad_()

    def run(path=None):
        optimizer.zero_grad()
        checkpoint(lambda t: 1e8 * loss(model(t), x, path_idx=path), theta, use_reentrant=use_reentrant).backward()

    with pytest.raises(RuntimeError, match=r"draw a path inside a backward pass.*loss.draw\(\) outside"):
        run()
    path = loss.draw()
    run(path)
    found = model.lin.weight.grad.clone()
    optimizer.step()
    assert optimizer.state[model.lin.weight]["tau"] == {path: 1}
    model, loss, _ = made()
    backward(model, loss, (theta, x), path_idx=path)
    assert torch.equal(found, model.lin.weight.grad) and found.abs().max() > 0


@pytest.mark.filterwarnings("ignore:Signal support is too small")
def test_a_compiled_step_trains_alike():
    """Loss and optimizer leave the graph, also of odd sizes, and JTFSLoss."""
    (model, loss, optimizer), expected = made(), trained(*made(), 3)

    @torch.compile(backend="eager")
    def step(theta, x):
        optimizer.zero_grad()
        (1e8 * loss(model(theta), x)).backward()
        optimizer.step()

    for batch in sounds(3):
        step(*batch)
    assert torch.equal(model.lin.weight, expected) and optimizer.state[model.lin.weight]["k"] == 3
    for kind, sizes in ((JTFSLoss, KW), *((SCRAPLLoss, KW | dict(shape=n, J=5)) for n in (160, 265))):
        x_hat, x = torch.randn(2, 1, 1, sizes["shape"], generator=torch.Generator().manual_seed(0))
        given = {"path_idx": 2} if kind is SCRAPLLoss else {}
        assert torch.compile(kind(**sizes), backend="eager")(x_hat, x, **given) == kind(**sizes)(x_hat, x, **given) > 0


def test_surroundings_change_neither_draws_nor_training():
    """Another default dtype and device and autocast around what makes, restores and steps."""
    expected, (model, _, _), batches = trained(*made(), 3), made(), sounds(3)
    state, first = SCRAPLLoss(**KW).get_extra_state(), SCRAPLLoss(**KW).draw()
    with odd_surroundings():
        loss = SCRAPLLoss(**KW)
        loss.probs = np.full(loss.n_paths, 1 / loss.n_paths)
        assert loss.probs.device.type == "cpu" and loss.draw() == first
        loss.set_extra_state(state)
        optimizer = PSAGA(model.parameters(), loss, lr=1e-3)
    for batch in batches:
        optimizer.zero_grad()
        backward(model, loss, batch)
        with odd_surroundings():
            optimizer.step()
    assert torch.equal(model.lin.weight, expected)


@BOTH
def test_distributed_checkpoint_state_dicts_go_round(cls):
    """After 5 of 10 steps, by parameter names, through a file, into a fresh optimizer; and one without steps."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model, loss, optimizer = made(cls)
    set_optimizer_state_dict(model, optimizer, get_optimizer_state_dict(model, optimizer))
    trained(model, loss, optimizer, 5)
    state = through_file(get_optimizer_state_dict(model, optimizer))
    assert set(state["state"]) == {"lin.weight", "lin.bias"}
    other, other_loss, other_optimizer = made(cls)
    set_optimizer_state_dict(other, other_optimizer, state)
    other.load_state_dict(model.state_dict()), other_loss.load_state_dict(loss.state_dict())
    assert torch.equal(trained(other, other_loss, other_optimizer, 5, 5), trained(model, loss, optimizer, 5, 5))


# ---- the page -------------------------------------------------------------------------------------------------------

PAGE = (ROOT / "docs/training_loops.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"## ([^\n]+)\n(?:(?!\n## ).)*?```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def one_rank(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@BOTH
@pytest.mark.parametrize(("title", "code"), SNIPPETS, ids=[title for title, _ in SNIPPETS])
def test_the_snippets_of_the_page_run(title, code, cls, one_rank):
    """Each has at most eight lines, and, but for evaluation, trains the model or loads its state."""
    model, loss, optimizer = made(cls)
    names = {"copy": copy, "torch": torch, "checkpoint": checkpoint, "SCRAPLLoss": SCRAPLLoss, "PSAGA": cls, "KW": KW}
    names |= {"model": model, "loss": loss, "optimizer": optimizer, "batches": sounds(3), "file": io.BytesIO()}
    before, path = model.lin.weight.detach().clone(), loss.path_idx
    exec(compile(code, title, "exec"), names)
    assert len(code.splitlines()) <= 8 and len(SNIPPETS) == 13
    moved, drawn = not torch.equal(names.get("model_2", model).lin.weight, before), loss.path_idx != path
    assert moved == (title not in ("Evaluation", "Saving and resuming"))
    others = ("Evaluation", "Saving and resuming", "Copies", "DistributedDataParallel", "A rate at a time")
    assert drawn == (title not in others)
