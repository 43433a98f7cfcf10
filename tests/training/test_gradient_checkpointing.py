"""Training with gradient checkpointing is training without it, in less memory."""

import copy
import gc
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf
import torch

import ptmodels
import ptmodels.auto
import ptmodels.ops
import tfmodels
import tfmodels.auto
import tfmodels.ops
from modelspec.agreement import compare_all
from modelspec.checkpoints import probing_weights
from modelspec.parameter_groups import frozen_keys
from tfmodels.weights import checkpoint_variables, read_weights

RATES = (
    *("drop_path_rate", "hidden_dropout_prob", "attention_probs_dropout_prob"),
    *("drop_mlp_rate", "drop_conv_encoder_rate"),
)
IMAGES, LABELS = np.random.default_rng(0).standard_normal((4, 3, 32, 32)), np.array([0, 1, 2, 3])


def dropping(config, **kept):
    rates = {name: 0.25 for name in RATES if hasattr(config, name)}
    return config.replace(**rates | kept)


def make(half, config, checkpointing, dtype="float64"):
    model = half.auto.model_class(config.model_type).from_weights(
        config.replace(), probing_weights(config), dtype=dtype
    )
    if checkpointing:
        model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing == checkpointing
    return model


def keras_run(config, checkpointing, steps=2, dtype="float64", **options):
    """Losses and gradients of some steps without updates, and the state after them."""
    keras.utils.clear_session()  # the global seed as well, which the next line leaves alone before Keras 3.13
    keras.utils.set_random_seed(0)
    model = make(tfmodels, config, checkpointing, dtype)
    variables = [variable.value for variable in model.trainable_variables]
    losses, gradients = [], {}
    for step in range(steps):
        with tf.GradientTape() as tape:
            loss = model(IMAGES, labels=LABELS, training=True, **options).loss
        losses.append(float(loss))
        found = tape.gradient(loss, variables)
        gradients |= {f"step {step}, variable {index}": value.numpy() for index, value in enumerate(found)}
    return losses, gradients, [variable.numpy() for variable in model.variables]


def torch_run(model, steps=2):
    """The same of a torch model."""
    torch.manual_seed(0)
    model.train()
    losses, gradients = [], {}
    for step in range(steps):
        model.zero_grad()
        loss = model(torch.from_numpy(IMAGES), labels=torch.from_numpy(LABELS)).loss
        loss.backward()
        losses.append(loss.item())
        gradients |= {f"{step} {key}": value.grad.numpy().copy() for key, value in model.named_parameters()}
    return losses, gradients, [value.numpy().copy() for value in model.state_dict().values()]


def assert_same(run, plain):
    (losses, gradients, state), (plain_losses, plain_gradients, plain_state) = run, plain
    assert losses == plain_losses
    assert_close(gradients, plain_gradients)
    # statistics, counts of batches and random seeds, bit for bit
    for value, plain_value in zip(state, plain_state, strict=True):
        np.testing.assert_array_equal(value, plain_value)


def assert_close(found, reference):
    agreements = compare_all(found, reference, 1e-12)
    # of a gradient that is zero by construction, only rounding is left
    largest = max(np.abs(value).max() for value in reference.values())
    judged = {key: value for key, value in agreements.items() if value.max_abs > 1e-15 * largest}
    assert len(agreements) == len(reference)
    assert not {key: value for key, value in judged.items() if not value.passed}


def counting(function):
    """The function, and a list that gets an entry for each call."""
    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        return function(*args, **kwargs)

    return counted, calls


# DiNAT is the subject of test_native_attention_runs_again_too
@pytest.mark.parametrize("config", ["nat", "swiftformer", "vit_msn"], indirect=True)
def test_keras_finds_the_gradients_that_it_finds_without(config):
    plain = keras_run(dropping(config), False)
    assert plain[0][0] != plain[0][1], "the masks of two steps are the same, and show nothing"
    assert_same(keras_run(dropping(config), True), plain)


def test_torch_finds_the_gradients_that_it_finds_without(config):
    plain = torch_run(make(ptmodels, dropping(config), False))
    assert plain[0][0] != plain[0][1], "the masks of two steps are the same, and show nothing"
    assert_same(torch_run(make(ptmodels, dropping(config), True)), plain)


