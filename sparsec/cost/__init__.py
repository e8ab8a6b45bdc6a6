"""The cost model: what a product will take with each kernel on this machine, from a short calibration."""

from sparsec.cost.calibration import Calibration, Found, calibrate
from sparsec.cost.model import KernelCost, Prediction, Work

__all__ = ["Calibration", "Found", "KernelCost", "Prediction", "Work", "calibrate"]
