"""SCRAPL: scattering transform with random paths for machine learning (ICLR 2026), a replication."""

from .importance import theta_importance
from .jtfs import JTFS
from .losses import JTFSLoss, SCRAPLLoss
from .optim import PSAGA, PAdam

__all__ = ["JTFS", "PSAGA", "JTFSLoss", "PAdam", "SCRAPLLoss", "theta_importance"]
__version__ = "0.1.0"
