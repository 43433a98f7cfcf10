"""Training only the later stages of a model. Twin: `ptmodels/freezing.py`."""

import keras

from modelspec.configs import ModelConfig
from modelspec.parameter_groups import frozen_keys
from tfmodels.weights import checkpoint_variables


class Freezing:
    """What models have for it; goes before `keras.Model` among the bases."""

    config: ModelConfig

    def freeze(self, upto: str) -> None:
        """Leaves all stages up to and with `upto` out of training, besides those that are left out already.

        Their layers are no longer `trainable`, and their batch normalization stays in inference: it uses its moving
        statistics, and keeps them. Dropout is not affected. A compiled model has to be compiled again.

        Args:
            upto: `"stem"`, `"stage1"`, ..., or `"head"` for all; every layer of ViT-MSN is a stage.

        Raises:
            ValueError: there is no such stage.
        """
        variables = checkpoint_variables(self)
        frozen = frozen_keys(self.config, variables, upto)
        _freeze(self, {id(variables[key].variable) for key in frozen})

    def unfreeze(self) -> None:
        """Ends what `freeze` began: all layers are trained. A compiled model has to be compiled again."""
        self.trainable = False  # TensorFlow takes no notice of a value that is there already
        self.trainable = True


def _freeze(layer: keras.layers.Layer, frozen: set[int]) -> None:
    """Freezes the largest layers all of whose weights are among `frozen`."""
    if layer.weights and all(id(weight) in frozen for weight in layer.weights):
        layer.trainable = False
        return
    for own in layer._layers:
        _freeze(own, frozen)
