"""Outputs: names in a fixed order, read by attribute, key and position."""

import copy
import pickle

import numpy as np
import pytest

from modelspec.configs import BaseModelOutput, ImageClassifierOutput, ImageClassifierOutputWithNoAttention


def test_order_is_that_of_the_fields_whatever_the_arguments():
    output = ImageClassifierOutput(attentions="a", logits="l", loss="s")
    assert list(output) == ["loss", "logits", "attentions"]
    assert output.to_tuple() == ("s", "l", "a")
    assert output[0] == "s" and output[-1] == "a" and output[:2] == ("s", "l")


@pytest.mark.parametrize(
    "values", [{"logits": 1, "loss": None}, [("logits", 1)], iter([("loss", None), ("logits", 1)])]
)
def test_mappings_and_pairs_rebuild_an_output(values):
    assert ImageClassifierOutput(values) == {"logits": 1}


def test_absent_field_is_a_none_attribute_and_a_missing_key():
    output = BaseModelOutput(last_hidden_state=1)
    assert output.attentions is None and "attentions" not in output and output.get("attentions") is None
    with pytest.raises(KeyError):
        output["attentions"]
    with pytest.raises(IndexError):
        output[1]


def test_unknown_names_are_refused():
    with pytest.raises(TypeError, match="ImageClassifierOutputWithNoAttention has no fields .'attentions'"):
        ImageClassifierOutputWithNoAttention(attentions=1)
    output = BaseModelOutput()
    with pytest.raises(TypeError, match="logits"):
        output["logits"] = 1
    with pytest.raises(AttributeError, match="logits"):
        output.logits = 1
    with pytest.raises(AttributeError, match="logits"):
        _ = output.logits


@pytest.mark.parametrize(
    "assign",
    [
        lambda output: setattr(output, "loss", 3),
        lambda output: output.__setitem__("loss", 3),
        lambda output: output.update(loss=3),
        lambda output: output.setdefault("loss", 3),
        lambda output: output.__ior__({"loss": 3}),
    ],
)
def test_every_way_to_assign_keeps_the_order(assign):
    output = ImageClassifierOutput(logits=1, attentions=2)
    assign(output)
    assert list(output.items()) == [("loss", 3), ("logits", 1), ("attentions", 2)]


def test_assigning_none_removes_a_field():
    output = ImageClassifierOutput(loss=1, logits=2)
    output.loss = None
    assert output == {"logits": 2} and output.to_tuple() == (2,)


@pytest.mark.parametrize(
    "duplicate",
    [copy.copy, copy.deepcopy, lambda o: o.copy(), lambda o: pickle.loads(pickle.dumps(o)), lambda o: o | {}],
)
def test_copies_and_pickles_keep_class_order_and_values(duplicate):
    output = ImageClassifierOutput(hidden_states=(1, 2), logits=3)
    twin = duplicate(output)
    assert type(twin) is ImageClassifierOutput and twin == output and list(twin) == list(output) and twin is not output


def test_arrays_are_not_compared_on_assignment():
    output = ImageClassifierOutput(logits=np.zeros((2, 3)))
    output.loss = np.zeros(3)
    assert output.loss.shape == (3,) and output.logits.shape == (2, 3)
