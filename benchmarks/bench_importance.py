"""theta-importance sampling's cost per path, ours against the warm-up of scrapl-loss 0.1.0, and their values.

Granular configuration: default transform, synthesizer and encoder (604,106 weights), one batch, the same weights, audio
and seeds on both sides. Each side runs in an interpreter of its own (the authors' package cannot live beside kymatio),
one after the other path by path; the other waits meanwhile. Prints a line per path, writes results/bench/importance.csv
and .json. The authors' warm-up takes minutes per path and holds the graph of the whole batch: mind --batch. Where two
eigenvalues of nearly equal size and opposite sign compete (path 301 at batch 2: +2.8e-3 and -2.6e-3) it stops early and
returns less; ours does not.
"""

import argparse
import json
import logging
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]


def resident_mib() -> float:
    """The largest resident size so far; the system counts it in bytes on macOS, in KiB elsewhere."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def peer(data: dict, n_iter: int):
    """path -> curvature of each parameter, by the authors' package."""
    from scrapl import SCRAPLLoss

    from replication.encoder import Encoder
    from scrapl_lib.synths import GranularSynth

    logging.disable()
    encoder, synth = Encoder().eval(), GranularSynth()
    encoder.load_state_dict(data["weights"])
    draw = synth.draw(data["seeds"])
    loss = SCRAPLLoss(shape=32768, J=12, Q1=8, Q2=2, J_fr=3, Q_fr=2, n_theta=2)
    params = list(encoder.parameters())
    return lambda p: loss.calc_theta_eigs(
        p,
        lambda x, features: encoder(features),
        lambda theta: synth.render(theta, *draw),
        {"x": data["x"], "features": data["features"]},
        params,
        n_iter=n_iter,
    )


def ours(data: dict, n_iter: int):
    """path -> curvature of each parameter, by this library; what is shared by all paths is made anew each time."""
    from replication.encoder import Encoder
    from scrapl_lib import SCRAPLLoss, theta_importance
    from scrapl_lib.synths import GranularSynth

    encoder, synth, loss = Encoder().eval(), GranularSynth(), SCRAPLLoss()
    encoder.load_state_dict(data["weights"])
    return lambda p: theta_importance(
        loss,
        lambda x: encoder(encoder.features(x)),
        lambda theta: synth(theta, data["seeds"]),
        data["x"],
        encoder.parameters(),
        n_iter=n_iter,
        paths=[p],
    ).curvature[:, p]


def worker(side: str, file: str, threads: int, n_iter: int) -> None:
    torch.set_num_threads(threads)
    compute = {"ours": ours, "peer": peer}[side](torch.load(file, weights_only=True), n_iter)
    out, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        start = time.perf_counter()
        values = compute(int(line)).tolist()
        answer = {"seconds": time.perf_counter() - start, "values": values, "peak_mib": resident_mib()}
        print(json.dumps(answer), file=out, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", default=str(ROOT / ".venv-peers/bin/python"), help="an interpreter with scrapl-loss")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--paths", type=int, nargs="+", default=[25, 130, 220, 301])
    parser.add_argument("--n-iter", type=int, default=20)
    parser.add_argument("--output", type=Path, default=ROOT)
    parser.add_argument("--side", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        return worker(*args.side, args.threads, args.n_iter)
    if not Path(args.peers).exists():
        raise SystemExit(f"no interpreter {args.peers}: run `make peers` first")
    from replication.data import ThetaGrid, meso_seeds
    from replication.encoder import Encoder
    from replication.files import write_csv, write_text_atomic
    from replication.records import provenance, utc_now
    from scrapl_lib.synths import GranularSynth

    torch.manual_seed(0)
    encoder, grid = Encoder().eval(), ThetaGrid()
    items = grid.batches("train", args.batch)[0]
    with torch.no_grad():
        x = GranularSynth()(grid.theta[items], grid.seed[items])
    data = {
        "weights": encoder.state_dict(),
        "x": x,
        "features": encoder.features(x),
        "seeds": meso_seeds(0, 1, args.batch),
    }
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "data.pt")
        torch.save(data, file)

        def log(side: str) -> Path:
            return Path(folder) / f"{side}.log"

        workers = {
            side: subprocess.Popen(
                [python, __file__, "--side", side, file, "--threads", str(args.threads), "--n-iter", str(args.n_iter)],
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=open(log(side), "w"),
                env={**os.environ, "PYTHONPATH": str(ROOT)},  # our packages are not installed beside the authors'
                start_new_session=True,  # the authors' progress bar asks the terminal for its width: not in background
            )
            for side, python in {"ours": sys.executable, "peer": args.peers}.items()
        }
        for p in args.paths:
            row = {"path_idx": p}
            for side, process in workers.items():
                print(p, file=process.stdin, flush=True)
                if not (line := process.stdout.readline()):
                    raise SystemExit(
                        f"{side} ended with exit status {process.wait()} at path {p}:\n{log(side).read_text()[-3000:]}"
                    )
                answer = json.loads(line)
                row |= {f"{side}_s": answer["seconds"], f"{side}_peak_mib": answer["peak_mib"]}
                row |= {f"{side}_curvature_{u}": value for u, value in enumerate(answer["values"])}
            row["times_faster"] = row["peer_s"] / row["ours_s"]
            for u in range(2):
                row[f"difference_{u}"] = abs(abs(row[f"peer_curvature_{u}"]) / row[f"ours_curvature_{u}"] - 1)
            rows.append(row)
            print(
                "path {path_idx:3d}: {ours_s:6.1f} s ours, {peer_s:6.1f} s scrapl-loss, {times_faster:5.1f} times "
                "faster; values {ours_curvature_0:.4g} {ours_curvature_1:.4g}, "
                "{peer_curvature_0:.4g} {peer_curvature_1:.4g}".format_map(row),
                flush=True,
            )
        for process in workers.values():
            process.communicate()
    import pandas as pd

    table = pd.DataFrame(rows)
    summary = {
        "times_faster": {name: getattr(table["times_faster"], name)() for name in ("median", "min", "max")},
        "largest_difference": table[["difference_0", "difference_1"]].to_numpy().max(),
        **{f"{side}_peak_mib": table[f"{side}_peak_mib"].max() for side in workers},
        **{"batch": args.batch, "threads": args.threads, "n_iter": args.n_iter},
        **{key: value for key, value in provenance("cpu").items() if key != "peak_memory_mb"},
        "end_utc": utc_now(),
    }
    folder = args.output / "results/bench"
    write_csv(folder / "importance.csv", table)
    write_text_atomic(folder / "importance.json", json.dumps(summary, indent=1, sort_keys=True, allow_nan=False) + "\n")
    print(
        json.dumps(summary["times_faster"]),
        f"largest difference {summary['largest_difference']:.1%}; written: {folder}",
    )


if __name__ == "__main__":
    main()
