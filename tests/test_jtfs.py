"""The transform against the official values, a literal double loop, and its own properties."""

import math

import numpy as np
import pytest
import torch

from scrapl_lib.jtfs import JTFS, ALPHA, R_PSI, SIGMA0, modulus
from scrapl_lib import jtfs as jtfs_module
from scrapl_lib import JTFSLoss, SCRAPLLoss
