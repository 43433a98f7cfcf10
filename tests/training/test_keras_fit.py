"""Keras' own training drives the models: `fit`, `evaluate`, `predict`, from every kind of data."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from families import FAMILIES, slow_but_for

from modelspec import ImageProcessor
from tfmodels.auto import model_class
from tfmodels.weights import read_weights


@pytest.fixture(autouse=True)
def seed():
    keras.utils.set_random_seed(0)


def make(config, **kwargs):
    return model_class(config.model_type)(config, **kwargs)


def assert_learns(model, *data, **fit):
    losses = model.fit(*data, epochs=3, verbose=0, **fit).history["loss"]
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]


DATA = ["tensors", "arrays", "pipeline", "dictionary", "labels inside"]
# every kind of data once, BatchNorm and neighborhood attention once; the other pairs are slow
QUICK = [
    *(("vit_msn", data, None) for data in DATA[1:]),
    *(("swiftformer", "labels inside", None), ("dinat", "tensors", "given")),
]
REST = [kind for kind in itertools.product(FAMILIES, DATA, [None, "given"]) if kind not in QUICK]
KINDS = [*QUICK, *(pytest.param(*kind, marks=pytest.mark.slow) for kind in REST)]


@pytest.mark.parametrize(("config", "data", "loss"), KINDS, indirect=["config"])
def test_the_loss_falls_from_every_kind_of_data(config, digits, data, loss):
    images, labels = digits
    model = make(config)
    given = keras.losses.SparseCategoricalCrossentropy(from_logits=True) if loss else None
    model.compile(keras.optimizers.AdamW(2e-3), loss=given, metrics=["accuracy"])
    if data == "tensors":
        assert_learns(model, tf.constant(images), tf.constant(labels), batch_size=25)
    elif data == "arrays":
        assert_learns(model, images, labels, batch_size=25)
    elif data == "pipeline":
        assert_learns(model, tf.data.Dataset.from_tensor_slices((images, labels)).batch(25), shuffle=False)
    elif data == "dictionary":
        assert_learns(model, {"pixel_values": images}, labels, batch_size=25)
    else:
        inside = {"pixel_values": images, "labels": labels}
        assert_learns(model, tf.data.Dataset.from_tensor_slices(inside).batch(25), shuffle=False)


@slow_but_for("dinat", "swiftformer")
def test_evaluate_and_predict(config, digits):
    images, labels = digits[0][:20], digits[1][:20]
    model = make(config)
    model.compile("sgd", metrics=["accuracy"])
    evaluated = model.evaluate(images, labels, verbose=0, return_dict=True)
    predicted = model.predict(images, batch_size=7, verbose=0)
    live = model(images, labels=labels)
    np.testing.assert_allclose(predicted.logits, live.logits, atol=1e-5)
    assert evaluated["loss"] == pytest.approx(float(live.loss), rel=1e-5)
    assert evaluated["accuracy"] == pytest.approx(np.mean(np.argmax(live.logits, -1) == labels))
    with_labels = model.predict({"pixel_values": images, "labels": labels}, batch_size=7, verbose=0)
    np.testing.assert_array_equal(with_labels.logits, predicted.logits)
    assert set(with_labels) == set(predicted) == {"logits"}


@slow_but_for("nat", "vit_msn")
def test_a_loss_given_to_compile_rules_over_the_own(config, digits):
    images, labels = digits[0][:20], digits[1][:20]
    model = make(config)
    model.compile("sgd", loss=lambda y, logits: 7.0 + 0.0 * keras.ops.sum(logits, axis=-1))
    assert model.evaluate(images, labels, verbose=0) == pytest.approx(7.0)


PRECISIONS = ["mixed_float16", "mixed_bfloat16", "float64"]
QUICK_PRECISIONS = [("nat", "mixed_float16"), ("swiftformer", "mixed_bfloat16"), ("vit_msn", "float64")]
SLOW_PRECISIONS = [kind for kind in itertools.product(FAMILIES, PRECISIONS) if kind not in QUICK_PRECISIONS]


@pytest.mark.parametrize(
    ("config", "dtype"),
    [*QUICK_PRECISIONS, *(pytest.param(*kind, marks=pytest.mark.slow) for kind in SLOW_PRECISIONS)],
    indirect=["config"],
)
def test_other_precisions_learn(config, digits, dtype):
    model = make(config, dtype=dtype)
    model.compile(keras.optimizers.AdamW(2e-3))
    assert_learns(model, *digits, batch_size=25)
    variables = "float64" if dtype == "float64" else "float32"
    assert {weight.dtype for weight in model.trainable_weights} == {variables}


@slow_but_for("nat", "vit_msn")
def test_xla_gives_the_same_training(config, digits):
    losses = []
    for jit_compile in (False, True):
        keras.utils.set_random_seed(0)
        model = make(config)
        model.compile(keras.optimizers.SGD(1e-2), jit_compile=jit_compile)
        losses.append(model.fit(*digits, batch_size=50, epochs=1, shuffle=False, verbose=0).history["loss"][0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@slow_but_for("dinat", "swiftformer")
def test_channels_last_trains_like_channels_first(config, digits):
    images, labels = digits
    losses = []
    for data_format, data in (("channels_first", images), ("channels_last", np.moveaxis(images, 1, -1))):
        keras.utils.set_random_seed(0)
        model = make(config, data_format=data_format)
        model.compile(keras.optimizers.SGD(1e-2))
        losses.append(model.fit(data, labels, batch_size=50, epochs=1, shuffle=False, verbose=0).history["loss"][0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


OTHER_PROBLEMS = list(itertools.product(FAMILIES, ["regression", "multi_label_classification"]))
QUICK_PROBLEMS = [("swiftformer", "multi_label_classification"), ("vit_msn", "regression")]


@pytest.mark.parametrize(
    ("config", "problem"),
    [kind if kind in QUICK_PROBLEMS else pytest.param(*kind, marks=pytest.mark.slow) for kind in OTHER_PROBLEMS],
    indirect=["config"],
)
def test_other_problem_types_learn_and_stick(config, digits, problem):
    images, labels = digits
    if problem == "regression":
        config, targets = config.replace(num_labels=1), labels.astype(np.float32) / 10
    else:
        targets = np.eye(10, dtype=np.float32)[labels]
    model = make(config)
    model.compile(keras.optimizers.AdamW(2e-3))
    assert_learns(model, images, targets, batch_size=25)
    assert model.config.problem_type == problem


@slow_but_for("nat", "swiftformer")
def test_sample_and_class_weights_weigh_the_own_loss(config, digits):
    images, labels = digits[0][:10], digits[1][:10]
    model = make(config)
    model.compile("sgd")
    plain = model.evaluate(images, labels, verbose=0)
    assert model.evaluate(images, labels, sample_weight=np.full(10, 3.0), verbose=0) == pytest.approx(3 * plain)
    model.reset_metrics()  # else the loss is the mean of all calls, before Keras 3.15
    weighted = model.train_on_batch(images, labels, class_weight={label: 0.0 for label in range(10)})
    assert float(np.ravel(weighted)[0]) == 0.0


@slow_but_for("dinat", "vit_msn")
def test_a_frozen_body_stays_as_it_is(config, digits):
    model = make(config)
    getattr(model, config.base_model_prefix).trainable = False
    before = read_weights(model)
    model.compile(keras.optimizers.AdamW(2e-3))
    model.fit(*digits, batch_size=50, epochs=1, verbose=0)
    changed = {key for key, value in read_weights(model).items() if not np.array_equal(value, before[key])}
    assert changed
    assert all(key.split(".")[0] in config.head_keys for key in changed)


def test_every_trainable_variable_gets_a_gradient(config, digits):
    model = make(config)
    with tf.GradientTape() as tape:
        loss = model(digits[0][:4], labels=digits[1][:4], training=True).loss
    gradients = tape.gradient(loss, [variable.value for variable in model.trainable_variables])
    assert all(gradient is not None for gradient in gradients)


def test_every_form_of_input_gives_the_same(config, digits):
    images = digits[0][:3]
    model = make(config)
    expected = np.asarray(model(pixel_values=images).logits)
    batch = ImageProcessor(do_resize=False, do_rescale=False, do_normalize=False)(list(images))
    positional = [images, tf.constant(images), [images], (images,), {"pixel_values": images}, batch]
    for inputs in positional:
        np.testing.assert_array_equal(model(inputs).logits, expected)
    np.testing.assert_array_equal(model(**batch).logits, expected)
    np.testing.assert_array_equal(model(images, return_dict=False)[0], expected)
    with pytest.raises(ValueError, match="pixel_value"):
        model({"pixel_value": images})


def test_outputs_are_read_by_attribute_key_and_position(config, digits):
    model = make(config)
    output = model(digits[0][:2], labels=digits[1][:2], output_hidden_states=True)
    assert output.loss is output["loss"] is output[0]
    assert output[:2] == (output.loss, output.logits)
    assert output.to_tuple()[2] is output.hidden_states
    without = model(digits[0][:2])
    assert without.loss is None and "loss" not in without and without[0] is without.logits


@slow_but_for("nat", "swiftformer")
def test_the_config_decides_what_a_call_leaves_open(config, digits):
    model = make(config.replace(output_hidden_states=True, return_dict=False))
    logits, hidden_states = model(digits[0][:2])
    assert logits.shape == (2, 10) and isinstance(hidden_states, tuple)
    model.compile("sgd", metrics=["accuracy"])
    model.fit(digits[0][:20], digits[1][:20], batch_size=10, verbose=0)


@slow_but_for("dinat", "vit_msn")
def test_symbolic_models_reach_outputs_of_any_call(config, digits):
    model = make(config)
    inputs = keras.Input((3, None, None))
    logits = keras.Model(inputs, model(inputs).logits)
    later = keras.Input((3, 32, 32))
    output = model(later, output_hidden_states=True)
    features = keras.Model(later, [output.hidden_states[-1], output.logits])
    images = digits[0][:2]
    expected = model(images, output_hidden_states=True)
    np.testing.assert_allclose(logits(images), expected.logits, atol=1e-5)
    np.testing.assert_allclose(features(images)[0], expected.hidden_states[-1], atol=1e-5)


@slow_but_for("nat", "swiftformer", "vit_msn")
def test_a_graph_takes_unknown_batches_and_sizes(config):
    model = make(config)
    any_size = {"interpolate_pos_encoding": True} if config.model_type == "vit_msn" else {}

    @tf.function(input_signature=[tf.TensorSpec([None, 3, None, None])])
    def run(images):
        return model(images, **any_size).logits

    for shape in ((1, 3, 32, 32), (2, 3, 45, 64), (3, 3, 33, 17)):
        images = np.random.default_rng(0).standard_normal(shape, np.float32)
        np.testing.assert_allclose(run(images), model(images, **any_size).logits, atol=1e-5)


def test_bad_images_are_one_clear_error(config, vit_msn_config):
    model = make(config)
    with pytest.raises(ValueError, match=r"pixel_values has shape \(2, 4, 32, 32\)"):
        model(np.zeros((2, 4, 32, 32), np.float32))
    with pytest.raises(ValueError, match="needs pixel_values"):
        model(labels=np.array([1]))
    vit = make(vit_msn_config)
    with pytest.raises(ValueError, match="pixel_values are 40x32.*interpolate_pos_encoding=True"):
        vit(np.zeros((2, 3, 40, 32), np.float32))


def test_a_wrong_size_known_only_at_run_time_is_refused_too(vit_msn_config):
    model = make(vit_msn_config)
    run = tf.function(lambda x: model(x).logits, input_signature=[tf.TensorSpec([None, 3, None, None])])
    with pytest.raises(tf.errors.InvalidArgumentError, match="not 32x32"):
        run(np.zeros((2, 3, 16, 64), np.float32))  # as many patches as 32x32 has


def test_dropping_happens_in_training_only_and_follows_the_seed(config, digits):
    name = "drop_path_rate" if config.model_type == "swiftformer" else "hidden_dropout_prob"
    images = digits[0][:8]

    def losses():
        keras.utils.set_random_seed(7)
        model = make(config.replace(**{name: 0.5}, **({"layer_scale_init_value": 1.0} if "path" in name else {})))
        return [np.asarray(model(images, training=training).logits) for training in (False, False, True, True)]

    first, second = losses(), losses()
    np.testing.assert_array_equal(first[0], first[1])
    assert not np.array_equal(first[2], first[3])
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


def test_both_attentions_agree_and_another_name_is_refused(vit_msn_config, digits):
    model = make(vit_msn_config)
    outputs = {}
    for name in ("sdpa", "eager"):
        model.set_attn_implementation(name)
        outputs[name] = model(digits[0][:4]).logits
    np.testing.assert_allclose(outputs["sdpa"], outputs["eager"], atol=1e-6)
    with pytest.raises(ValueError, match="attn_implementation is 'flash'; allowed are sdpa, eager"):
        model.set_attn_implementation("flash")
