"""Reduced variants keep everything but the number of blocks, and the checked arrays come in the order of computing."""

import pytest

from modelspec import get_config, list_models
from modelspec.agreement import Agreement
from modelspec.checkpoints import parameter_shapes
from parity import LEVELS, ModelReport, Row, checking
from parity.variants import extent, reduced, smallest_of_families


@pytest.mark.parametrize("name", list_models())
def test_a_reduced_variant_has_at_most_two_blocks_per_stage(name):
    published = get_config(name)
    config = reduced(published)
    changed = {field for field, value in config.to_dict().items() if published.to_dict()[field] != value}
    assert changed <= {"depths", "dilations", "num_hidden_layers"}
    if hasattr(config, "depths"):
        assert config.depths == [2, 2, 2, 2]
    else:
        assert config.num_hidden_layers == 2
    assert len(parameter_shapes(config)) < len(parameter_shapes(published))
    assert published.to_dict() == get_config(name).to_dict()  # untouched
    assert extent(config, published).startswith("reduced to 2")
    assert extent(published, published) == "whole"


def test_reduced_dilations_are_those_of_the_first_two_blocks():
    assert reduced(get_config("dinat-mini")).dilations == [[1, 8], [1, 4], [1, 2], [1, 1]]


def failed(name: str, dtype: str) -> Row:
    return Row("m", "layers", name, dtype, Agreement(1.0, 1.0, 0.0, 1e-10, False), "keras")


def test_the_first_divergence_is_the_earliest_hidden_state_in_float64():
    rows = [failed(n, d) for n, d in (("logits", "float64"), ("hidden_states.10", "float64"))]
    rows += [
        failed("hidden_states.9", "float64"),
        failed("attentions.1", "float64"),
        failed("hidden_states.2", "float32"),
    ]
    report = ModelReport("m", "whole", 1, "", "", False, (), tuple(rows))
    assert report.first_divergence.name == "hidden_states.9"


def test_the_smallest_of_each_family():
    assert smallest_of_families(list_models()) == ["nat-mini", "dinat-mini", "swiftformer-xs", "vit-msn-small"]


def test_all_models_at_all_levels_go_deep_for_one_of_each_family(monkeypatch):
    checked = {}

    def check_one(subject, photograph, size, levels, *rest):
        checked[subject.name] = levels
        return ModelReport(subject.name, "whole", 1, "", "", False, (), (failed("logits", "float64"),))

    monkeypatch.setattr(checking, "_check_one", check_one)
    checking.check(every_model=True, reduced=True, levels=LEVELS)
    assert set(checked) == set(list_models())
    deep = {name for name, levels in checked.items() if levels == list(LEVELS)}
    assert deep == set(smallest_of_families(list_models()))
    assert all(levels == ["outputs", "weights"] for name, levels in checked.items() if name not in deep)
