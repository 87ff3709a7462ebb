"""Never run: mypy checks these uses of the public names, with their types, against the library's signatures."""

from pathlib import Path
from typing import assert_type

from torch import Tensor, nn

from replication.jobs import ensure_runs
from replication.measures import audio_distances, drum_feature_distances, drum_features
from replication.records import Run, load_runs, read_run, run_folder
from replication.stats import mean_ci95, paired_comparison
from scrapl_lib import JTFS, PSAGA, JTFSLoss, PAdam, Scattering2D, ScatteringLoss, SCRAPLLoss, theta_importance
from scrapl_lib.jtfs import Path as ScatteringPath


class WindowLoss:
    """All that the optimizers ask of a loss of one's own."""

    n_paths = 3
    path_idx: int | None = None


class Octaves:
    """All that a loss asks of a transform of one's own."""

    n_paths = 3

    def path(self, x: Tensor, index: int) -> Tensor:
        return x[..., :: 2**index]

    def check(self, x: Tensor) -> None:
        pass


def transform_and_losses(x_hat: Tensor, x: Tensor, encoder: nn.Module) -> None:
    jtfs = JTFS(shape=32768, J=12, Q1=8, Q2=2, J_fr=3, Q_fr=2, T="global", F=None)
    assert_type(jtfs.paths[0], ScatteringPath)
    assert_type(jtfs.path(x, 0), Tensor)
    loss = SCRAPLLoss(shape=32768, J=12, Q1=8, Q2=2, J_fr=3, Q_fr=2, T=None, F=1, log1p=True)
    assert_type(loss.n_paths, int)
    assert_type(loss.probs, Tensor)
    assert_type(loss.path_idx, int | None)
    assert_type(loss.draw(), int)
    JTFSLoss(shape=32768)(x_hat, x)
    for transform in (Octaves(), Scattering2D(shape=(48, 64), J=3, L=8), jtfs):
        assert_type(SCRAPLLoss(transform=transform, draw="path").n_paths, int)
        ScatteringLoss(transform, log1p=True)(x_hat, x)
    PAdam(encoder.parameters(), loss, lr=1e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01).step()
    optimizer = PSAGA(encoder.parameters(), loss, lr=1e-5)
    optimizer.zero_grad()
    optimizer.step()
    PSAGA(encoder.parameters(), WindowLoss(), lr=1e-5)
    found = theta_importance(loss, encoder, lambda theta: theta, x, list(encoder.parameters()), n_iter=20, tol=1e-4)
    assert_type(found.curvature, Tensor)
    loss.probs = found.probs


def evidence(x_hat: Tensor, x: Tensor) -> None:
    assert_type(mean_ci95([1.0, 2.0]), tuple[float, float])
    assert_type(paired_comparison([1.0, 2.0], [2.0, 3.0]), tuple[float, float, float])
    assert_type(audio_distances(x_hat, x, ["jtfs"]), dict[str, float])
    assert_type(drum_features(x, 44100), dict[str, Tensor])
    assert_type(drum_feature_distances(x_hat, x, 44100), dict[str, float])
    assert_type(read_run(run_folder("quick", "granular", "scrapl", 0)), Run)
    assert_type(load_runs("quick", "granular", None, Path("fresh")), list[Run])
    assert_type(ensure_runs(["granular"], ["scrapl"], [0], "quick"), list[Run])
