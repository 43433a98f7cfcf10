"""The harness that proves the Keras and the PyTorch half the same, or says where they are not.

>>> import parity
>>> report = parity.check(["swiftformer-xs"], reduced=True)  # doctest: +SKIP
>>> report.passed, len(report.results)  # doctest: +SKIP
(True, 30)

`python -m parity --help` shows the command line.
"""

from parity.checking import DTYPES, LEVELS, ComparisonError, check
from parity.report import Comparison, ModelReport, Report

__all__ = ["DTYPES", "LEVELS", "Comparison", "ComparisonError", "ModelReport", "Report", "check"]
