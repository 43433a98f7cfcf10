"""Parameters whose gradient is zero by construction; what frameworks compute for them is rounding noise."""

import re

from modelspec.configs import ModelConfig

_BEFORE_BATCH_NORM = re.compile(r"(patch_embedding\.[03]|depth_wise_conv|network\.\d+\.proj)\.bias")


def has_zero_gradient(config: ModelConfig, key: str, training: bool) -> bool:
    """Whether the gradient of the parameter `key` vanishes, whatever the loss.

    Key biases, since softmax does not feel a shift; SwiftFormer's `w_g` under the softmax of one element; and, in
    training, biases of convolutions before BatchNorm, whose mean takes them out again.
    """
    if config.model_type != "swiftformer":
        return key.endswith("key.bias")
    if key.endswith("w_g"):
        return config.attention_norm == "softmax"
    return training and _BEFORE_BATCH_NORM.search(key) is not None
