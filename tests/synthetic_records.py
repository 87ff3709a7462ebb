"""Records of a made-up outcome, written with `write_run`, for the tests of tables, claims and figures."""

import pandas as pd
import torch

from replication import records
from replication.path_probabilities import write_importance as write_curvature
from replication.tasks import CHIRPLETS, importance_config
from scrapl_lib.losses import SCRAPLLoss

NOT_RUN = {
    "scrapl": "needs theta-importance sampling, not built yet",
    "ms_clap": "weights unavailable",
    "panns_wavegram_logmel": "weights unavailable",
}
OUTCOME = {  # method: test density and slope L1 (per mille), total variation, convergence step, ms per step, seeds
    "p_loss": (40, 20, 1.8, 100, 20, 5),
    "jtfs": (90, 36, 5.0, 200, 600, 3),
    "scrapl_no_theta_is": (140, 70, 3.4, 500, 46, 5),
    "scrapl_padam": (190, 90, 7.0, 600, 44, 5),
    "scrapl_plain": (260, 110, 5.0, 900, 43, 5),
    "mss_linear": (500, 243, 2.0, None, 25, 5),
    "mss_log_linear": (300, 241, 2.0, None, 27, 5),
    "mss_revisited": (380, 246, 2.0, None, 26, 5),
    "mss_random": (180, 242, 2.0, None, 32, 5),
}
STEPS = (0, 50, 100, 150)


def spread(seed):
    """A factor per seed: 0.96, 0.98, 1, 1.02, 1.04; its population std over seeds 0 to 4 is 0.02 sqrt(2)."""
    return 1 + 0.02 * (seed - 2)


def _write(place, output, test, curves, ms=None, status="ok", **config):
    """Write one run; curves: metric -> where its validation errors end, from 400. Returns its folder."""
    profile, task, method, seed = place
    folder = records.run_folder(*place, output)
    history = [
        (step, "val", metric, spread(seed) * (last + (400 - last) / (1 + step)), step / 10)
        for step in STEPS
        for metric, last in curves.items()
    ]
    rows = [(metric, value, "") for metric, value in test.items()]
    records.write_run(
        folder,
        status=status,
        config={"method": method, "seed": seed, "n_samples": 8192} | config,
        start_utc=records.utc_now(),
        device="cpu",
        threads=1,
        history=pd.DataFrame(history, columns=records.COLUMNS["history.csv"]),
        test=pd.DataFrame(rows, columns=records.COLUMNS["test.csv"]).astype({"value": float}),
        train_step_ms=ms and {"median": spread(seed) * ms, "q25": ms, "q75": ms, "n": 100},
    )
    return folder


def write(output, method, seed, status="ok", profile="quick", **change):
    """Write one run of the granular task; `change` replaces test values by metric. Returns its folder."""
    density, slope, variation, convergence, ms, _ = OUTCOME[method]
    theta, k = (density + slope) / 2, spread(seed)
    test = {"theta_synth_l1": k * theta, "theta_density_l1": k * density, "theta_slope_l1": k * slope}
    test |= {"val_total_variation": k * variation, "val_convergence_steps": convergence and k * convergence}
    test |= {"jtfs_distance": 2e-5 * k * theta} | change
    curves = {"theta_synth_l1": theta, "theta_slope_l1": slope}
    return _write((profile, "granular", method, seed), output, test, curves, ms, status, grid_size=16)


def write_all(output, methods=OUTCOME):
    """All seeds of the given methods."""
    for method in methods:
        for seed in range(OUTCOME[method][-1]):
            write(output, method, seed)


def write_chirplet(output, task, method, seed, am, fm, am_steps=100, fm_steps=200, status="ok", profile="quick"):
    """Write one run of a chirplet task: test errors in per mille, times `spread`; steps None: never converged."""
    test = {"theta_synth_l1": (am + fm) / 2, "theta_am_l1": am, "theta_fm_l1": fm}
    test |= {"theta_am_convergence_steps": am_steps, "theta_fm_convergence_steps": fm_steps}
    test = {metric: spread(seed) * value for metric, value in test.items() if value is not None}
    curves = {"theta_am_l1": am, "theta_fm_l1": fm}
    _write((profile, task, method, seed), output, test, curves, status=status, grid_size=16)


def write_everything(output):
    """Granular runs, of which one failed and four never converged. Chirplets: in the first task theta-IS takes AM from
    100 to 60, a seed never converges in FM, and one failed."""
    write_all(output)
    write(output, "mss_random", 4, status="failed:nonfinite loss at step 7")
    for method, seed in (("scrapl_plain", 4), ("jtfs", 0), ("jtfs", 1), ("jtfs", 2)):
        write(output, method, seed, val_convergence_steps=None)
    slow, moderate, *_ = CHIRPLETS
    for seed in range(5):
        write_chirplet(output, slow, "scrapl_no_theta_is", seed, 100, 80, 500, None if seed == 1 else 400)
        write_chirplet(output, slow, "scrapl", seed, 60, 80, 300, 300, status="ok" if seed else "failed:nonfinite")
    write_chirplet(output, moderate, "scrapl_no_theta_is", 0, 90, 70, None, None)


def load(output, profile="quick", tasks=("granular",)):
    return [run for task in tasks for run in records.load_runs(profile, task, None, output)]


def write_importance(output, task="granular"):
    """Record path probabilities, those of a curvature of 1 + path index. Returns the folder."""
    config = importance_config(task, "smoke")
    folder = records.run_folder("smoke", task, records.IMPORTANCE, 0, output)
    found = torch.arange(1.0, SCRAPLLoss(**config.transform()).n_paths + 1).expand(2, -1)
    write_curvature(folder, config, found, records.utc_now(), "cpu")
    return folder
