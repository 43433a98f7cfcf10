"""What the claims' benchmark runs."""

import torch

from benchmarks.claims import runner


def test_layers_train_as_inside_a_model():
    layer, x = torch.nn.Linear(3, 2), torch.randn(5, 3)
    train = runner(layer, x, training=True)
    train()
    first = x.grad.clone(), layer.weight.grad.clone()
    train()
    assert torch.equal(x.grad, first[0]) and torch.equal(layer.weight.grad, first[1])
    assert len(x.grad.unique(dim=0)) == 5  # a gradient for each row, as a layer passes on


def test_inference_keeps_no_graph():
    output = runner(torch.nn.Linear(3, 2), torch.randn(5, 3), training=False)()
    assert output.grad_fn is None
