"""How far apart the frameworks' own layers, optimizers and resizers are: the figures of docs/equality.md.

    python -m benchmarks.stock_differences

Each line compares what Keras and PyTorch give out of the box where one would expect the same, in float64: the largest
difference over the rms of PyTorch's result.
"""

from collections.abc import Callable

import numpy as np

from parity.halves import import_frameworks


def main() -> None:
    import_frameworks()
    for what, measure in MEASURES.items():
        actual, reference = (np.asarray(array, np.float64) for array in measure())
        difference = np.abs(actual - reference).max() / np.sqrt(np.mean(np.square(reference)))
        print(f"{what:74} {difference:8.1e}")
    distances()


def _maps() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((4, 7, 7, 16))


def layer_norm():
    import keras
    import torch

    x = _maps()
    layer = keras.layers.LayerNormalization(dtype="float64")
    return layer(x), torch.nn.LayerNorm(16, dtype=torch.float64)(torch.from_numpy(x)).detach()


def batch_norm(momentum: float = 0.99):
    import keras
    import torch

    x = _maps()
    layer = keras.layers.BatchNormalization(momentum=momentum, dtype="float64")
    layer(x, training=True)
    twin = torch.nn.BatchNorm2d(16, momentum=0.1, dtype=torch.float64)
    twin(torch.from_numpy(x).permute(0, 3, 1, 2))
    return keras.ops.convert_to_numpy(layer.moving_variance), twin.running_var


def gelu():
    import keras
    import torch

    x = _maps()
    return keras.ops.gelu(x, approximate=False), torch.nn.functional.gelu(torch.from_numpy(x))


def gelu_tanh():
    import torch

    x = torch.from_numpy(_maps())
    return torch.nn.functional.gelu(x, approximate="tanh"), torch.nn.functional.gelu(x)


def same_padding():
    import keras
    import torch

    x = np.random.default_rng(0).standard_normal((1, 8, 8, 4))
    kernel = np.random.default_rng(1).standard_normal((3, 3, 4, 4))
    ours = keras.ops.conv(x, kernel, strides=2, padding="same")
    maps, weight = torch.from_numpy(x).permute(0, 3, 1, 2), torch.from_numpy(kernel).permute(3, 2, 0, 1)
    return ours, torch.nn.functional.conv2d(maps, weight, stride=2, padding=1).permute(0, 2, 3, 1)


def fused_attention():
    import keras
    import torch

    query, key, value = np.random.default_rng(0).standard_normal((3, 1, 12, 2, 8))
    tensors = (torch.from_numpy(array).transpose(1, 2) for array in (query, key, value))
    wanted = torch.nn.functional.scaled_dot_product_attention(*tensors).transpose(1, 2)
    return keras.ops.dot_product_attention(*(keras.ops.convert_to_tensor(a) for a in (query, key, value))), wanted


def bicubic():
    import keras
    import torch

    grid = np.random.default_rng(0).standard_normal((1, 14, 14, 8))
    ours = keras.ops.image.resize(grid, (20, 20), interpolation="bicubic", data_format="channels_last")
    maps = torch.from_numpy(grid).permute(0, 3, 1, 2)
    return ours, torch.nn.functional.interpolate(maps, (20, 20), mode="bicubic").permute(0, 2, 3, 1)


def _adam(keras_epsilon: float, torch_epsilon: float, steps: int = 10):
    import keras
    import torch

    gradients = np.random.default_rng(0).standard_normal((steps, 64)) * 1e-6
    variable = keras.Variable(np.zeros(64), dtype="float64")
    optimizer = keras.optimizers.Adam(2.0**-10, beta_1=0.875, beta_2=1 - 2.0**-10, epsilon=keras_epsilon)
    optimizer.build([variable])
    parameter = torch.zeros(64, dtype=torch.float64, requires_grad=True)
    twin = torch.optim.Adam([parameter], 2.0**-10, betas=(0.875, 1 - 2.0**-10), eps=torch_epsilon)
    for gradient in gradients:
        optimizer.apply([keras.ops.convert_to_tensor(gradient)], [variable])
        parameter.grad = torch.from_numpy(gradient)
        twin.step()
    return keras.ops.convert_to_numpy(variable), parameter.detach()


MEASURES: dict[str, Callable] = {
    "LayerNormalization, default epsilon (1e-3 and 1e-5)": layer_norm,
    "BatchNormalization, running variance after a step, default momentum": batch_norm,
    "BatchNormalization, the same with equal momentum: biased and unbiased": lambda: batch_norm(0.9),
    "gelu(approximate=False) of Keras: a float32 constant": gelu,
    "GELU, tanh form and exact form": gelu_tanh,
    'strided convolution, padding="same" and padding=1': same_padding,
    "keras.ops.dot_product_attention and scaled_dot_product_attention": fused_attention,
    "bicubic interpolation of positions (a = -0.5 and -0.75)": bicubic,
    "Adam, ten steps, default epsilons (1e-7 and 1e-8), gradients of 1e-6": lambda: _adam(1e-7, 1e-8),
    "Adam, ten steps, equal epsilon 1e-8: before and after the correction": lambda: _adam(1e-8, 1e-8),
}


def distances() -> None:
    """Prints how far the frameworks' resizers are from Pillow's, in units of 1/255."""
    from parity.photograph import read_photograph
    from parity.preprocessing import measure_other_resizers

    for distance in measure_other_resizers(read_photograph()):
        print(
            f"{distance.task:28} {distance.filter:9} {distance.resizer:32} {distance.dtype:8} "
            f"{'antialias' if distance.antialias else '':10} max {distance.maximum:5.2f} mean {distance.mean:.4f}"
        )


if __name__ == "__main__":
    main()
