"""One case of a whole model and all that run it: both halves, transformers, other operators, runtimes of exports."""

import contextlib
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
import torch
from torch.utils.flop_counter import FlopCounterMode

import ptmodels.artefacts
import tfmodels.artefacts
from benchmarks.other_operators import WAYS, calls_of, other_operators, replace_operator
from modelspec.checkpoints import probing_weights
from modelspec.configs import get_config
from ptmodels.folding import fold_batch_norm as fold_torch
from ptmodels.ops import neighborhood_attention as torch_attention
from tfmodels.folding import fold_batch_norm as fold_keras
from tfmodels.ops import neighborhood_attention as keras_attention

DENSE_TOKENS = 112 * 112  # masks of more do not fit
Run = Callable[[], np.ndarray]


class ModelCase:
    """A classifier of one size of image, batch and purpose, float32, with weights that are the same for all.

    A contender is a function that makes what is to be timed: a function that returns the logits as a NumPy array or, of
    a training step (forward, cross entropy, backward, AdamW), the loss. The learning rate is 0, and nothing is dropped
    out at random: so contenders can be compared after any number of steps.
    """

    def __init__(self, model: str, *, size: int = 224, batch: int = 1, training: bool = False):
        self.model, self.size, self.batch, self.training = model, size, batch, training
        config = get_config(model)
        self.config = config.replace(**{name: 0.0 for name in vars(config) if name.startswith("drop_")})
        self.family = config.model_type
        self.weights = probing_weights(self.config, 0)
        generator = np.random.default_rng(0)
        self.images = generator.standard_normal((batch, 3, size, size), np.float32)
        self.labels = generator.integers(0, config.num_labels, batch)
        self.options = {"interpolate_pos_encoding": True} if self.family == "vit_msn" and size != 224 else {}

    @property
    def name(self) -> str:
        return f"{self.model} {self.size} px, batch {self.batch}, {'training step' if self.training else 'inference'}"

    @property
    def is_neighborhood(self) -> bool:
        return self.family in ("nat", "dinat")

    @property
    def apart(self) -> set[str]:
        """Contenders of some 12 GB, which TensorFlow keeps between calls: each is timed without the rest."""
        return {"keras dense", "keras gather"} if self.training else set()

    def contenders(self) -> dict[str, Callable[[], Run]]:
        """Returns name -> what makes the contender; the first is the reference of the others' outputs."""
        found: dict[str, Callable[[], Run]] = {"torch": self.run_torch, "keras": self.run_keras}
        found["torch compiled"] = functools.partial(self.run_torch, compiled=True)
        if self.family == "swiftformer" and not self.training:
            found["torch folded"] = functools.partial(self.run_torch, folded=True)
            found["torch folded compiled"] = functools.partial(self.run_torch, folded=True, compiled=True)
            found["keras folded"] = functools.partial(self.run_keras, folded=True)
        if not self.training:
            found["keras SavedModel"] = self.run_saved_model
            found["keras predict"] = self.run_predict
        if not self.is_neighborhood:
            found["transformers"] = self.run_transformers
            found["transformers compiled"] = functools.partial(self.run_transformers, compiled=True)
        else:
            for way in WAYS:
                if way == "dense" and (self.size // 4) ** 2 > DENSE_TOKENS:
                    continue
                found[f"torch {way}"] = functools.partial(self.run_torch, way=way)
                found[f"torch {way} compiled"] = functools.partial(self.run_torch, way=way, compiled=True)
                found[f"keras {way}"] = functools.partial(self.run_keras, way=way)
            found["torch composed"] = functools.partial(self.run_torch, composed=True)
            found["keras composed"] = functools.partial(self.run_keras, composed=True)
            if not self.training:
                found["torch operator alone"] = self.run_torch_operator
                found["keras operator alone"] = self.run_keras_operator
        if not self.training and self.size == 224:
            found["onnxruntime"] = self.run_onnxruntime
            if self.family == "swiftformer":
                found["onnxruntime folded"] = functools.partial(self.run_onnxruntime, folded=True)
                if self.batch == 1:
                    found["litert"] = self.run_litert
                    found["litert folded"] = functools.partial(self.run_litert, folded=True)
        return found

    @functools.cached_property
    def flops(self) -> int:
        """Useful floating-point operations: products and sums of matrix products, convolutions and attention."""
        model = self.torch_model().train(self.training)
        model.set_attn_implementation("sdpa" if self.is_neighborhood else "eager")  # so that all are counted
        operators = {
            torch.ops.neighborhood.attention: _count_attention,
            torch.ops.neighborhood.attention_backward: lambda *args, **options: (
                5 * _count_attention(args[1], None, None, None, args[6]) // 2
            ),
        }
        with FlopCounterMode(display=False, custom_mapping=operators) as counter:
            loss = self.torch_loss(model(torch.from_numpy(self.images[:1]), **self.options).logits, self.labels[:1])
            if self.training:
                loss.backward()
        return counter.get_total_flops() * self.batch

    # PyTorch

    def torch_model(self) -> Any:
        cls = ptmodels.auto.model_class(self.family)
        return cls.from_weights(self.config, self.weights).eval()

    def torch_loss(self, logits: torch.Tensor, labels: np.ndarray) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels))

    def run_torch(
        self, *, compiled: bool = False, folded: bool = False, way: str | None = None, composed: bool = False
    ) -> Run:
        model = self.torch_model()
        if folded:
            model = fold_torch(model)
        if way is not None:
            replace_operator(model, other_operators(model, way, calls_of(model, self.size), self.training))
        if composed:
            model.set_attn_implementation("eager")
        return self.run_torch_module(model, compiled)

    def run_transformers(self, *, compiled: bool = False) -> Run:
        import transformers

        classes = {"swiftformer": "SwiftFormer", "vit_msn": "ViTMSN"}
        cls = getattr(transformers, f"{classes[self.family]}ForImageClassification")
        with tempfile.TemporaryDirectory() as folder:  # it reads checkpoints under other names than it gives its layers
            self.torch_model().save_pretrained(folder)
            model = cls.from_pretrained(folder)
        return self.run_torch_module(model, compiled)

    def run_torch_module(self, model: torch.nn.Module, compiled: bool) -> Run:
        images = torch.from_numpy(self.images)
        if self.training:
            model.train()
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
        call = torch.compile(model, dynamic=False) if compiled else model

        def infer() -> np.ndarray:
            with torch.no_grad():
                return call(images, **self.options).logits.numpy()

        def step() -> np.ndarray:
            optimizer.zero_grad()
            loss = self.torch_loss(call(images, **self.options).logits, self.labels)
            loss.backward()
            optimizer.step()
            return loss.detach().numpy()

        return step if self.training else infer

    def run_torch_operator(self) -> Run:
        """The operators of all blocks alone."""
        inputs = []
        for call, table in self.operator_calls():
            inputs.append((torch.from_numpy(_random((3, self.batch, *call[:4]))), torch.from_numpy(table), *call[4:]))

        def run() -> np.ndarray:
            with torch.no_grad():
                for (query, key, value), table, kernel_size, dilation in inputs:
                    output = torch_attention(query, key, value, kernel_size, dilation, rel_pos_bias=table)
            return output.numpy()

        return run

    def operator_calls(self) -> list[tuple[tuple, np.ndarray]]:
        tables = [value for key, value in self.weights.items() if key.endswith(".rpb")]
        return list(zip(calls_of(self.torch_model(), self.size), tables, strict=True))

    # Keras

    def keras_model(self) -> Any:
        cls = tfmodels.auto.model_class(self.family)
        return cls.from_weights(self.config, self.weights, data_format="channels_last")

    @functools.cached_property
    def channels_last_images(self) -> np.ndarray:
        return np.ascontiguousarray(np.moveaxis(self.images, 1, -1))

    def run_keras(self, *, folded: bool = False, way: str | None = None, composed: bool = False) -> Run:
        model = self.keras_model()
        if folded:
            model = fold_keras(model)
        if way is not None:
            calls = calls_of(self.torch_model(), self.size)
            replace_operator(model, other_operators(model, way, calls, self.training))
        if composed:
            model.set_attn_implementation("eager")
        if self.training:
            return self.run_keras_step(model)
        images = tf.constant(self.channels_last_images)
        call = tf.function(lambda images: model(images, training=False, **self.options).logits, autograph=False)
        return lambda: call(images).numpy()

    def run_keras_step(self, model: Any) -> Run:
        optimizer = keras.optimizers.AdamW(0.0)
        optimizer.build(model.trainable_variables)
        images, labels = tf.constant(self.channels_last_images), tf.constant(self.labels)
        loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

        @tf.function(autograph=False)
        def step():
            with tf.GradientTape() as tape:
                loss = loss_of(labels, model(images, training=True, **self.options).logits)
            variables = model.trainable_variables
            optimizer.apply(tape.gradient(loss, [variable.value for variable in variables]), variables)
            return loss

        return lambda: step().numpy()

    def run_predict(self) -> Run:
        model, images = self.keras_model(), self.channels_last_images
        given = {"pixel_values": images}
        if self.options:
            raise ValueError("predict takes no options of a call")
        return lambda: model.predict(given, batch_size=self.batch, verbose=0)["logits"]

    def run_saved_model(self) -> Run:
        with tempfile.TemporaryDirectory() as folder:
            tfmodels.artefacts.write_saved_model(self.keras_model(), folder, native=self.is_neighborhood)
            loaded = tf.saved_model.load(folder)
        serve, images = loaded.signatures["serving_default"], tf.constant(self.channels_last_images)
        return lambda: (loaded, serve(pixel_values=images)["logits"].numpy())[1]

    def run_keras_operator(self) -> Run:
        inputs = []
        for call, table in self.operator_calls():
            tensors = [tf.constant(x) for x in _random((3, self.batch, *call[:4]))]
            inputs.append((*tensors, tf.constant(table), *call[4:]))

        @tf.function(autograph=False)
        def run():
            return [
                keras_attention(query, key, value, kernel_size, dilation, rel_pos_bias=table)
                for query, key, value, table, kernel_size, dilation in inputs
            ]

        return lambda: run()[-1].numpy()

    # Runtimes of exports

    def run_onnxruntime(self, *, folded: bool = False) -> Run:
        import onnxruntime

        model = self.torch_model()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            ptmodels.artefacts.write_onnx(fold_torch(model) if folded else model, path, (self.size, self.size))
            session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return lambda: session.run(["logits"], {"pixel_values": self.images})[0]

    def run_litert(self, *, folded: bool = False) -> Run:
        from ai_edge_litert.interpreter import Interpreter

        model = self.keras_model()
        with tempfile.TemporaryDirectory() as folder, _quiet():
            path = Path(folder) / "model.tflite"
            tfmodels.artefacts.write_litert(fold_keras(model) if folded else model, path, (self.size, self.size))
            interpreter = Interpreter(model_content=path.read_bytes(), num_threads=torch.get_num_threads())
        runner = interpreter.get_signature_runner("serving_default")
        return lambda: runner(pixel_values=self.channels_last_images)["logits"]


def _random(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def _count_attention(query, key, value, table, kernel_size, *_, **__) -> int:
    """The products of queries with keys, and of weights with values."""
    return 4 * int(np.prod(query)) * int(np.prod(kernel_size))


@contextlib.contextmanager
def _quiet():
    """Within the context, what LiteRT's converter tells of itself is dropped."""
    import logging

    logger = tf.get_logger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
