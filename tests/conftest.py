"""Fixtures that several test files share."""

import pytest

from scrapl_lib import training


@pytest.fixture
def computed_here(monkeypatch):
    """Missing runs are computed in this process instead of in workers; lists (method, seed) of them."""
    configs = []

    def run_all(missing, output, device, n_workers, budget, deterministic):
        configs.extend((config.method, config.seed) for config in missing)
        for config in missing:
            training.train(config, output, device)

    monkeypatch.setattr(training, "_run_all", run_all)
    return configs
