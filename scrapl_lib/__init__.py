"""SCRAPL: scattering transform with random paths for machine learning (ICLR 2026), a replication."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .importance import theta_importance
    from .jtfs import JTFS
    from .losses import JTFSLoss, SCRAPLLoss
    from .optim import PSAGA, PAdam
    from .scattering2d import Scattering2D
    from .transforms import ScatteringLoss

__all__ = ["JTFS", "PSAGA", "JTFSLoss", "PAdam", "SCRAPLLoss", "Scattering2D", "ScatteringLoss", "theta_importance"]
__version__ = "0.1.0"

_HOME = {
    "JTFS": "jtfs",
    "JTFSLoss": "losses",
    "SCRAPLLoss": "losses",
    "PAdam": "optim",
    "PSAGA": "optim",
    "Scattering2D": "scattering2d",
    "ScatteringLoss": "transforms",
    "theta_importance": "importance",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: checks and synthesizers need no kymatio."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
