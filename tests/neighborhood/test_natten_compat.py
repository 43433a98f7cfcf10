"""The names that transformers' NAT and DiNAT import from natten."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from definition import draw

from neighborhood import reference
from ptmodels.natten_compat import natten2dav, natten2dqkrpb


def heads_first(x):
    return torch.tensor(np.moveaxis(x, -2, 1), requires_grad=True)


@pytest.mark.parametrize("dilation", [1, 2])
def test_the_two_steps_are_neighborhood_attention(dilation):
    query, key, value, _, table = draw(0, (2, 11, 12, 3, 4), (5, 5), True)
    logits = natten2dqkrpb(heads_first(query * 0.5), heads_first(key), torch.tensor(table), 5, dilation)
    assert logits.shape == (2, 3, 11, 12, 25)
    probabilities = logits.softmax(-1)
    expected = reference.attention_probabilities(query, key, 5, dilation, rel_pos_bias=table)
    np.testing.assert_allclose(probabilities.detach(), np.moveaxis(expected, -2, 1), atol=1e-13)
    output = natten2dav(probabilities, heads_first(value), 5, dilation)
    expected = reference.neighborhood_attention(query, key, value, 5, dilation, rel_pos_bias=table)
    np.testing.assert_allclose(output.detach(), np.moveaxis(expected, -2, 1), atol=1e-13)


def test_gradients_pass_gradcheck():
    query, key, value, _, table = draw(0, (1, 4, 5, 1, 2), (3, 3), True)
    table = torch.tensor(table, requires_grad=True)

    def function(query, key, value, table):
        return natten2dav(natten2dqkrpb(query, key, table, 3, 1).softmax(-1), value, 3, 1)

    assert torch.autograd.gradcheck(function, (*map(heads_first, (query, key, value)), table))


def test_what_does_not_go_together_is_named():
    x = torch.zeros(1, 2, 5, 6, 4)
    with pytest.raises(ValueError, match=r"give \(B, heads, height, width, channels\)"):
        natten2dqkrpb(x[0], x[0], None, 3, 1)
    with pytest.raises(ValueError, match="rel_pos_bias has shape"):
        natten2dqkrpb(x, x, torch.zeros(2, 3, 3), 3, 1)
    with pytest.raises(ValueError, match="attn has shape"):
        natten2dav(x, x, 3, 1)


def test_code_written_for_natten_runs_after_install():
    code = """
import ptmodels.natten_compat
ptmodels.natten_compat.install()
import torch
from natten.functional import natten2dav, natten2dqkrpb
x = torch.ones(1, 1, 3, 3, 2)
print(natten2dav(natten2dqkrpb(x, x, None, 3, 1).softmax(-1), x, 3, 1).sum().item())
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert float(process.stdout) == pytest.approx(18.0)
