"""P-Adam and P-SAGA: optimizers for a loss that draws one of P paths per step (SCRAPL paper, section 2, eq. 6 to 9).

Symbols: w weights; g gradient of the drawn path's loss; p the drawn path, of P; k step, from 1; tau_p the step of p's
last draw, 0 before it; Gamma the set of paths drawn before this step; m_p, v_p the path's moments; b1, b2 = betas;
g_cur the path's P-Adam update; ghat_p the update it gave at its last draw, zero before its first.

    P-Adam   a     = (k - tau_p) / P
             m_p  <- b1^a m_p + (1 - b1^a) g                                                    (eq. 6)
             v_p  <- b2^a v_p + (1 - b2^a) g g                                                  (eq. 7)
             g_cur = [m_p / (1 - b1^(k/P))] / (eps + sqrt(v_p / (1 - b2^(k/P)))),   tau_p <- k  (eq. 8)
             w    <- w - lr weight_decay w - lr g_cur
    P-SAGA   w    <- w - lr weight_decay w - lr (g_cur - ghat_p + sum_{q in Gamma} ghat_q / max(1, |Gamma|))   (eq. 9)
             ghat_p <- g_cur,   Gamma <- Gamma + {p}

Scale of the gradient: those of JTFS losses are about 1e-9, below eps, and some of their squares underflow float32.
Multiply the loss by its `gradient_scale` (1e8; 1 with log1p) before `backward()`, or these steps are far too small.

Memory: a path owns tables from its first draw on; once all P are drawn P-Adam holds 2 P and P-SAGA 3 P + 1 numbers
per weight, in the weights' dtype: P = 315, 604,106 float32 weights make 1.5 and 2.3 GB.
"""

import copy
import hashlib
import math
import weakref
from collections.abc import Callable, Iterator
from numbers import Real
from typing import Any, Protocol

import torch
from torch import Tensor
from torch import distributed as dist

from .checks import check_index, positive_int


class Paths(Protocol):
    """What the optimizers ask of a loss: the number of paths P and the path drawn last (None before any draw).

    One that also has `backward_passes`, as SCRAPLLoss does, is held to it: see `step`.
    """

    @property
    def n_paths(self) -> int: ...

    @property
    def path_idx(self) -> int | None: ...


def p_adam_(
    g: Tensor, m: Tensor, v: Tensor, k: int, tau: int, n_paths: int, betas: tuple[float, float], eps: float
) -> Tensor:
    """Move the drawn path's m and v on in place and return its update g_cur (eq. 6 to 8); all of one shape and dtype.

    On a path's first draw m, v and tau are 0, and g_cur is g / (|g| + eps), the sign of g.
    """
    decay_m, decay_v = (beta ** ((k - tau) / n_paths) for beta in betas)
    unbias_m, unbias_v = (1 - beta ** (k / n_paths) for beta in betas)
    m.lerp_(g, 1 - decay_m)  # eq. 6
    v.mul_(decay_v).addcmul_(g, g, value=1 - decay_v)  # eq. 7
    below = v.sqrt().mul_(unbias_m / math.sqrt(unbias_v)).add_(unbias_m * eps)
    return torch.div(m, below, out=below)  # eq. 8, above and below times 1 - b1^(k/P)


