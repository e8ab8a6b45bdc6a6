"""Calibration of pruning: what every linear of a model is given, block by block, on some text."""

from sparsec.calibrate.data import LENGTH, SEQUENCES, CalibrationData, samples, strings, windows
from sparsec.calibrate.sites import Site
from sparsec.calibrate.standing import Standing
from sparsec.calibrate.statistics import Statistics
from sparsec.calibrate.walk import FEEDS, ORDERS, Profile, calibrate

__all__ = [
    "FEEDS",
    "LENGTH",
    "ORDERS",
    "SEQUENCES",
    "CalibrationData",
    "Profile",
    "Site",
    "Standing",
    "Statistics",
    "calibrate",
    "samples",
    "strings",
    "windows",
]
