"""Pictures of what a model does, of either half's arrays; each function returns a matplotlib figure."""

from twinzoo.plots.attention import attention_rollout, plot_attention
from twinzoo.plots.confusion_matrix import plot_confusion_matrix
from twinzoo.plots.curves import plot_curves
from twinzoo.plots.grad_cam import plot_grad_cam
from twinzoo.plots.neighborhoods import plot_neighborhoods

__all__ = [
    "attention_rollout",
    "plot_attention",
    "plot_confusion_matrix",
    "plot_curves",
    "plot_grad_cam",
    "plot_neighborhoods",
]