@pytest.mark.parametrize("family", ["swiftformer", "nat"])
def test_fitting_ends_with_the_same_weights(family, swiftformer_config, nat_config):
    if family == "swiftformer":
        config = dropping(swiftformer_config, depths=[2], embed_dims=[16], downsamples=[True])
    else:
        config = dropping(nat_config, attention_probs_dropout_prob=0.0, depths=[1], num_heads=[2])
    ends = []
    for checkpointing in (False, True):
        keras.utils.set_random_seed(0)
        model = make(tfmodels, config, checkpointing)
        model.compile(keras.optimizers.SGD(2**-4), jit_compile=False)
        model.fit(IMAGES, LABELS, batch_size=2, epochs=2, shuffle=False, verbose=0)
        ends.append(read_weights(model))
    assert_close(ends[1], ends[0])  # TensorFlow orders the arithmetic of two graphs in two ways
    before = probing_weights(config)
    moved = [key for key in before if not np.array_equal(ends[1][key], before[key])]
    assert any(key.endswith("running_var") for key in moved) == (family == "swiftformer")


@pytest.mark.parametrize("how", ["gradient outside", "compiled by XLA"])
def test_traced_functions_find_the_same_gradients(vit_msn_config, how):
    config = dropping(vit_msn_config, num_hidden_layers=1)

    def find_gradients(checkpointing):
        keras.utils.set_random_seed(0)
        model = make(tfmodels, config, checkpointing)

        def forward():
            return model(IMAGES, labels=LABELS, training=True).loss

        def gradients(forward):
            with tf.GradientTape() as tape:
                loss = forward()
            return tape.gradient(loss, [variable.value for variable in model.trainable_variables])

        if how == "gradient outside":
            found = gradients(tf.function(forward))
        else:
            found = tf.function(lambda: gradients(forward), jit_compile=True)()
        return {f"variable {index}": value.numpy() for index, value in enumerate(found)}

    assert_close(find_gradients(True), find_gradients(False))


def test_mixed_precision_finds_the_same_gradients(vit_msn_config):
    runs = [
        keras_run(dropping(vit_msn_config), checkpointing, steps=1, dtype="mixed_bfloat16")
        for checkpointing in (False, True)
    ]
    assert_same(*runs)


@pytest.mark.parametrize("half", [ptmodels, tfmodels])
def test_blocks_run_again_for_the_gradients_of_training_alone(half, config):
    activation, calls = counting({ptmodels: torch.relu, tfmodels: keras.ops.relu}[half])
    model = make(half, config.replace(hidden_act=activation), True)
    once = 2 if config.model_type in ("swiftformer", "vit_msn") else 3
    for training in (True, False):
        calls.clear()
        if half is ptmodels:
            loss = model.train(training)(torch.from_numpy(IMAGES), labels=torch.from_numpy(LABELS)).loss
            assert len(calls) == once
            loss.backward()
        else:
            with tf.GradientTape() as tape:
                loss = model(IMAGES, labels=LABELS, training=training).loss
            assert len(calls) == once
            tape.gradient(loss, [variable.value for variable in model.trainable_variables])
        assert len(calls) == (2 * once if training else once)


