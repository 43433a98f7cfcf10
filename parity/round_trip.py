"""Weights through both halves and back: PyTorch saves, Keras loads and saves, PyTorch loads; every bit must survive."""

import copy
import tempfile
from pathlib import Path

from modelspec.agreement import Agreement, compare, failed
from modelspec.configs import ModelConfig
from parity.halves import Arrays


def round_trip(config: ModelConfig, weights: Arrays) -> dict[str, Arrays]:
    """Returns, by half, the weights that it wrote: Keras those of PyTorch's file, PyTorch those of Keras' file."""
    import keras

    import ptmodels.auto
    import tfmodels.auto
    from tfmodels.weights import read_weights

    torch_class = ptmodels.auto.model_class(config.model_type)
    keras_class = tfmodels.auto.model_class(config.model_type)
    with tempfile.TemporaryDirectory() as folder, keras.device("cpu:0"):
        first, second = Path(folder) / "torch", Path(folder) / "keras"
        torch_class.from_weights(copy.deepcopy(config), weights).save_pretrained(first)
        model = keras_class.from_pretrained(first)
        model.save_pretrained(second)
        back = torch_class.from_pretrained(second)
        return {
            "keras": read_weights(model),
            "torch": {key: value.numpy() for key, value in back.state_dict().items()},
        }


def compare_bits(actual: Arrays, weights: Arrays) -> dict[str, Agreement]:
    """Compares weights by key: equal bit for bit, or not."""
    agreements = {}
    for key in [*weights, *(key for key in actual if key not in weights)]:
        if key not in actual or key not in weights:
            agreements[key] = failed(0.0, "missing", "only one side has it")
        elif actual[key].dtype != weights[key].dtype:
            reason = f"dtype {actual[key].dtype} against {weights[key].dtype}"
            agreements[key] = failed(0.0, "dtype", reason)
        else:
            agreements[key] = compare(actual[key], weights[key], 1.0, 0.0)
    return agreements
