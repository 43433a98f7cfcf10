"""Training only the later stages of a model. Twin: `tfmodels/freezing.py`."""

from typing import Self

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from modelspec.configs import ModelConfig
from modelspec.parameter_groups import frozen_keys


class Freezing(nn.Module):
    """What models have for it; goes before `nn.Module` among the bases."""

    config: ModelConfig
    _frozen: frozenset[str] = frozenset()

    def freeze(self, upto: str) -> None:
        """Leaves all stages up to and with `upto` out of training, besides those that are left out already.

        Their parameters get no gradients, and their batch normalization stays in inference: it uses its running
        statistics, and keeps them. Dropout is not affected.

        Args:
            upto: `"stem"`, `"stage1"`, ..., or `"head"` for all; every layer of ViT-MSN is a stage.

        Raises:
            ValueError: there is no such stage.
        """
        self._frozen |= frozen_keys(self.config, self.state_dict(), upto)
        for name, parameter in self.named_parameters():
            if name in self._frozen:
                parameter.requires_grad_(False)
        self.train(self.training)

    def unfreeze(self) -> None:
        """Ends what `freeze` began: all parameters are trained."""
        self._frozen = frozenset()
        for parameter in self.parameters():
            parameter.requires_grad_(True)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """As of `nn.Module`, but for batch normalization in frozen stages."""
        super().train(mode)
        for name, module in self.named_modules():
            if isinstance(module, _BatchNorm) and f"{name}.running_mean" in self._frozen:
                module.eval()
        return self
