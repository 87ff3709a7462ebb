"""SCRAPL: scattering transform with random paths for machine learning (ICLR 2026), a replication."""

import time

__started_s__ = time.monotonic()  # of this process, but for the interpreter itself: the imports below take seconds

from .importance import theta_importance
from .jtfs import JTFS
from .losses import JTFSLoss, SCRAPLLoss
from .optim import PSAGA, PAdam

__all__ = ["JTFS", "PSAGA", "JTFSLoss", "PAdam", "SCRAPLLoss", "theta_importance"]
__version__ = "0.1.0"