def _check_options(options: dict[str, Any]) -> None:
    betas = options["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"betas must be a pair of plain numbers such as (0.9, 0.999), got {betas!r}")
    numbers = [(name, options[name], math.inf) for name in ("lr", "eps", "weight_decay")]
    for name, value, limit in [*numbers, *((f"betas[{i}]", beta, 1) for i, beta in enumerate(betas))]:
        if isinstance(value, bool) or not isinstance(value, Real):  # reading a tensor would wait for its device
            raise TypeError(f"{name} must be a plain number such as 1e-5, got {value!r} ({type(value).__name__})")
        if not 0 <= value < limit:
            raise ValueError(f"{name} must be at least 0 and below {limit}, got {value}")


def _check_weight(w: Tensor, name: str) -> None:
    if w.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be float32 or float64, got {w.dtype}: compute under torch.autocast instead")


def _named(group: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    names = group.get("param_names", range(len(group["params"])))
    return ((f"weight {name!r} {tuple(w.shape)}", w) for name, w in zip(names, group["params"], strict=True))


def _kind_of_draws(paths: Any) -> dict[str, str]:
    """A mark of what the draws of a loss take; none for single paths, each in its place."""
    draws = getattr(paths, "draws", ())
    if all(tuple(draw) == (i,) for i, draw in enumerate(draws)):
        return {}
    return {"draws": hashlib.sha256(repr(draws).encode()).hexdigest()[:8]}


class PAdam(torch.optim.Optimizer):
    """Adam with moments of their own for every path (P-Adam, eq. 6 to 8) and decoupled weight decay.

    params: weights, or dicts of parameter groups; `lr`, `betas`, `eps`, `weight_decay` may differ by group.
    paths: anything with `n_paths` and `path_idx`, such as the SCRAPLLoss. The module's text has the equations, the
    memory needed and the scale to bring gradients to. With one path this is AdamW.
    Raises TypeError if `paths` lacks one of the two or an option is no plain number, ValueError for one out of range.

    state[w] of a weight tensor w: "k", the steps it took part in; "tau", {path: k of its last draw}, whose keys are
    Gamma; "table", {path: (m_p, v_p) or (m_p, v_p, ghat_p)}, each like w; P-SAGA's "ghat_sum", like w.
    A weight tensor without a gradient (frozen, unused) is skipped whole and its k stands still, so that it, like one
    that joins later by `add_param_group`, follows the equations over the steps it takes part in.

    process_group: the ranks that train together and must draw the same path; None, the default, is all of them. It is
    not copied with the optimizer.
    """

    n_rows = 2  # tensors that a path owns
    process_group: Any = None
    _booked: list[weakref.ref] = []  # gradients of the last step, until `zero_grad()`

    def __init__(
        self,
        params: Any,
        paths: Paths | None = None,  # needed; None is here for the error below to say what it is
        lr: float = 1e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        if not hasattr(paths, "n_paths") or not hasattr(paths, "path_idx"):
            raise TypeError(
                f"paths, the second argument, must have `n_paths` and `path_idx`, as SCRAPLLoss has; got {paths!r}. "
                f"Write {type(self).__name__}(model.parameters(), loss, lr=...)."
            )
        self.paths = paths
        self._done = self._n_backward()  # backward passes whose gradients were booked or dropped
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        mark = {"optimizer": type(self).__name__, "n_paths": positive_int("paths.n_paths", paths.n_paths)}
        # a state and the optimizer that loads it have these marks in common
        super().__init__(params, options | mark | _kind_of_draws(paths))

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"paths": self.paths, "_done": self._done}

    def _n_backward(self) -> int:
        return getattr(getattr(self.paths, "backward_passes", None), "n", 0)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; a group may have its own lr, betas, eps, weight_decay. Raises TypeError for an option that is no
        plain number and weights that are not float32 or float64, ValueError for an option out of range."""
        _check_options(self.defaults | param_group)
        super().add_param_group(param_group)
        group = self.param_groups.pop()
        for name, w in _named(group):
            _check_weight(w, name)
        self.param_groups.append(group)
        self._fill_state()

    def _fill_state(self) -> None:
        """Give each weight a state before its first step: torch.distributed.checkpoint would call step() for it."""
        for w in (w for group in self.param_groups for w in group["params"]):
            self.state[w] = {"k": 0, "tau": {}, "table": {}} | self.state[w]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch; gradients not stepped with (torch.amp.GradScaler leaves out steps) no longer count."""
        super().zero_grad(set_to_none)
        self._done, self._booked = self._n_backward(), []

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of the weights from `p.grad`, which stays as it is; returns what `closure()` returned, if given.

        Books the gradient under `paths.path_idx`. Several backward passes may add up to it (accumulation) if all are of
        that path. A refused step changes nothing; tables are made before anything moves. Nothing here waits for a CUDA
        device, so gradients there are not looked at and non-finite ones enter the tables for good: check the loss and
        stop before the step.

        Raises:
            RuntimeError: no path was drawn yet; with a SCRAPLLoss: since the last step or `zero_grad()` no gradient was
                computed, or one of another path, or those of the last step are still there; ranks drew different paths.
            TypeError, IndexError: the path is no integer in [0, P); a sparse gradient; a weight that changed its dtype
                or device. FloatingPointError: a gradient on the CPU that is not finite.
        """
        if torch.compiler.is_compiling():
            return torch.compiler.disable(type(self).step)(self, closure)
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        path, moves = self._path_of_all_ranks(), []
        for group in self.param_groups:
            _check_options(group)
            moves += [(w, self._gradient(w, name), group) for name, w in _named(group) if w.grad is not None]
        for w, _, _ in moves:
            self._make_tables(w, self.state[w], path)
        # but views, which DistributedDataParallel puts back in their places after zero_grad() of the model
        self._booked = [weakref.ref(w.grad) for w, _, _ in moves if w.grad._base is None]
        self._done = self._n_backward()
        for w, g, group in moves:
            state = self.state[w]
            k, tau = state["k"] + 1, state["tau"]
            m, v, *ghat = state["table"][path]
            g_cur = p_adam_(g, m, v, k, tau.get(path, 0), self.paths.n_paths, group["betas"], group["eps"])
            w.sub_(w, alpha=group["lr"] * group["weight_decay"])
            self._descend(w, group["lr"], k, state, g_cur, *ghat)
            state["k"] = tau[path] = k
        return result

    def _make_tables(self, w: Tensor, state: dict[str, Any], path: int) -> None:
        if path not in state["table"]:
            state["table"][path] = tuple(torch.zeros_like(w) for _ in range(self.n_rows))

    def _path_of_all_ranks(self) -> int:
        """The path to book, if every rank has one, and the same; else all ranks raise."""
        found: int | Exception
        try:
            found = self._path_to_book()
        except (RuntimeError, TypeError, IndexError) as error:
            found = error
        ranks = dist.get_world_size(self.process_group) if dist.is_available() and dist.is_initialized() else 1
        drawn: list = [None] * ranks
        if ranks > 1:
            dist.all_gather_object(drawn, found if isinstance(found, int) else str(found), group=self.process_group)
        if isinstance(found, Exception):
            raise found
        if ranks > 1 and len(set(drawn)) > 1:
            raise RuntimeError(
                f"the ranks drew different paths, {drawn}: give the losses of all ranks one seed and equal `probs`, "
                "and let none draw alone (in evaluation it may)"
            )
        return found

    def _path_to_book(self) -> int:
        path, name = self.paths.path_idx, f"{type(self).__name__}.step()"
        if path is None:
            raise RuntimeError(
                f"{name}: this optimizer's loss has drawn no path for training yet (path_idx is None). Call "
                "loss(x_hat, x) in training mode and backward() on its value first."
            )
        path = check_index("path_idx", path, self.paths.n_paths, "the loss has paths")
        passes = getattr(self.paths, "backward_passes", None)
        if passes is not None and passes.n <= self._done:
            raise RuntimeError(
                f"{name}: no backward pass went through this optimizer's loss since its last step or zero_grad(). Call "
                "the loss and backward() for every step; copy model, loss and optimizer in one deepcopy."
            )
        if passes is not None and (passes.path != path or passes.since > self._done + 1):
            raise RuntimeError(
                f"{name} would book under path {path} gradients that are not all of it. In one step call the loss "
                "again as loss(x_hat, x, path_idx=loss.path_idx) only, evaluate in loss.eval() or torch.no_grad(), and "
                "drop gradients by zero_grad() of the optimizer."
            )
        grads = {id(w.grad) for group in self.param_groups for w in group["params"] if w.grad is not None}
        if passes is not None and any(id(grad()) in grads for grad in self._booked):
            raise RuntimeError(
                f"{name} would book under path {path} gradients that the last step has booked already: call "
                "zero_grad() of the optimizer before every step's backward()"
            )
        return path

    def _gradient(self, w: Tensor, name: str) -> Tensor:
        _check_weight(w, name)
        if w.grad.layout != torch.strided:
            raise TypeError(f"{name} has a sparse gradient, must have a dense one: make its layer with sparse=False")
        if w.grad.device.type == "cpu" and not math.isfinite(w.grad.sum()):  # a sum of finite ones may overflow, too
            if n := int((~torch.isfinite(w.grad)).sum()):
                raise FloatingPointError(f"{name} has a gradient with {n} NaN or infinite values: look at the loss")
        for m, *_ in list(self.state[w]["table"].values())[:1]:
            if (m.dtype, m.device) != (w.dtype, w.device):
                raise TypeError(
                    f"{name} is {w.dtype} on {w.device} now, its tables are {m.dtype} on {m.device}: call "
                    "optimizer.load_state_dict(optimizer.state_dict()) after moving the model"
                )
        return w.grad.to(w.dtype)

    def _descend(self, w: Tensor, lr: float, k: int, state: dict[str, Any], g_cur: Tensor, *ghat: Tensor) -> None:
        """Move the weights by lr; P-SAGA has the path's ghat_p, too."""
        w.sub_(g_cur, alpha=lr)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on bit for bit from a copy of what `state_dict()` returned; `torch.load(weights_only=True)` reads it.

        Raises ValueError if it is no such state, another optimizer's, of other draws or of weights of other shapes.
        """
        name, n_paths, _ = own = tuple(self.defaults.get(key) for key in ("optimizer", "n_paths", "draws"))
        if not isinstance(state_dict, dict) or not state_dict.get("param_groups"):
            raise ValueError(f"expected what state_dict() of a {name} returned, got {state_dict!r:.80}")
        groups = state_dict["param_groups"]
        for found in (tuple(group.get(key) for key in ("optimizer", "n_paths", "draws")) for group in groups):
            if found[:2] == own[:2] and found != own:
                mend = "give the loss the `draw` that it was saved with"
                raise ValueError(f"the state is of a {name} whose draws took other paths: {mend}")
            if found != own:
                raise ValueError(
                    f"the state is of {found[0] or 'an optimizer without paths'} with {found[1]} paths, this is {name} "
                    f"with {n_paths}: take the optimizer and the loss (J, ..., Q_fr, draw) that it was saved with"
                )
        unknown = set(state_dict["state"]) - {w for group in groups for w in group["params"]}
        if unknown:
            raise ValueError(
                f"the state has entries {sorted(map(str, unknown))} of no weight: save and load it by torch"
            )
        saved, weights = ([w for group in some for w in group["params"]] for some in (groups, self.param_groups))
        for place, (key, w) in enumerate(zip(saved, weights)):
            shapes = {rows[0].shape for rows in state_dict["state"].get(key, {}).get("table", {}).values()}
            state = state_dict["state"].get(key, {})
            tau, k = state.get("tau", {}), state.get("k", 0)
            if max(tau.values(), default=0) != k or not set(tau) <= set(state.get("table", {})):
                raise ValueError(
                    f"weight {place} has taken {k} steps in the state, which lacks its tables: "
                    "torch.distributed.checkpoint.load fills only those that are there; torch.save keeps them all"
                )
            if shapes - {w.shape}:
                raise ValueError(
                    f"weight {place} has shape {tuple(shapes.pop())} in the state, {tuple(w.shape)} here: make the "
                    "optimizer with the weights that the state was saved with, in their order"
                )
        super().load_state_dict(copy.deepcopy(state_dict))
        self._fill_state()


class PSAGA(PAdam):
    """P-Adam whose updates are made less noisy by those of the other paths (P-SAGA, eq. 9); arguments as in PAdam.

    All paths that were drawn count alike: where weights hardly move between two draws of a path, how often it is drawn
    (`probs`) does not change the mean step, as it does with PAdam.

    The sum over Gamma is kept: the drawn path's old update goes out, the new one in. Both round, so it drifts; summing
    afresh every `SUM_AFRESH * P` steps, for 1 / SUM_AFRESH of a table read per step, bounds that. In float32 the mean
    then stays within 1e-5 of the true one (updates are of order 1).
    """

    n_rows = 3
    SUM_AFRESH = 16

    def _make_tables(self, w: Tensor, state: dict[str, Any], path: int) -> None:
        super()._make_tables(w, state, path)
        if "ghat_sum" not in state:
            state["ghat_sum"] = torch.zeros_like(w)

    def _descend(self, w: Tensor, lr: float, k: int, state: dict[str, Any], g_cur: Tensor, *ghat: Tensor) -> None:
        total = state["ghat_sum"]
        w.sub_(total, alpha=lr / max(1, len(state["tau"])))
        change = torch.sub(g_cur, *ghat)
        w.sub_(change, alpha=lr)
        ghat[0].copy_(g_cur)
        total.add_(change)
        if k % (self.SUM_AFRESH * self.paths.n_paths) == 0:
            total.zero_()
            for q in sorted(state["table"]):
                total.add_(state["table"][q][2])
