"""Records of a made-up outcome, written with `write_run`, for the tests of tables, claims and figures."""

import pandas as pd
import torch

from replication import published as paper
from replication import records
from replication.path_probabilities import write_importance as write_curvature
from replication.tasks import importance_config
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


def write(output, method, seed, status="ok", profile="quick", **change):
    """Write one run; `change` replaces test values by metric. Returns its folder."""
    density, slope, variation, convergence, ms, _ = OUTCOME[method]
    k = spread(seed)
    test = {
        "theta_synth_l1": k * (density + slope) / 2,
        "theta_density_l1": k * density,
        "theta_slope_l1": k * slope,
        "val_total_variation": k * variation,
        "val_convergence_steps": convergence and k * convergence,
        "jtfs_distance": 1e-5 * k * (density + slope),
        **change,
    }
    history = [
        (step, "val", metric, k * (last + (400 - last) / (1 + step)), ms / 1000 * step)
        for step in STEPS
        for metric, last in (("theta_synth_l1", (density + slope) / 2), ("theta_slope_l1", slope))
    ]
    folder = records.run_folder(profile, "granular", method, seed, output)
    records.write_run(
        folder,
        status=status,
        config={"method": method, "seed": seed, "grid_size": 16, "n_samples": 8192},
        start_utc=records.utc_now(),
        device="cpu",
        threads=1,
        history=pd.DataFrame(history, columns=records.COLUMNS["history.csv"]),
        test=pd.DataFrame([(m, v, "") for m, v in test.items()], columns=records.COLUMNS["test.csv"]).astype(
            {"value": float}
        ),
        train_step_ms={"median": k * ms, "q25": ms, "q75": ms, "n": 100},
    )
    return folder


def write_all(output, methods=OUTCOME):
    """All seeds of the given methods."""
    for method in methods:
        for seed in range(OUTCOME[method][-1]):
            write(output, method, seed)


def write_chirplet(output, task, method, seed, am, fm, am_steps=100, fm_steps=200, status="ok", profile="quick"):
    """Write one run of a chirplet task: test errors in per mille, times `spread`; steps None: never converged."""
    k = spread(seed)
    test = {
        "theta_synth_l1": k * (am + fm) / 2,
        "theta_am_l1": k * am,
        "theta_fm_l1": k * fm,
        "theta_am_convergence_steps": am_steps and k * am_steps,
        "theta_fm_convergence_steps": fm_steps and k * fm_steps,
    }
    history = [
        (step, "val", metric, k * (last + (400 - last) / (1 + step)), step / 10)
        for step in STEPS
        for metric, last in (("theta_am_l1", am), ("theta_fm_l1", fm))
    ]
    records.write_run(
        records.run_folder(profile, task, method, seed, output),
        status=status,
        config={"method": method, "seed": seed, "grid_size": 16, "n_samples": 8192},
        start_utc=records.utc_now(),
        device="cpu",
        threads=1,
        history=pd.DataFrame(history, columns=records.COLUMNS["history.csv"]),
        train_step_ms=None,
        test=pd.DataFrame(
            [(m, v, "") for m, v in test.items() if v is not None], columns=records.COLUMNS["test.csv"]
        ).astype({"value": float}),
    )


def write_drums(output, task, method, seed, loudness, jtfs=1.0, profile="quick"):
    """Write one run of a TR-808 task, times `spread`: transient loudness in dB, a tenth of it in the decay, JTFS distance."""
    k = spread(seed)
    test = {
        "jtfs_distance": k * jtfs,
        "mss_log_linear_distance": k,
        "transient_loudness_l1": k * loudness,
        "decay_loudness_l1": k * loudness / 10,
        "transient_spectral_centroid_l1": k * loudness,
        "frechet_log_mel": 5 * k,
    }
    records.write_run(
        records.run_folder(profile, task, method, seed, output),
        status="ok",
        config={"method": method, "seed": seed, "n_samples": 8192},
        start_utc=records.utc_now(),
        device="cpu",
        threads=1,
        train_step_ms=None,
        history=pd.DataFrame([(0, "val", "loss", 1.0, 0.0)], columns=records.COLUMNS["history.csv"]),
        test=pd.DataFrame([(m, v, "") for m, v in test.items()], columns=records.COLUMNS["test.csv"]),
    )


def load_drums(output, profile="quick"):
    return [run for task in paper.TR808 for run in records.load_runs(profile, task, None, output)]


def load_chirplets(output, profile="quick"):
    return [run for task in paper.CHIRPLETS for run in records.load_runs(profile, task, None, output)]


def load(output, profile="quick"):
    return records.load_runs(profile, "granular", None, output)


def write_importance(output, task="granular", profile="smoke", curvature=None, **changes):
    """Record path probabilities; by default those of a curvature of 1 + path index. Returns the folder."""
    config = importance_config(task, profile, **changes)
    n_paths = SCRAPLLoss(**config.transform()).n_paths
    folder = records.run_folder(profile, task, records.IMPORTANCE, 0, output)
    found = torch.arange(1.0, n_paths + 1).expand(2, -1) if curvature is None else curvature
    write_curvature(folder, config, found, records.utc_now(), "cpu")
    return folder