def test_torch_keeps_less_than_half_for_the_backward_pass(vit_msn_config):
    model = make(ptmodels, dropping(vit_msn_config, num_hidden_layers=6), False).train()
    kept = []
    for switch in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        switch()
        tensors = {}

        def keep(tensor, tensors=tensors):
            tensors[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(torch.from_numpy(IMAGES), labels=torch.from_numpy(LABELS))
        for parameter in model.parameters():
            tensors.pop(parameter.untyped_storage().data_ptr(), None)
        kept.append(sum(tensor.untyped_storage().nbytes() for tensor in tensors.values()))
    assert kept[1] < kept[0] / 2


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("config", ["swiftformer", "vit_msn"], indirect=True)
def test_keras_keeps_nothing_from_inside_of_blocks(config, checkpointing):
    inside = []

    def activation(x):
        inside.append(weakref.ref(x))
        return keras.ops.square(x)

    model = make(tfmodels, config.replace(hidden_act=activation), checkpointing)
    with tf.GradientTape() as tape:
        loss = model(IMAGES, labels=LABELS, training=True).loss
    gc.collect()
    assert len(inside) > 1
    assert [tensor() is None for tensor in inside] == [checkpointing] * len(inside)
    assert tape.gradient(loss, model.trainable_variables[0].value) is not None


def test_native_attention_runs_again_too(dinat_config, monkeypatch):
    config = dropping(dinat_config, attention_probs_dropout_prob=0.0)
    kernels, calls = counting(tfmodels.ops._native_attention)
    monkeypatch.setattr(tfmodels.ops, "_native_attention", kernels)
    assert_same(keras_run(config, True), keras_run(config, False))
    assert len(calls) == 2 * 3 * (2 + 1)  # steps, blocks, passes
    kernels, calls = counting(ptmodels.ops._forward)
    monkeypatch.setattr(ptmodels.ops, "_forward", kernels)
    assert_same(torch_run(make(ptmodels, config, True)), torch_run(make(ptmodels, config, False)))
    assert len(calls) == 2 * 3 * (2 + 1)


def test_frozen_stages_stay_frozen(swiftformer_config):
    config = dropping(swiftformer_config)
    ours, theirs = [], []
    for checkpointing in (False, True):
        model = make(ptmodels, config, checkpointing)
        model.freeze("stage1")
        optimizer = torch.optim.SGD(model.train().parameters(), 2**-4)
        torch.manual_seed(0)
        model(torch.from_numpy(IMAGES), labels=torch.from_numpy(LABELS)).loss.backward()
        optimizer.step()
        ours.append({key: value.numpy() for key, value in model.state_dict().items()})
        keras.utils.set_random_seed(0)
        model = make(tfmodels, config, checkpointing)
        model.freeze("stage1")
        model.compile(keras.optimizers.SGD(2**-4), run_eagerly=True)
        model.train_on_batch(IMAGES, LABELS)
        theirs.append(read_weights(model))
    before = probing_weights(config)
    for plain, found in (ours, theirs):
        assert_close(found, plain)
        assert all(np.array_equal(found[key], before[key]) for key in frozen_keys(config, before, "stage1"))
        assert not np.array_equal(found["head.weight"], before["head.weight"])


def test_a_copy_runs_its_own_blocks(config):
    model = make(ptmodels, dropping(config), True)
    copied = copy.deepcopy(model)
    assert copied.is_gradient_checkpointing
    plain = torch_run(make(ptmodels, dropping(config), False))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert_same(torch_run(copied), plain)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    copied.gradient_checkpointing_disable()
    assert model.is_gradient_checkpointing


def test_the_backward_pass_may_run_twice(swiftformer_config):
    found = []
    for checkpointing in (False, True):
        model = make(ptmodels, dropping(swiftformer_config), checkpointing).train()
        torch.manual_seed(0)
        loss = model(torch.from_numpy(IMAGES), labels=torch.from_numpy(LABELS)).loss
        loss.backward(retain_graph=True)
        loss.backward()
        found.append({key: parameter.grad.numpy() for key, parameter in model.named_parameters()})
        found[-1] |= {key: value.numpy() for key, value in model.named_buffers()}
    assert_close(found[1], found[0])


@pytest.mark.parametrize("half", [ptmodels, tfmodels])
@pytest.mark.parametrize("config", ["nat", "swiftformer", "vit_msn"], indirect=True)
def test_hidden_states_and_attentions_are_those_without(half, config):
    options = {"output_hidden_states": True}
    options |= {} if config.model_type == "swiftformer" else {"output_attentions": True}
    outputs = []
    for checkpointing in (False, True):
        keras.utils.set_random_seed(0)
        torch.manual_seed(0)
        model = make(half, dropping(config), checkpointing)
        if half is ptmodels:
            output = model.train()(torch.from_numpy(IMAGES), **options)
        else:
            output = model(IMAGES, training=True, **options)
        outputs.append(output)
    plain, found = outputs
    assert list(found) == list(plain)
    for key in plain:
        values = [(found[key], plain[key])] if key == "logits" else zip(found[key], plain[key], strict=True)
        for value, plain_value in values:
            if half is ptmodels:
                value, plain_value = value.detach(), plain_value.detach()
            np.testing.assert_array_equal(value, plain_value)


def test_head_masks_get_their_gradients(vit_msn_config):
    ours, theirs = [], []
    for checkpointing in (False, True):
        mask = torch.ones(2, 2, dtype=torch.float64, requires_grad=True)
        model = make(ptmodels, vit_msn_config, checkpointing).train()
        model(torch.from_numpy(IMAGES), labels=torch.from_numpy(LABELS), head_mask=mask).loss.backward()
        ours.append({"head_mask": mask.grad.numpy()})
        mask = tf.ones((2, 2), "float64")
        model = make(tfmodels, vit_msn_config, checkpointing)
        with tf.GradientTape() as tape:
            tape.watch(mask)
            loss = model(IMAGES, labels=LABELS, head_mask=mask, training=True).loss
        theirs.append({"head_mask": tape.gradient(loss, mask).numpy()})
    assert np.all(ours[0]["head_mask"] != 0.0)
    for found in (ours[1], *theirs):
        assert_close(found, ours[0])


def test_activations_may_draw_from_the_global_seed(vit_msn_config):
    config = vit_msn_config.replace(hidden_act=lambda x: keras.random.dropout(x, 0.5))
    plain = keras_run(config, False)
    assert plain[0][0] != plain[0][1]
    assert_same(keras_run(config, True), plain)


def test_a_compiled_model_follows_the_switch(vit_msn_config):
    activation, calls = counting(keras.ops.relu)
    model = make(tfmodels, vit_msn_config.replace(hidden_act=activation), False)
    model.compile("sgd", jit_compile=False)
    traced = []
    for switch in (lambda: None, model.gradient_checkpointing_enable, model.gradient_checkpointing_disable):
        switch()
        calls.clear()
        model.train_on_batch(IMAGES, LABELS)
        traced.append(len(calls))
    assert traced == [2, 4, 2]


def test_nothing_of_it_is_saved(swiftformer_config, tmp_path):
    plain, model = (make(tfmodels, swiftformer_config, checkpointing) for checkpointing in (False, True))
    keys = list(checkpoint_variables(plain))
    assert list(checkpoint_variables(model)) == keys
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert not loaded.is_gradient_checkpointing
    np.testing.assert_array_equal(loaded(IMAGES).logits, plain(IMAGES).logits)
    plain, model = (make(ptmodels, swiftformer_config, checkpointing) for checkpointing in (False, True))
    assert list(model.state_dict()) == list(plain.state_dict())
    assert model.config == plain.config


@pytest.mark.parametrize("half", [ptmodels, tfmodels])
def test_every_class_has_the_verbs(half, config):
    prefix = {"vit_msn": "ViTMSN", "swiftformer": "SwiftFormer", "nat": "Nat", "dinat": "Dinat"}[config.model_type]
    for task in ("Model", "ForImageClassification", "Backbone"):
        model = getattr(half, f"{'TF' if half is tfmodels else ''}{prefix}{task}")(config)
        assert not model.is_gradient_checkpointing
        model.gradient_checkpointing_enable()
        assert model.is_gradient_checkpointing and model.get_body().is_gradient_checkpointing
        model.gradient_checkpointing_disable()
        assert not model.is_gradient_checkpointing


def test_torch_takes_the_arguments_of_transformers(vit_msn_config):
    model = make(ptmodels, vit_msn_config, False)
    with pytest.raises(ValueError, match="use_reentrant is True; gradient checkpointing has use_reentrant=False"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match="every_n_layers is 2"):
        model.gradient_checkpointing_enable(every_n_layers=2)
    assert not model.is_gradient_checkpointing
    model.gradient_checkpointing_enable({"use_reentrant": False}, every_n_layers=1, offload=False)
    assert model.is_gradient_checkpointing


def test_compiled_torch_models_find_the_same_gradients(vit_msn_config):
    config = dropping(vit_msn_config, num_hidden_layers=1)
    model = make(ptmodels, config, True)
    model.compile(backend="aot_eager")
    assert_same(torch_run(model), torch_run(make(ptmodels, config, False)))
