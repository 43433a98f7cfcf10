"""How two arrays are compared: scale, statistics, bounds and the row of a report.

Float64 decides: in float64 two frameworks can differ by rounding alone, so an epsilon, a GELU variant or a shifted
window shows up at once. Float32 is then judged against the float64 result.
"""

import dataclasses
import math
from typing import Any

import numpy as np

# Bounds are fractions of the scale of an array (see `scales`).
FLOAT64_BOUND = 1e-10  # rounding is 1e-16 per operation; hundreds of layers with probing weights stay below 1e-12
FLOAT32_BOUND = 1e-4  # whole published variants against float64: 6e-8 per operation, amplified by up to 24 blocks
FLOAT32_GOLDEN_BOUND = 2e-5  # recorded cases of three to eight small blocks
FLOAT16_BOUND = 3e-2  # 11 bits of mantissa: 5e-4 per operation, amplified like float32
BFLOAT16_BOUND = 2e-1  # 8 bits of mantissa: 4e-3 per operation
BOUNDS = {"float64": FLOAT64_BOUND, "float32": FLOAT32_BOUND, "float16": FLOAT16_BOUND, "bfloat16": BFLOAT16_BOUND}
# one layer or one block, given right inputs: whatever comes before it adds nothing
FORCED_BOUNDS = {**BOUNDS, "float32": 3e-5, "float16": 1e-2, "bfloat16": 1e-1}
# the way back is as long again, and sums over all positions: torch's own float32 is up to 2e-4 off
GRADIENT_BOUNDS = {"float64": FLOAT64_BOUND, "float32": 1e-3}
EXPORT_BOUND = 2e-5  # an exported graph against the live model, logits of their rms: the same float32, other kernels
SAVED_MODEL_BOUND = 1e-5  # the same of a SavedModel, which runs on the live model's own kernels
QUANTIZED_BOUNDS = {"float16": FLOAT16_BOUND, "int8": 3e-1}  # of weights in 16 bits; of products in 8
OPERATOR_BOUNDS = {"float64": 1e-12, "float32": 5e-6}  # neighborhood attention alone, of its rms
# bytes are resized by sums of whole numbers, and rescaled and normalised by a table of 256 values: nothing can differ
PREPROCESSING_BOUND = 0.0

# In float32 neither framework may be much further from the float64 result than the other: both round, but a leak of
# precision in one of them shows as a ratio. Rounding itself makes the ratio jump on small arrays and tiny errors.
FLOAT32_RATIO_BOUND = 4.0
FLOAT32_RATIO_MIN_SIZE = 256
FLOAT32_RATIO_MIN_ERROR = 1e-6

# What differs: numbers beyond the bound, float32 of one half much less exact than the other's, numbers that are none,
# shapes, dtypes, an array that one side lacks, or a difference that rounding does not explain.
FAILURES = ("value", "balance", "not finite", "shape", "dtype", "missing", "rounding")

# A difference of so many rounding floors is explained by rounding; a floor is the worst of a few draws, not a bound.
EXPLAINED_FACTOR = 3.0

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
        failure: the kind of failure, one of `FAILURES`; "" if it passed.
        mean_abs: mean |actual - reference|.
        top1, top5: of logits, the part of the samples with the same first class, and with the same five first.
        floor: what rounding does to the array (see `parity.rounding`), as `max_rel`; None if it was not measured.
    """

    max_abs: float
    max_rel: float
    cosine: float
    tolerance: float
    passed: bool
    reason: str = ""
    failure: str = ""
    mean_abs: float = math.nan
    top1: float | None = None
    top5: float | None = None
    floor: float | None = None

    @property
    def factor(self) -> float | None:
        """How many times the rounding floor the difference is; None if the floor was not measured."""
        if self.floor is None or self.max_rel == 0.0:
            return None if self.floor is None else 0.0
        return self.max_rel / self.floor if self.floor > 0.0 else math.inf


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
        row: dict[str, Any] = {"model": self.model, "level": self.level, "name": self.name, "dtype": self.dtype}
        for field, value in {**dataclasses.asdict(self.agreement), "factor": self.agreement.factor}.items():
            row[field] = None if isinstance(value, float) and not math.isfinite(value) else value
        return row


def root_mean_square(array: np.ndarray) -> float:
    """Returns the rms of an array, 0 if it is empty."""
    return math.sqrt(_sum_of_squares(array) / max(np.size(array), 1))


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
        return failed(tolerance, "shape", f"shape {actual.shape} against {reference.shape}")
    if actual.size == 0:
        return failed(tolerance, "missing", "empty: nothing was compared")
    actual, reference = actual.astype(np.float64, copy=False), reference.astype(np.float64, copy=False)
    with np.errstate(invalid="ignore"):  # infinity minus infinity
        difference = np.abs(actual - reference)
    max_abs = float(difference.max())  # NaN or infinity where an array has any
    if not math.isfinite(max_abs):
        counts = [np.size(array) - np.count_nonzero(np.isfinite(array)) for array in (actual, reference)]
        reason = f"not finite: {counts[0]} of {actual.size} numbers, {counts[1]} of the reference's"
        return failed(tolerance, "not finite", reason)
    if max_abs == 0.0:
        max_rel = 0.0
    else:
        max_rel = max_abs / scale if scale > 0 else math.inf
    passed = max_rel <= tolerance
    return Agreement(
        max_abs,
        max_rel,
        _cosine(actual, reference),
        tolerance,
        passed,
        failure="" if passed else "value",
        mean_abs=float(difference.mean()),
    )


def top_k_agreement(actual: np.ndarray, reference: np.ndarray, k: int) -> float:
    """Returns the part of the samples whose `k` largest logits (B, classes) are of the same classes, in any order."""
    chosen = [np.sort(np.argsort(-np.asarray(logits), axis=-1, kind="stable")[:, :k]) for logits in (actual, reference)]
    return float((chosen[0] == chosen[1]).all(axis=-1).mean())


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
            agreements[name] = failed(tolerance, "missing", "only one side has it")
    return agreements


def balanced(first: Agreement, second: Agreement, size: int) -> bool:
    """Whether two float32 results lie about equally far from the float64 one (see `FLOAT32_RATIO_BOUND`)."""
    smaller, larger = sorted([first.max_rel, second.max_rel])
    if size < FLOAT32_RATIO_MIN_SIZE or larger <= FLOAT32_RATIO_MIN_ERROR:
        return True
    return larger <= FLOAT32_RATIO_BOUND * smaller


def failed(tolerance: float, failure: str, reason: str) -> Agreement:
    """Returns the outcome of a comparison that could not be made.

    Args:
        tolerance: the bound that there would have been.
        failure: its kind, one of `FAILURES`.
        reason: in words.
    """
    return Agreement(math.nan, math.nan, math.nan, tolerance, False, reason, failure)


def _sum_of_squares(array: np.ndarray) -> float:
    return _dot(np.asarray(array, dtype=np.float64), np.asarray(array, dtype=np.float64))


def _dot(first: np.ndarray, second: np.ndarray) -> float:
    # without a copy, unlike the sum of products, and without the threads of np.dot, which wait for the frameworks'
    return float(np.einsum("i,i->", first.ravel(), second.ravel()))


def _cosine(actual: np.ndarray, reference: np.ndarray) -> float:
    squares = _sum_of_squares(actual), _sum_of_squares(reference)
    norms = math.sqrt(squares[0]) * math.sqrt(squares[1])
    if norms == 0.0:
        return 1.0 if squares[0] == squares[1] else 0.0
    return float(min(1.0, max(-1.0, _dot(actual, reference) / norms)))
