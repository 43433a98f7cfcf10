"""The harness that proves the Keras and the PyTorch half the same, or says where they are not.

>>> import parity
>>> report = parity.check(["swiftformer-xs"], reduced=True, dtypes=["float64"])
>>> report.passed, [result.name for result in report.results[:3]]
(True, ['logits', 'loss', 'hidden_states.0'])

`python -m parity --help` shows the command line.
"""

from typing import TYPE_CHECKING, Any

from parity.choices import DTYPES, LEVELS
from parity.errors import ComparisonError

if TYPE_CHECKING:
    from parity.checking import check
    from parity.pairs import Comparison, compare
    from parity.report import ModelReport, Report, Row

__all__ = ["DTYPES", "LEVELS", "Comparison", "ComparisonError", "ModelReport", "Report", "Row", "check", "compare"]

_MODULES = {"checking": ["check"], "pairs": ["Comparison", "compare"], "report": ["ModelReport", "Report", "Row"]}


def __getattr__(name: str) -> Any:
    """Imports what is asked for only then: the command line's help needs none of it."""
    import importlib

    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"parity.{module}"), name)
    raise AttributeError(f"module 'parity' has no attribute {name!r}")
