"""DiNAT in Keras: NAT with a dilation per block, `config.dilations`. Twin: `ptmodels/dinat.py`.

Paper: Hassani and Shi, Dilated Neighborhood Attention Transformer, 2022 (arXiv:2209.15001). Keys and behaviour: the
Hugging Face implementation.
"""

import keras

from modelspec.configs import DinatConfig
from tfmodels.nat import TFNatBackbone, TFNatForImageClassification, TFNatModel


@keras.saving.register_keras_serializable(package="twinzoo")
class TFDinatModel(TFNatModel):
    """The bare DiNAT; arguments and outputs as of `TFNatModel`."""

    config_class = DinatConfig


@keras.saving.register_keras_serializable(package="twinzoo")
class TFDinatForImageClassification(TFNatForImageClassification):
    """DiNAT with a linear classifier on the mean of the last map; as `TFNatForImageClassification`."""

    config_class = DinatConfig
    body_class = TFDinatModel


@keras.saving.register_keras_serializable(package="twinzoo")
class TFDinatBackbone(TFNatBackbone):
    """DiNAT for detection and segmentation heads; as `TFNatBackbone`."""

    config_class = DinatConfig
