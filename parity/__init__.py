"""The harness that proves the Keras and the PyTorch half the same, or says where they are not.

>>> import parity
>>> report = parity.check(["swiftformer-xs"], reduced=True, dtypes=["float64"])
>>> report.passed, [result.name for result in report.results[:3]]
(True, ['logits', 'loss', 'hidden_states.0'])

`python -m parity --help` shows the command line.
"""

from parity.checking import DTYPES, check
from parity.errors import ComparisonError
from parity.levels import LEVELS
from parity.pairs import Comparison, compare
from parity.report import ModelReport, Report, Row

__all__ = ["DTYPES", "LEVELS", "Comparison", "ComparisonError", "ModelReport", "Report", "Row", "check", "compare"]
