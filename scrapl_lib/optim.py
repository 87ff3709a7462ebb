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

Memory: a path owns tables from its first draw on; once all P paths are drawn P-Adam holds 2 P and P-SAGA 3 P numbers
per weight (P-SAGA one more for the sum), in the weights' dtype: P = 315, 604,106 float32 weights make 1.5 and 2.3 GB.
"""

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any, Protocol

import torch
from torch import Tensor


class Paths(Protocol):
    """What the optimizers ask of a loss: the number of paths P and the path drawn last (None before any draw)."""

    @property
    def n_paths(self) -> int: ...

    @property
    def path_idx(self) -> int | None: ...


def add_p_adam_update_(
    out: Sequence[Tensor],
    g: Sequence[Tensor],
    m: Sequence[Tensor],
    v: Sequence[Tensor],
    k: int,
    tau: int,
    n_paths: int,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """One P-Adam update (eq. 6 to 8) of one path: m and v move on in place, and g_cur is added to `out`.

    The four lists run over weight tensors; tensors at the same place are contiguous and share shape, dtype and device.
    tau is 0 on the path's first draw, when m and v are zero; g_cur is then g / (|g| + eps), the sign of g.

    torch's fused Adam kernel makes it one pass over memory. Given beta^a for beta and one for its step it divides the
    moments by 1 - beta^a, where eq. 8 wants 1 - beta^(k/P); the ratios of the two go into its learning rate and eps.
    """
    decay = [beta ** ((k - tau) / n_paths) for beta in betas]
    ratio_m, ratio_v = ((1 - d) / (1 - beta ** (k / n_paths)) for d, beta in zip(decay, betas, strict=True))
    scale = 1 / math.sqrt(ratio_v)
    kernel = {"lr": -ratio_m * scale, "beta1": decay[0], "beta2": decay[1], "eps": eps * scale, "weight_decay": 0.0}
    step = [torch.ones((), device=g[0].device)] * len(g)
    torch._fused_adam_(out, g, m, v, [], step, **kernel, amsgrad=False, maximize=False)


def _is_number(value: Any) -> bool:
    """No tensor: reading one would wait for its device."""
    return isinstance(value, Real) and not isinstance(value, bool)


def _said(value: Any) -> str:
    return f"{value!r} ({type(value).__name__})"


class _PathOptimizer(torch.optim.Optimizer):
    """Keeps k, tau and the tables of every weight tensor and hands them, with its gradient, to the update rule.

    state[w] of a weight tensor w: "k", the steps it took part in; "tau", {path: k of its last draw}, whose keys are
    Gamma; "table", {path: (m_p, v_p) or (m_p, v_p, ghat_p)}, each like w; P-SAGA's "ghat_sum", like w.
    A weight tensor without a gradient (frozen, unused) is skipped whole and its k stands still, so that it, like one
    that joins later by `add_param_group`, follows the equations over the steps it takes part in.

    A subclass has `_update(group, weights, grads, tables, states, k, tau, n_drawn)`, which moves the weights and the drawn
    path's tables, given as n_rows lists; n_drawn = |Gamma| before this step.
    """

    n_rows: int
    keeps_sum: bool

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
        if not isinstance(paths.n_paths, Integral) or paths.n_paths < 1:
            raise ValueError(f"paths.n_paths must be an integer of at least 1, got {paths.n_paths!r}")
        self.paths = paths
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"paths": self.paths}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; a group may have its own lr, betas, eps, weight_decay: TypeError for one that is no plain number,
        ValueError for one out of range."""
        options = self.defaults | param_group
        for name in ("lr", "eps", "weight_decay"):
            if not _is_number(options[name]):
                raise TypeError(f"{name} must be a plain number such as 1e-5, got {_said(options[name])}")
            if not 0 <= options[name] < math.inf:
                raise ValueError(f"{name} must be a finite number of at least 0, got {options[name]}")
        if not isinstance(options["betas"], (tuple, list)) or not all(map(_is_number, options["betas"])):
            raise TypeError(
                f"betas must be a pair of plain numbers such as (0.9, 0.999), got {_said(options['betas'])}"
            )
        if len(options["betas"]) != 2 or not all(0 <= beta < 1 for beta in options["betas"]):
            raise ValueError(f"betas must be two numbers of at least 0 and below 1, got {options['betas']}")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of the weights from `p.grad`, which stays as it is; returns what `closure()` returned, if given.

        Reads `paths.path_idx`: it must still be the path whose loss `backward()` was called on: make no other call of
        the loss in between. Nothing here waits for a CUDA device, hence non-finite gradients are not looked for:
        they enter the tables for good. Check the loss and stop before the step.
        Raises RuntimeError if no path was drawn yet, TypeError or IndexError if the path is no integer in [0, P).
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        path = self._drawn_path()
        for group in self.param_groups:
            alike = defaultdict(list)  # weight tensors that go through one call of the update rule
            for w in group["params"]:
                if w.grad is not None:
                    state = self._state_of(w, path)
                    state["k"] += 1
                    alike[w.device, w.dtype, state["k"], state["tau"].get(path, 0), len(state["tau"])].append(w)
            for (_, _, k, tau, n_drawn), weights in alike.items():
                states = [self.state[w] for w in weights]
                grads = [w.grad.contiguous() for w in weights]
                tables = list(zip(*(state["table"][path] for state in states), strict=True))
                self._update(group, weights, grads, tables, states, k, tau, n_drawn)
                for state in states:
                    state["tau"][path] = k
        return result

    def _drawn_path(self) -> int:
        path, n_paths = self.paths.path_idx, self.paths.n_paths
        if path is None:
            raise RuntimeError(
                f"{type(self).__name__}.step() was called before any path was drawn (path_idx is None). Call "
                "loss(x_hat, x) and backward() on its value first, with the loss that this optimizer was made with."
            )
        if not isinstance(path, Integral):
            raise TypeError(f"path_idx must be an integer or None, got {path!r} of type {type(path).__name__}")
        if not 0 <= path < n_paths:
            raise IndexError(f"path_idx must lie in [0, {n_paths}), the range of the loss's paths; got {path}")
        return int(path)

    def _state_of(self, w: Tensor, path: int) -> dict[str, Any]:
        state = self.state[w]
        if not state:
            state.update({"k": 0, "tau": {}, "table": {}})
            if self.keeps_sum:
                state["ghat_sum"] = torch.zeros_like(w)
        if path not in state["table"]:
            state["table"][path] = torch.zeros((self.n_rows, *w.shape), dtype=w.dtype, device=w.device).unbind()
        return state

    def state_dict(self) -> dict[str, Any]:
        """As in torch, plus "optimizer" (the class's name) and "n_paths"; torch.load(weights_only=True) reads it."""
        return super().state_dict() | {"optimizer": type(self).__name__, "n_paths": int(self.paths.n_paths)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on bit for bit from a copy of `state_dict` (so the tables are held twice until you drop yours).

        Raises ValueError if it is no such state, another optimizer's, of another P or of weights of other shapes.
        """
        if not isinstance(state_dict, dict):
            raise ValueError(
                f"expected what state_dict() of a {type(self).__name__} returned, got {type(state_dict).__name__}"
            )
        name, n_paths = state_dict.get("optimizer"), state_dict.get("n_paths")
        if name != type(self).__name__:
            raise ValueError(
                f"the state is of {name or 'an optimizer that keeps no paths'}, but this is {type(self).__name__}: "
                "load it into an optimizer of its own class, or start this one afresh"
            )
        if n_paths != self.paths.n_paths:
            raise ValueError(
                f"the state has {n_paths} paths, but the loss of this optimizer has {self.paths.n_paths}: give it "
                "the settings (J, Q1, Q2, J_fr, Q_fr) that the state was saved with, or start the optimizer afresh"
            )
        saved, own = (
            [w for group in groups for w in group["params"]]
            for groups in (state_dict["param_groups"], self.param_groups)
        )
        for place, (key, w) in enumerate(zip(saved, own)):
            for rows in state_dict["state"].get(key, {}).get("table", {}).values():
                if rows[0].shape != w.shape:
                    raise ValueError(
                        f"the state's weight tensor {place} has shape {tuple(rows[0].shape)}, that of this optimizer {tuple(w.shape)}: "
                        "give it the weights that the state was saved with, in their order, or start the optimizer afresh"
                    )
        super().load_state_dict(copy.deepcopy(state_dict))


class PAdam(_PathOptimizer):
    """Adam with moments of their own for every path (P-Adam, eq. 6 to 8) and decoupled weight decay.

    params: weights, or dicts of parameter groups; `lr`, `betas`, `eps`, `weight_decay` may differ by group.
    paths: anything with `n_paths` and `path_idx`, such as the SCRAPLLoss. The module's text has the equations, the
    memory needed and the scale to bring gradients to. With one path this is AdamW.
    Raises TypeError if `paths` lacks one of the two or an option is no plain number, ValueError for one out of range.
    """

    n_rows = 2
    keeps_sum = False

    def _update(self, group, weights, grads, tables, states, k, tau, n_drawn):
        m, v = tables
        g_cur = [torch.zeros_like(g) for g in grads]
        add_p_adam_update_(g_cur, grads, m, v, k, tau, self.paths.n_paths, group["betas"], group["eps"])
        torch._foreach_add_(weights, weights, alpha=-group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, g_cur, alpha=-group["lr"])


class PSAGA(_PathOptimizer):
    """P-Adam whose updates are made less noisy by those of the other paths (P-SAGA, eq. 9); arguments as in PAdam.

    The sum over Gamma is kept, not taken: the drawn path's old update goes out and the new one in. Each of the two
    rounds once, so the kept sum drifts from the true one; summing afresh every `SUM_AFRESH * P` steps bounds that for
    runs of any length, for 1 / SUM_AFRESH of a table read per step. In float32 the mean then stays within 1e-5 of
    the true one (updates are of order 1).
    """

    n_rows = 3
    keeps_sum = True
    SUM_AFRESH = 16

    def _update(self, group, weights, grads, tables, states, k, tau, n_drawn):
        m, v, ghat = tables
        lr, n_paths = group["lr"], self.paths.n_paths
        total = [state["ghat_sum"] for state in states]
        torch._foreach_add_(weights, weights, alpha=-lr * group["weight_decay"])
        torch._foreach_add_(weights, total, alpha=-lr / max(1, n_drawn))
        torch._foreach_add_(weights, ghat, alpha=lr)
        torch._foreach_sub_(total, ghat)
        torch._foreach_zero_(ghat)
        add_p_adam_update_(ghat, grads, m, v, k, tau, n_paths, group["betas"], group["eps"])  # ghat is g_cur now
        torch._foreach_add_(weights, ghat, alpha=-lr)
        torch._foreach_add_(total, ghat)
        if k % (self.SUM_AFRESH * n_paths) == 0:
            for state in states:
                state["ghat_sum"].zero_()
                for q in sorted(state["table"]):
                    state["ghat_sum"].add_(state["table"][q][2])
