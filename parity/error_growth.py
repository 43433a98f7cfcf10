"""How the error grows with depth: `max_rel` of the layers over their causal order, as the geometry of a drawing.

Lines of layers that run on their own layers' results are solid ("free"), of layers that are each given the reference's
input dotted ("forced").
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from parity.saved_report import Row

WIDTH, HEIGHT = 760, 330
LEFT, RIGHT, TOP, BOTTOM = 64, 84, 30, 48  # at the right, tolerances have their names
_BAND = 18  # height of what lies outside the scale: zeros below it, what is not finite above
_MARKED = 40  # points up to which a line shows each
_STYLES = (("keras", "float64"), ("keras", "float32"), ("torch", "float32"))


def draw_error_growth(rows: Sequence[Row], first: Row | None = None) -> dict[str, Any] | None:
    """Lays out the drawing of one model, in units of its `viewBox`; None if no two layers can be set in order.

    Args:
        rows: of a model; those with an order count.
        first: the row to be marked as the first divergence.
    """
    rows = sorted((row for row in rows if row.order is not None), key=_order)
    first_order, last_order = (_order(rows[0]), _order(rows[-1])) if rows else (0, 0)
    scale = _Scale(rows)
    if first_order == last_order or not scale.drawable:
        return None

    def x(order: int) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * (order - first_order) / (last_order - first_order), 1)

    by_series: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        by_series.setdefault((row.half, row.dtype, row.mode), []).append(row)
    return {
        "width": WIDTH,
        "height": HEIGHT,
        "left": LEFT,
        "right": WIDTH - RIGHT,
        "top": scale.top,
        "bottom": scale.bottom,
        "orders": [first_order, last_order],
        "y_ticks": list(scale.ticks()),
        "x_ticks": [(x(order), order) for order in _round_orders(first_order, last_order)],
        "stages": list(_stages(rows, x)),
        "tolerances": list(_tolerances(by_series, scale, x)),
        "series": [_series(key, of_series, scale, x) for key, of_series in by_series.items()],
        "first": x(first.order) if first is not None and first.order is not None else None,
    }


class _Scale:
    """The vertical axis: decades, and a band each for zeros and for what is not finite."""

    def __init__(self, rows: Sequence[Row]):
        values = [value for row in rows for value in (row.max_rel, row.tolerance) if value]
        self.drawable = bool(values)
        self.zeros = any(row.max_rel == 0 for row in rows)
        self.not_finite = any(row.max_rel is None for row in rows)
        self.low = math.floor(math.log10(min(values))) if values else 0
        self.high = max(math.ceil(math.log10(max(values))), self.low + 1) if values else 1
        self.top = TOP + _BAND * self.not_finite
        self.bottom = HEIGHT - BOTTOM - _BAND * self.zeros

    def y(self, value: float | None) -> float:
        if value is None:
            return TOP + 4.0
        if value == 0:
            return HEIGHT - BOTTOM - 4.0
        part = (self.high - math.log10(value)) / (self.high - self.low)
        return round(self.top + part * (self.bottom - self.top), 1)

    def ticks(self) -> Iterator[tuple[float, str]]:
        step = math.ceil((self.high - self.low) / 8)
        for exponent in range(self.low, self.high + 1, step):
            yield self.y(10.0**exponent), f"1e{exponent:+03d}"
        if self.zeros:
            yield self.y(0.0), "0"
        if self.not_finite:
            yield self.y(None), "not finite"


def _order(row: Row) -> int:
    """The place of a row that has one."""
    return row.order or 0


def _series(key: tuple[str, str, str], rows: list[Row], scale: _Scale, x: Callable[[int], float]) -> dict[str, Any]:
    half, dtype, mode = key
    points = [(x(_order(row)), scale.y(row.max_rel), row) for row in rows]
    path, pen_down = [], False
    for across, down, row in points:
        path.append(f"{'L' if pen_down else 'M'}{across} {down}")
        pen_down = row.max_rel is not None
    return {
        "label": " ".join(part for part in key if part),
        "style": _STYLES.index((half, dtype)) if (half, dtype) in _STYLES else len(_STYLES),
        "forced": mode == "forced",
        "path": "".join(path),
        "marked": len(points) <= _MARKED,
        "failed": "".join(f"M{px - 3.5:.1f} {py - 3.5:.1f}l7 7m-7 0l7 -7" for px, py, row in points if not row.passed),
    }


def _tolerances(
    by_series: Mapping[tuple[str, str, str], list[Row]], scale: _Scale, x: Callable[[int], float]
) -> Iterator[dict[str, Any]]:
    """One line for each course of the tolerance; a label only where it has room."""
    seen = {}
    labelled: list[float] = []
    for (_, dtype, mode), rows in by_series.items():
        rows = [row for row in rows if row.tolerance]
        path = "".join(
            f"{'L' if index else 'M'}{x(_order(row))} {scale.y(row.tolerance)}" for index, row in enumerate(rows)
        )
        if rows and path not in seen:
            seen[path] = rows[-1]
            down = scale.y(rows[-1].tolerance)
            has_room = all(abs(down - other) > 12 for other in labelled)
            labelled += [down] if has_room else []
            label = dtype + (f" {mode}" if len({row.tolerance for row in rows}) > 1 else "")
            yield {"path": path, "y": down, "label": label if has_room else ""}


def _stages(rows: Sequence[Row], x: Callable[[int], float]) -> Iterator[dict[str, Any]]:
    """The stretches of the horizontal axis that belong to one block, such as `encoder.layer.3`."""
    starts: list[tuple[str, float]] = []
    for row in rows:
        name = _stage(row)
        if not starts or starts[-1][0] != name:
            starts.append((name, x(_order(row))))
    ends = [start for _, start in starts[1:]] + [float(WIDTH - RIGHT)]
    for index, ((name, start), end) in enumerate(zip(starts, ends, strict=True)):
        short = ".".join(name.split(".")[-2:])
        has_room = 5.8 * len(short) < end - start
        yield {"x": start, "width": round(end - start, 1), "label": short if has_room else "", "odd": index % 2}


def _stage(row: Row) -> str:
    """The path up to its first number, its first name if it has none."""
    parts = path_of(row).split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdecimal()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else parts[0]


def path_of(row: Row) -> str:
    """The row's name without its mode."""
    return row.name.removeprefix(f"{row.mode}.") if row.mode else row.name


def _round_orders(first: int, last: int) -> range:
    """At most 13 orders, a round number apart."""
    steps = (mantissa * 10**exponent for exponent in itertools.count() for mantissa in (1, 2, 5))
    step = next(step for step in steps if (last - first) <= 12 * step)
    return range(math.ceil(first / step) * step, last + 1, step)
