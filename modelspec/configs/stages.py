"""What is settled per stage: which stages a backbone returns (`out_features`, `out_indices`), and drop path rates."""

from collections.abc import Sequence


def resolve_out_features(
    stage_names: Sequence[str], out_features: list[str] | None = None, out_indices: Sequence[int] | None = None
) -> tuple[list[str], list[int]]:
    """Returns names and indices of the same stages, in stage order; with neither given, those of the last stage.

    Args:
        stage_names: all stages, the stem first, for example `["stem", "stage1", "stage2"]`.
        out_features: a list of names.
        out_indices: a list or tuple of indices into `stage_names`; negative ones count from the end and are returned
            counted from the start.

    Raises:
        ValueError: a name or index that does not exist, comes twice or out of order; an empty choice; a wrong type;
            or names and indices of different stages. The rules are the reference's backbone rules.

    >>> resolve_out_features(["stem", "stage1", "stage2"], out_indices=[1, -1])
    (['stage1', 'stage2'], [1, 2])
    """
    stage_names = list(stage_names)
    if out_features is None:
        last = [len(stage_names) - 1]
        indices = last if out_indices is None else _indices_from_start(len(stage_names), out_indices)
    else:
        indices = _indices_of_names(stage_names, out_features)
        if out_indices is not None and _indices_from_start(len(stage_names), out_indices) != indices:
            raise ValueError(
                f"out_features {out_features} and out_indices {list(out_indices)} choose different stages; "
                f"give one of them (the stages are {stage_names})"
            )
    return [stage_names[index] for index in indices], indices


def _indices_of_names(stage_names: list[str], out_features: list[str]) -> list[int]:
    if not isinstance(out_features, list):
        raise ValueError(f"out_features is {out_features!r}; it must be a list of names out of {stage_names}")
    unknown = [name for name in out_features if name not in stage_names]
    if unknown:
        raise ValueError(f"out_features has the unknown names {unknown}; the stages are {stage_names}")
    indices = [stage_names.index(name) for name in out_features]
    _require_increasing("out_features", out_features, indices)
    return indices


def _indices_from_start(count: int, out_indices: Sequence[int]) -> list[int]:
    if not isinstance(out_indices, list | tuple) or any(type(index) is not int for index in out_indices):
        raise ValueError(f"out_indices is {out_indices!r}; it must be a list of ints")
    outside = [index for index in out_indices if not -count <= index < count]
    if outside:
        raise ValueError(f"out_indices has {outside}; they must lie from {-count} to {count - 1}")
    indices = [index % count for index in out_indices]
    _require_increasing("out_indices", out_indices, indices)
    return indices


def _require_increasing(field: str, given: Sequence, indices: list[int]) -> None:
    if not indices:
        raise ValueError(f"{field} is empty; choose at least one stage, or None for the last")
    if len(set(indices)) != len(indices):
        raise ValueError(f"{field} is {list(given)}; it must not name a stage twice")
    if indices != sorted(indices):
        raise ValueError(f"{field} is {list(given)}; it must be in the order of the stages")


def rising_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Returns the drop path rate of every block, per stage: linear from 0 at the very first to `rate` at the last.

    >>> rising_rates(0.2, [1, 2])
    [[0.0], [0.1, 0.2]]
    """
    last = max(sum(depths) - 1, 1)
    starts = [sum(depths[:stage]) for stage in range(len(depths))]
    return [
        [rate * (start + block) / last for block in range(depth)] for start, depth in zip(starts, depths, strict=True)
    ]
