"""The kinds of features that a frozen model of a family gives; both halves extract them."""

from modelspec.configs import ModelConfig

POOLED, CLS, CLS_BEFORE_NORM = "pooled", "cls", "cls-before-norm"


def feature_kinds(config: ModelConfig) -> tuple[str, ...]:
    """Returns the kinds of features of a family, the default first.

    `"pooled"` is what the classifier is given: the mean of the final map, and of ViT-MSN, which has no map, the class
    token, so that it is `"cls"` there. `"cls-before-norm"` is that token as the last layer leaves it, which is what MSN
    was evaluated on (Assran et al., ECCV 2022, arXiv:2204.07141).
    """
    return (CLS_BEFORE_NORM, CLS, POOLED) if config.model_type == "vit_msn" else (POOLED,)


def chosen_kind(config: ModelConfig, kind: str | None = None) -> str:
    """Returns a kind of features that a family has, by default the first of `feature_kinds(config)`.

    Raises:
        ValueError: it has no such kind; the message names those it has.
    """
    allowed = feature_kinds(config)
    if kind is not None and kind not in allowed:
        raise ValueError(f"there are no {kind!r} features of {config.model_type}; there are {', '.join(allowed)}")
    return kind or allowed[0]
