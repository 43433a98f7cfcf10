"""Which models can be compared, and how a published variant is made small enough to be compared in a moment."""

import dataclasses

from modelspec.configs import ModelConfig, get_variant

MAX_BLOCKS = 2


def reduced(config: ModelConfig) -> ModelConfig:
    """Returns the config with at most two blocks per stage, or two layers, and everything else as it is."""
    fields = {field.name for field in dataclasses.fields(config)}
    if "depths" not in fields:
        return config.replace(num_hidden_layers=min(config.num_hidden_layers, MAX_BLOCKS))
    changes = {"depths": [min(depth, MAX_BLOCKS) for depth in config.depths]}
    if "dilations" in fields:  # NAT has them as a property, made of the depths
        changes["dilations"] = [steps[:MAX_BLOCKS] for steps in config.dilations]
    return config.replace(**changes)


def extent(config: ModelConfig, published: ModelConfig) -> str:
    """Says how much of a published model a config keeps, in words."""
    if _depths(config) == _depths(published):
        return "whole"
    unit = "layers" if len(_depths(config)) == 1 else "blocks"
    return f"reduced to {'+'.join(map(str, _depths(config)))} of {'+'.join(map(str, _depths(published)))} {unit}"


def _depths(config: ModelConfig) -> list[int]:
    # NAT and DiNAT have num_hidden_layers too: the number of stages
    return getattr(config, "depths", None) or [config.num_hidden_layers]


def missing_halves(model_type: str) -> list[str]:
    """Returns the packages that have no classifier of a family yet; imports both frameworks."""
    import ptmodels.auto
    import tfmodels.auto

    missing = []
    for package in (tfmodels.auto, ptmodels.auto):
        try:
            package.model_class(model_type)
        except ValueError:
            missing.append(package.__name__.partition(".")[0])
    return missing


def smallest_of_families(names: list[str]) -> list[str]:
    """Returns, of each family among the variants, the one with the fewest parameters."""
    variants = [get_variant(name) for name in names]
    families = dict.fromkeys(variant.model_type for variant in variants)
    return [min((v for v in variants if v.model_type == f), key=lambda v: v.parameter_count).name for f in families]


def split_by_family(names: list[str]) -> tuple[list[str], dict[str, str]]:
    """Returns the variants that both halves have, and the others with the reason."""
    missing = {model_type: missing_halves(model_type) for model_type in {get_variant(n).model_type for n in names}}
    kept, skipped = [], {}
    for name in names:
        lacking = missing[get_variant(name).model_type]
        if lacking:
            skipped[name] = f"{' and '.join(lacking)} {'has' if len(lacking) == 1 else 'have'} no such family"
        else:
            kept.append(name)
    return kept, skipped
