"""Calibration of pruning: what every linear of a model is given, block by block, on some text."""

from sparsec.calibrate.data import CalibrationData, samples, takes_tokens, windows
from sparsec.calibrate.self_written import SELF, own_text
from sparsec.calibrate.sequences import Sequences, sequences, strings
from sparsec.calibrate.sites import Site
from sparsec.calibrate.standing import Standing
from sparsec.calibrate.statistics import Statistics
from sparsec.calibrate.walk import FEEDS, ORDERS, Profile, calibrate

__all__ = [
    "FEEDS",
    "ORDERS",
    "SELF",
    "CalibrationData",
    "Profile",
    "Sequences",
    "Site",
    "Standing",
    "Statistics",
    "calibrate",
    "own_text",
    "samples",
    "sequences",
    "strings",
    "takes_tokens",
    "windows",
]
