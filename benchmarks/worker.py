"""One side of bench_single_path.py: `python worker.py ours|scrapl-loss|memory THREADS`, in that side's own interpreter.

ours, scrapl-loss: reads a path index a line, answers with a JSON line: milliseconds of forward and backward with
respect to x_hat, and the loss. memory: one forward and backward of the full JTFS; answers with the peak resident MiB and
the one before it. The granular configuration, a batch of 4, seeded noise of unit norm.
"""

import json
import logging
import resource
import sys
import time

import torch

CONFIG = {"shape": 32768, "J": 12, "Q1": 8, "Q2": 2, "J_fr": 3, "Q_fr": 2}
BATCH = 4


def audio(seed: int) -> torch.Tensor:
    x = torch.randn(BATCH, 1, CONFIG["shape"], generator=torch.Generator().manual_seed(seed))
    return x / x.norm(dim=-1, keepdim=True)


def resident_mib() -> float:
    """The largest resident size so far; the system counts it in bytes on macOS, in KiB elsewhere."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def main() -> None:
    side = sys.argv[1]
    torch.set_num_threads(int(sys.argv[2]))
    x_hat, x = audio(1).requires_grad_(), audio(2)
    if side == "scrapl-loss":
        from scrapl import SCRAPLLoss

        logging.disable()
        loss = SCRAPLLoss(**CONFIG, grad_mult=1.0, use_p_adam=False, use_p_saga=False)
    else:
        from scrapl_lib.losses import JTFSLoss, SCRAPLLoss

        loss = (JTFSLoss if side == "memory" else SCRAPLLoss)(**CONFIG)
    if side == "memory":
        before = resident_mib()
        loss(x_hat, x).backward()
        print(json.dumps({"peak_mib": resident_mib(), "before_mib": before}))
        return
    for line in sys.stdin:
        x_hat.grad = None
        start = time.perf_counter()
        value = loss(x_hat, x, path_idx=int(line))
        value.backward()
        ms = 1e3 * (time.perf_counter() - start)
        print(json.dumps({"ms": ms, "loss": value.item()}), flush=True)


if __name__ == "__main__":
    main()
