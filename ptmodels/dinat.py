"""DiNAT in PyTorch: NAT with a dilation per block, `config.dilations`. Twin: `tfmodels/dinat.py`.

Paper: Hassani and Shi, Dilated Neighborhood Attention Transformer, 2022 (arXiv:2209.15001). Keys and behaviour: the
Hugging Face implementation.
"""

from modelspec.configs import DinatConfig
from ptmodels.nat import NatBackbone, NatForImageClassification, NatModel


class DinatModel(NatModel):
    """The bare DiNAT; arguments and outputs as of `NatModel`."""

    config_class = DinatConfig


class DinatForImageClassification(NatForImageClassification):
    """DiNAT with a linear classifier on the mean of the last map; as `NatForImageClassification`."""

    config_class = DinatConfig
    body_class = DinatModel


class DinatBackbone(NatBackbone):
    """DiNAT for detection and segmentation heads; as `NatBackbone`."""

    config_class = DinatConfig
