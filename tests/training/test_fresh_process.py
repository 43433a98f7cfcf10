"""What Keras saves after training comes back bit for bit in another process."""

import subprocess
import sys

import keras
import numpy as np
import pytest
from families import slow_but_for

from modelspec.agreement import compare_all
from tfmodels.auto import model_class
from tfmodels.weights import read_weights

LOAD_KERAS = """
import sys
import keras, numpy as np
import tfmodels
from tfmodels.weights import read_weights
folder = sys.argv[1]
images = np.load(folder + "/images.npy")
labels = np.zeros(len(images), np.int64)
model = keras.models.load_model(folder + "/model.keras", safe_mode=True)
np.savez(folder + "/keras.npz", logits=model(images).logits, **read_weights(model))
np.savez(folder + "/optimizer.npz", *[np.asarray(variable) for variable in model.optimizer.variables])
again = type(model)(model.config)
again.load_weights(folder + "/model.weights.h5")
np.savez(folder + "/h5.npz", logits=again(images).logits, **read_weights(again))
model.fit(images, labels, verbose=0)  # it goes on training
"""

LOAD_TORCH = """
import sys
import numpy as np, torch
import ptmodels
folder = sys.argv[1]
model = ptmodels.load(folder + "/checkpoint")
with torch.no_grad():
    logits = model(torch.from_numpy(np.load(folder + "/images.npy"))).logits
assert not {"tensorflow", "keras"} & set(sys.modules)
np.savez(folder + "/torch.npz", logits=logits.numpy())
"""


def run(code, folder):
    process = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


def read(path):
    with np.load(path) as arrays:
        return dict(arrays)


@pytest.fixture
def trained(config, digits):
    """A model with dropping layers after two epochs, and images."""
    rate = {"drop_path_rate": 0.2} if config.model_type == "swiftformer" else {"hidden_dropout_prob": 0.2}
    model = model_class(config.model_type)(config.replace(**rate))
    model.compile(keras.optimizers.AdamW(2e-3), metrics=["accuracy"])
    images, labels = digits[0][:40], digits[1][:40]
    model.fit(images, labels, batch_size=20, epochs=2, verbose=0)
    return model, images[:5]


@slow_but_for("swiftformer")
def test_keras_files_reload_bit_equal(trained, tmp_path):
    model, images = trained
    np.save(tmp_path / "images.npy", images)
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    run(LOAD_KERAS, tmp_path)
    expected = read_weights(model) | {"logits": np.asarray(model(images).logits)}
    for file in ("keras.npz", "h5.npz"):
        reloaded = read(tmp_path / file)
        assert set(reloaded) == set(expected)
        different = [key for key, value in expected.items() if not np.array_equal(value, reloaded[key])]
        assert not different
    state = list(read(tmp_path / "optimizer.npz").values())
    assert len(state) == len(model.optimizer.variables)
    for variable, reloaded in zip(model.optimizer.variables, state, strict=True):
        np.testing.assert_array_equal(variable, reloaded)


@slow_but_for("dinat", "swiftformer")
def test_a_trained_keras_model_runs_in_a_process_with_only_torch(trained, tmp_path):
    model, images = trained
    np.save(tmp_path / "images.npy", images)
    model.save_pretrained(tmp_path / "checkpoint")
    run(LOAD_TORCH, tmp_path)
    agreement = compare_all(read(tmp_path / "torch.npz"), {"logits": np.asarray(model(images).logits)}, 2e-5)
    assert agreement["logits"].passed, agreement
