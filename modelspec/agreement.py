"""How two arrays are compared: scale, statistics, bounds and the row of a report.

Float64 decides: in float64 two frameworks can differ by rounding alone, so an epsilon, a GELU variant or a shifted
window shows up at once. Float32 is then judged against the float64 result.
"""

import dataclasses
import math

import numpy as np

# Bounds are fractions of the scale of an array (see `scales`).
FLOAT64_BOUND = 1e-10  # rounding is 1e-16 per operation; hundreds of layers with probing weights stay below 1e-12
FLOAT32_BOUND = 1e-4  # whole published variants against float64: 6e-8 per operation, amplified by up to 24 blocks
FLOAT32_GOLDEN_BOUND = 2e-5  # recorded cases of three to eight small blocks
FLOAT16_BOUND = 3e-2  # 11 bits of mantissa: 5e-4 per operation, amplified like float32
BFLOAT16_BOUND = 2e-1  # 8 bits of mantissa: 4e-3 per operation
BOUNDS = {"float64": FLOAT64_BOUND, "float32": FLOAT32_BOUND, "float16": FLOAT16_BOUND, "bfloat16": BFLOAT16_BOUND}
# the way back is as long again, and sums over all positions: torch's own float32 is up to 2e-4 off
GRADIENT_BOUNDS = {"float64": FLOAT64_BOUND, "float32": 1e-3}
EXPORT_BOUND = 2e-5  # an exported graph against the live model, logits of their rms: the same float32, other kernels
OPERATOR_BOUNDS = {"float64": 1e-12, "float32": 5e-6}  # neighborhood attention alone, of its rms

# In float32 neither framework may be much further from the float64 result than the other: both round, but a leak of
# precision in one of them shows as a ratio. Rounding itself makes the ratio jump on small arrays and tiny errors.
FLOAT32_RATIO_BOUND = 4.0
FLOAT32_RATIO_MIN_SIZE = 256
FLOAT32_RATIO_MIN_ERROR = 1e-6

# An array whose own rms is below this part of the rms over all arrays of its kind is measured against that part.
SCALE_FLOOR = 1e-3


@dataclasses.dataclass(frozen=True)
class Agreement:
    """The outcome of comparing one array with its reference.

    Attributes:
        max_abs: max |actual - reference|.
        max_rel: `max_abs` over the scale of the reference.
        cosine: cosine of the angle between the two, as flat vectors; 1 when both are zero.
        tolerance: the bound on `max_rel`.
        passed: whether `max_rel <= tolerance`; never with a NaN, an infinity or another shape.
        reason: why it failed when that is not a matter of size, else "".
    """

    max_abs: float
    max_rel: float
    cosine: float
    tolerance: float
    passed: bool
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Result:
    """One row of a parity report: which array of which model, at which level and dtype, and how it agreed."""

    model: str
    level: str
    name: str
    dtype: str
    agreement: Agreement

    def to_dict(self) -> dict:
        """Returns the row as plain values, for JSON; what is not a number becomes None."""
        row = {"model": self.model, "level": self.level, "name": self.name, "dtype": self.dtype}
        for field, value in dataclasses.asdict(self.agreement).items():
            row[field] = None if isinstance(value, float) and not math.isfinite(value) else value
        return row


def scales(references: dict[str, np.ndarray]) -> dict[str, float]:
    """Returns the scale of each array: its rms, but at least `SCALE_FLOOR` of the rms over all of them."""
    squares = {name: _sum_of_squares(array) for name, array in references.items()}
    elements = sum(np.size(array) for array in references.values())
    overall = math.sqrt(sum(squares.values()) / elements) if elements else 0.0
    return {
        name: max(math.sqrt(squares[name] / max(np.size(array), 1)), SCALE_FLOOR * overall)
        for name, array in references.items()
    }


def compare(actual: np.ndarray, reference: np.ndarray, scale: float, tolerance: float) -> Agreement:
    """Compares one array with its reference, in float64.

    Args:
        actual, reference: arrays of any real dtype.
        scale: the size against which a difference is measured, as of `scales`.
        tolerance: the largest allowed difference, as a fraction of the scale.
    """
    actual, reference = np.asarray(actual), np.asarray(reference)
    if actual.shape != reference.shape:
        return _failed(tolerance, f"shape {actual.shape} against {reference.shape}")
    if actual.size == 0:
        return _failed(tolerance, "empty: nothing was compared")
    actual, reference = actual.astype(np.float64), reference.astype(np.float64)
    if not (np.isfinite(actual).all() and np.isfinite(reference).all()):
        return _failed(tolerance, "not finite")
    max_abs = float(np.abs(actual - reference).max())
    if max_abs == 0.0:
        max_rel = 0.0
    else:
        max_rel = max_abs / scale if scale > 0 else math.inf
    return Agreement(max_abs, max_rel, _cosine(actual, reference), tolerance, max_rel <= tolerance)


def compare_all(
    actual: dict[str, np.ndarray], reference: dict[str, np.ndarray], tolerance: float
) -> dict[str, Agreement]:
    """Compares arrays of one kind by name; a name that only one side has is a failure."""
    scale = scales(reference)
    agreements = {}
    for name in [*reference, *(name for name in actual if name not in reference)]:
        if name in actual and name in reference:
            agreements[name] = compare(actual[name], reference[name], scale[name], tolerance)
        else:
            agreements[name] = _failed(tolerance, "only one side has it")
    return agreements


def balanced(first: Agreement, second: Agreement, size: int) -> bool:
    """Whether two float32 results lie about equally far from the float64 one (see `FLOAT32_RATIO_BOUND`)."""
    smaller, larger = sorted([first.max_rel, second.max_rel])
    if size < FLOAT32_RATIO_MIN_SIZE or larger <= FLOAT32_RATIO_MIN_ERROR:
        return True
    return larger <= FLOAT32_RATIO_BOUND * smaller


def _failed(tolerance: float, reason: str) -> Agreement:
    return Agreement(math.nan, math.nan, math.nan, tolerance, False, reason)


def _sum_of_squares(array: np.ndarray) -> float:
    return float(np.square(np.asarray(array, dtype=np.float64)).sum())


def _cosine(actual: np.ndarray, reference: np.ndarray) -> float:
    norms = math.sqrt(_sum_of_squares(actual) * _sum_of_squares(reference))
    if norms == 0.0:
        return 1.0 if _sum_of_squares(actual) == _sum_of_squares(reference) else 0.0
    return float(min(1.0, max(-1.0, np.vdot(actual, reference) / norms)))
