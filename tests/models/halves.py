"""Both halves behind one face, for tests that ask the same of each: NumPy in, NumPy out."""

import numpy as np
import tensorflow as tf
import torch

import ptmodels
import tfmodels
from tfmodels.weights import checkpoint_variables


def flatten(output) -> dict[str, np.ndarray]:
    """Names the arrays of an output: `logits`, `hidden_states.0`, ..."""
    arrays = {}
    for name, value in output.items():
        if isinstance(value, tuple):
            arrays.update({f"{name}.{index}": to_numpy(entry) for index, entry in enumerate(value)})
        else:
            arrays[name] = to_numpy(value)
    return arrays


def to_numpy(value) -> np.ndarray:
    return value.detach().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


class TorchHalf:
    name = "torch"

    def model(self, architecture: str, source, **kwargs):
        return getattr(ptmodels, architecture).from_pretrained(source, **kwargs)

    def create(self, *args, **kwargs):
        return ptmodels.create_model(*args, **kwargs)

    def run(self, model, training: bool = False, **inputs) -> dict[str, np.ndarray]:
        tensors = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in inputs.items()}
        model.train(training)
        with torch.no_grad():
            return flatten(model(**tensors))

    def gradients(self, model, pixel_values, labels) -> dict[str, np.ndarray]:
        """Gradients of the loss by checkpoint key, and of the images as `pixel_values`."""
        images = torch.from_numpy(pixel_values).requires_grad_()
        model.eval()
        model(images, labels=torch.from_numpy(labels)).loss.backward()
        return {"pixel_values": images.grad.numpy()} | {k: p.grad.numpy() for k, p in model.named_parameters()}

    def buffers(self, model) -> dict[str, np.ndarray]:
        return {key: value.numpy() for key, value in model.named_buffers()}


class KerasHalf:
    name = "keras"

    def model(self, architecture: str, source, **kwargs):
        return getattr(tfmodels, f"TF{architecture}").from_pretrained(source, **kwargs)

    def create(self, *args, **kwargs):
        return tfmodels.create_model(*args, **kwargs)

    def run(self, model, training: bool = False, **inputs) -> dict[str, np.ndarray]:
        return flatten(model(**inputs, training=training))

    def gradients(self, model, pixel_values, labels) -> dict[str, np.ndarray]:
        """Gradients of the loss by checkpoint key, and of the images as `pixel_values`."""
        images = tf.Variable(pixel_values)
        entries = {k: entry for k, entry in checkpoint_variables(model).items() if entry.variable.trainable}
        with tf.GradientTape() as tape:
            loss = model(tf.convert_to_tensor(images), labels=labels).loss
        gradients = tape.gradient(loss, [images, *(entry.variable.value for entry in entries.values())])
        named = zip(entries.items(), gradients[1:], strict=True)
        return {"pixel_values": gradients[0].numpy()} | {
            key: entry.to_checkpoint(gradient.numpy()) for (key, entry), gradient in named
        }

    def buffers(self, model) -> dict[str, np.ndarray]:
        return {k: np.asarray(e.variable) for k, e in checkpoint_variables(model).items() if not e.variable.trainable}


HALVES = [TorchHalf(), KerasHalf()]
