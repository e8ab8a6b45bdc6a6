"""The cost model: what a product will take with each kernel on this machine, from constants that are measured in some seconds."""

from sparsec.cost.constants import Constants, Found, machine_constants
from sparsec.cost.model import KernelCost, Prediction, Work

__all__ = ["Constants", "Found", "KernelCost", "Prediction", "Work", "machine_constants"]
