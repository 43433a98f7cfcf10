"""What torch expects of an operator: its own checks, compilation, export, second derivatives."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from definition import ROUNDING, assert_close, attention_and_gradients, draw
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from neighborhood import native, reference
from ptmodels.layers import NeighborhoodAttention2D
from ptmodels.ops import neighborhood_attention, neighborhood_attention_qkvpacked

IMPLEMENTATIONS = ("native", "composed")


def tensors(shape=(1, 5, 6, 2, 3), kernel_size=(3, 2), biased=True):
    query, key, value, _, table = draw(0, shape, kernel_size, biased)
    return [torch.tensor(x, requires_grad=True) for x in (query, key, value, table) if x is not None]


@pytest.mark.parametrize("biased", [True, False])
def test_the_operators_pass_torchs_own_checks(biased):
    query, key, value, *bias = tensors(biased=biased)
    bias = bias[0] if biased else None
    arguments = (query, key, value, bias, [3, 2], [1, 2], 0.3)
    operators = torch.ops.neighborhood
    torch.library.opcheck(operators.attention.default, arguments)
    output, logsumexp = operators.attention(*arguments)
    backward = (torch.rand_like(output), query, key, value, bias, logsumexp.detach(), [3, 2], [1, 2], 0.3)
    torch.library.opcheck(operators.attention_backward.default, backward)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("biased", [True, False])
def test_first_and_second_derivatives_pass_gradcheck(implementation, biased):
    def function(query, key, value, bias=None):
        sizes = ((3, 2), (1, 2))
        return neighborhood_attention(query, key, value, *sizes, rel_pos_bias=bias, implementation=implementation)

    inputs = tensors((1, 4, 5, 1, 2), biased=biased)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_what_needs_no_gradient_gets_none():
    query, key, value, bias = tensors()
    key = key.detach()
    neighborhood_attention(query, key, value, (3, 2), rel_pos_bias=bias.detach()).sum().backward()
    assert query.grad is not None and value.grad is not None


def test_calls_around_the_operators_give_the_same_bits(monkeypatch):
    inputs = tensors((2, 9, 8, 2, 5))
    grad = torch.rand_like(inputs[0])

    def results():
        output = neighborhood_attention(*inputs[:3], (3, 2), rel_pos_bias=inputs[3])
        return output, *torch.autograd.grad(output, inputs, grad)

    around = results()
    assert type(around[0].grad_fn).__name__ == "_AttentionBackward"
    monkeypatch.setattr("ptmodels.ops._is_plain", lambda *_: False)
    called = []
    monkeypatch.setattr("ptmodels.ops._Attention.apply", called.append)
    for ours, theirs in zip(around, results(), strict=True):
        assert torch.equal(ours, theirs)
    assert not called


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", [(2, 70, 3, 5), (2, 9, 21, 2, 16), (1, 5, 6, 20, 1, 8)])
def test_packed_queries_keys_and_values_give_the_same_bits(shape, dtype, implementation):
    axes = len(shape) - 3
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(*shape[:-2], 3, *shape[-2:], generator=generator).to(getattr(torch, dtype)).requires_grad_()
    bias = torch.randn(shape[-2], *(5,) * axes, generator=generator).to(qkv.dtype).requires_grad_()
    options = {"rel_pos_bias": bias, "implementation": implementation}
    grad = torch.randn(shape, generator=generator).to(qkv.dtype)
    query, key, value = (part.contiguous() for part in qkv.unbind(-3))
    for dilation in (1, (1, 2, 3)[-axes:] if axes > 1 else 4):
        apart = neighborhood_attention(query, key, value, 3, dilation, **options)
        packed = neighborhood_attention_qkvpacked(qkv, 3, dilation, **options)
        assert torch.equal(packed, apart)
        wanted = torch.autograd.grad(apart, (qkv, bias), grad, retain_graph=True)
        for found, other in zip(torch.autograd.grad(packed, (qkv, bias), grad), wanted, strict=True):
            assert torch.equal(found, other)


def test_packed_small_maps_and_other_layouts_are_right():
    for shape in [(3, 3, 3, 2, 8), (1, 1, 3, 1, 4), (0, 3, 3, 2, 8)]:
        kernel_size = (min(3, shape[1]), 3)
        qkv = torch.randn(*shape[:-2], 3, *shape[-2:], dtype=torch.float64)
        for layout in (qkv, qkv.transpose(1, 2).contiguous().transpose(1, 2), qkv[..., :1, :].expand(qkv.shape)):
            layout = layout.clone(memory_format=torch.preserve_format).requires_grad_()
            packed = neighborhood_attention_qkvpacked(layout, kernel_size)
            apart = neighborhood_attention(*(part.contiguous() for part in layout.unbind(-3)), kernel_size)
            assert torch.equal(packed, apart)
            grads = [torch.autograd.grad(x.square().sum(), layout)[0] for x in (packed, apart)]
            assert torch.equal(*grads)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_packed_derivatives_pass_gradcheck(implementation):
    def function(qkv, bias):
        options = {"rel_pos_bias": bias, "implementation": implementation}
        return neighborhood_attention_qkvpacked(qkv, (3, 2), (1, 2), **options)

    query, key, value, bias = tensors((1, 4, 5, 1, 2))
    qkv = torch.stack([query, key, value], -3).detach().requires_grad_()
    assert torch.autograd.gradcheck(function, (qkv, bias))
    assert torch.autograd.gradgradcheck(function, (qkv, bias))
    across = qkv.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    assert torch.autograd.gradgradcheck(function, (across, bias))


def test_kernels_take_packed_tensors_as_they_lie(monkeypatch):
    seen = []
    run = native.run_at
    monkeypatch.setattr(native, "run_at", lambda *a: (seen.append((a[0], a[-2], a[1][:3])), run(*a)))
    qkv = torch.randn(1, 5, 6, 3, 2, 4, requires_grad=True)
    places = [part.data_ptr() for part in qkv.unbind(-3)]
    neighborhood_attention_qkvpacked(qkv, 3).sum().backward()
    neighborhood_attention(*qkv.detach().unbind(-3), 3)
    assert seen == [(direction, 24, places) for direction in ("forward", "backward", "forward")]
    seen.clear()
    neighborhood_attention(*(torch.randn(1, 6, 5, 2, 4).transpose(1, 2) for _ in range(3)), 3)
    assert [stride for _, stride, _ in seen] == [0]


def test_packed_arguments_are_checked():
    with pytest.raises(ValueError, match=r"qkv has shape \(1, 5, 2, 3, 4\); give \(batch, \*spatial, 3, heads"):
        neighborhood_attention_qkvpacked(torch.zeros(1, 5, 2, 3, 4), 3)
    with pytest.raises(TypeError, match="qkv is a ndarray; give a torch.Tensor"):
        neighborhood_attention_qkvpacked(np.zeros((1, 5, 3, 2, 4)), 3)
    with pytest.raises(TypeError, match="floating dtype"):
        neighborhood_attention_qkvpacked(torch.zeros(1, 5, 3, 2, 4, dtype=torch.int32), 3)


def test_what_follows_torch_sees_the_operators():
    query, key, value, bias = (x.detach() for x in tensors())

    def attend(x):
        return neighborhood_attention(x, key, value, (3, 2), rel_pos_bias=bias)

    graph = make_fx(attend)(query)
    assert torch.ops.neighborhood.attention.default in [node.target for node in graph.graph.nodes]
    torch.testing.assert_close(graph(query + 1), attend(query + 1), rtol=0, atol=1e-13)
    wanted = torch.autograd.grad(attend(query.requires_grad_()).square().sum(), query)[0]
    found = torch.func.grad(lambda x: attend(x).square().sum())(query.detach())
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    found = torch.func.vmap(lambda x: attend(x[None])[0])(query.detach())
    torch.testing.assert_close(found, attend(query.detach()), rtol=0, atol=1e-12)
    negated = torch._neg_view(-query.detach())  # contiguous, with the sign in a flag of the tensor
    assert negated.is_neg() and torch.equal(attend(negated), attend(query.detach()))


def test_operators_called_without_us_check_their_operands():
    query, key, value, bias = (x.detach() for x in tensors())
    operators = torch.ops.neighborhood
    with pytest.raises(ValueError, match="they must be equal"):
        operators.attention(query, key[:, 1:], value, bias, [3, 2], [1, 1], 1.0)
    with pytest.raises(TypeError, match="for all tensors"):
        operators.attention(query, key, value, bias.float(), [3, 2], [1, 1], 1.0)
    logsumexp = operators.attention(query, key, value, bias, [3, 2], [1, 1], 1.0)[1]
    for grad, sums, message in ((query[1:], logsumexp, "grad_output"), (query, logsumexp.float(), "logsumexp")):
        with pytest.raises(ValueError, match=f"{message} is "):
            operators.attention_backward(grad, query, key, value, bias, sums, [3, 2], [1, 1], 1.0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_layer_compiles_into_one_graph(implementation):
    layer = NeighborhoodAttention2D(8, 2, (3, 5), rel_pos_bias=True, implementation=implementation).double()
    x = torch.randn(1, 7, 8, 8, dtype=torch.float64)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x), layer(x), rtol=0, atol=1e-12)
    x = torch.randn(2, 7, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(compiled(x), layer(x), rtol=0, atol=1e-12)
    assert graphs


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_layer_compiles_with_inductor_and_trains(implementation, dynamic):
    layer = NeighborhoodAttention2D(8, 2, (3, 5), rel_pos_bias=True, implementation=implementation).double()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic)
    for size in (7, 9):
        x = torch.randn(2, size, 8, 8, dtype=torch.float64)
        grads = [torch.autograd.grad(module(x).square().sum(), layer.parameters()) for module in (layer, compiled)]
        for ours, theirs in zip(*grads, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_layer_exports_with_unknown_sizes(implementation):
    layer = NeighborhoodAttention2D(8, 2, (3, 5), 2, rel_pos_bias=True, implementation=implementation).double().eval()
    dynamic = torch.export.Dim.DYNAMIC
    x = torch.randn(2, 11, 12, 8, dtype=torch.float64)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: dynamic, 1: dynamic, 2: dynamic},)).module()
    for shape in [(1, 16, 10), (3, 6, 21)]:
        x = torch.randn(*shape, 8, dtype=torch.float64)
        torch.testing.assert_close(program(x), layer(x), rtol=0, atol=1e-12)


def test_threads_follow_torchs_setting(monkeypatch):
    seen = []
    run = native.run_at
    monkeypatch.setattr(native, "run_at", lambda *a: (seen.append(a[-3]), run(*a)))
    neighborhood_attention(*tensors(biased=False), (3, 2))
    assert seen == [torch.get_num_threads()]


THREADS = """
import os, signal
import torch
from neighborhood import native
from ptmodels import ops

torch.set_num_threads(3)
torch.randn(500, 500) @ torch.randn(500, 500)
before = len(os.listdir("/proc/self/task"))
inputs = [torch.randn(1, 60, 50, 3, 16, requires_grad=True) for _ in range(3)]
output = ops.neighborhood_attention(*inputs, 7)
output.sum().backward()
started = len(os.listdir("/proc/self/task")) - before
child = os.fork()
if child == 0:  # torch's threads are gone: its own operations would wait for them
    signal.alarm(60)
    equal = ops.neighborhood_attention(*inputs, 7).detach().numpy() == output.detach().numpy()
    os._exit(0 if equal.all() else 1)
ended, status = os.waitpid(child, 0)
same = []
choices = (ops._parallel(), None)
for threads in (1, 2, 3):
    torch.set_num_threads(threads)
    for choice in choices:
        ops._parallel = lambda: choice
        same.append(torch.equal(ops.neighborhood_attention(*inputs, 7), output))
print(torch.backends.openmp.is_available(), started, status, all(same))
"""


def test_kernels_run_on_torchs_threads_and_in_forked_children_on_their_own():
    done = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, timeout=120, check=False)
    openmp, started, status, same = done.stdout.split() or [done.stderr]
    assert status == "0" and same == "True"
    assert openmp == "False" or started == "0"


@pytest.fixture
def fused_calls(monkeypatch):
    calls = []
    fused = torch.nn.functional.scaled_dot_product_attention

    def counted(*args, **kwargs):
        calls.append(args)
        return fused(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    return calls


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    "shape, kernel_size, dilation",
    [
        ((3, 11, 14, 2, 8), (5, 3), (1, 2)),
        ((1, 40, 2, 5), (7,), (3,)),
        ((2, 5, 6, 7, 1, 4), (3, 2, 3), (1, 2, 1)),
        ((2, 7, 7, 3, 16), (7, 7), (1, 1)),
    ],
)
def test_composed_attention_without_gradients_is_torchs_fused_one(
    fused_calls, shape, kernel_size, dilation, dtype, biased
):
    *arrays, _, table = draw(1, shape, kernel_size, biased, dtype)
    expected = attention_and_gradients(*arrays, arrays[0], table, kernel_size, dilation)[:1]
    inputs = [
        None if x is None else torch.tensor(x.astype("float64")).to(getattr(torch, dtype)) for x in (*arrays, table)
    ]
    output = neighborhood_attention(
        *inputs[:3], kernel_size, dilation, rel_pos_bias=inputs[3], implementation="composed"
    )
    assert len(fused_calls) == shape[0] and output.dtype == inputs[0].dtype
    bound = {"float64": 1e-12, "float32": 5e-6}.get(dtype) or 20 * ROUNDING[dtype]  # probabilities are rounded too
    assert_close([output.double().numpy()], expected, bound)


@pytest.mark.parametrize(
    "change", ["gradients", "dropout", "probabilities", "infinity", "large", "large bias", "no samples", "vmap"]
)
def test_composed_attention_is_not_fused_where_that_gives_something_else(fused_calls, change):
    query, key, value, bias = (x.detach() for x in tensors((1, 9, 8, 2, 5)))
    options = {}
    if change == "gradients":
        bias.requires_grad_()
    elif change == "dropout":
        options["dropout"] = lambda x: x
    elif change == "probabilities":
        options["return_probabilities"] = True
    elif change == "infinity":
        key[0, 0, 0] = torch.inf
    elif change == "large":  # the first key's products overflow, for queries that do not see it too
        key[0, 0, 0], query[:] = 1e200, 1e200
    elif change == "large bias":
        bias[0, 0, 0] = 1e300
    elif change == "no samples":
        query, key, value = query[:0], key[:0], value[:0]

    def attention(*inputs):
        return neighborhood_attention(*inputs, (3, 2), rel_pos_bias=bias, implementation="composed", **options)

    if change == "vmap":
        output = torch.func.vmap(attention)(query[None], key[None], value[None])[0]
    else:
        output = attention(query, key, value)
    output = output[0] if change == "probabilities" else output
    assert not fused_calls
    if change == "no samples":
        return
    with np.errstate(all="ignore"):
        expected = reference.neighborhood_attention(
            query.numpy(), key.numpy(), value.numpy(), (3, 2), rel_pos_bias=bias.detach().numpy()
        )
    np.testing.assert_allclose(output.detach().numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("implementation", ["auto", "composed"])
def test_forward_mode_derivatives_are_found(implementation):
    query, key, value, bias = (x.detach() for x in tensors())
    tangent = torch.rand_like(query)

    def attention(query):
        return neighborhood_attention(query, key, value, (3, 2), rel_pos_bias=bias, implementation=implementation)

    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(attention(forward_ad.make_dual(query, tangent))).tangent
        with pytest.raises(RuntimeError, match="cannot be had: forward-mode derivatives"):
            neighborhood_attention(query, key, value, (3, 2), implementation="native")
    torch.testing.assert_close(found, torch.func.jvp(attention, (query,), (tangent,))[1])


def test_other_devices_take_the_composed_implementation():
    inputs = [x.detach().to("meta") for x in tensors(biased=False)]
    assert neighborhood_attention(*inputs, (3, 2)).shape == inputs[0].shape
    with pytest.raises(RuntimeError, match="cannot be had: the kernels run on the CPU, and query is on meta"):
        neighborhood_attention(*inputs, (3, 2), implementation="native")


def test_what_is_no_tensor_is_named():
    query, key, value = tensors(biased=False)
    with pytest.raises(TypeError, match="key is a ndarray; give a torch.Tensor"):
        neighborhood_attention(query, key.detach().numpy(), value, 3)


def test_autocast_works():
    query, key, value = (x.detach().float() for x in tensors((1, 9, 9, 2, 8), (3, 3), biased=False))
    layer = NeighborhoodAttention2D(16, 2, 3, rel_pos_bias=True)
    x = torch.randn(1, 9, 9, 16)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), layer(x), rtol=0.05, atol=0.05)


EAGER_FLEX = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # natten's only CPU path


@EAGER_FLEX
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("kernel_size", [3, 7])
def test_nattens_own_forward_agrees(kernel_size, dilation):
    natten = pytest.importorskip("natten", reason="natten is not installed (extra [natten])")
    query, key, value, *_ = draw(3, (1, 15, 17, 2, 16), (kernel_size,) * 2, False, "float32")
    with torch.no_grad():
        theirs = natten.na2d(*map(torch.tensor, (query, key, value)), kernel_size=kernel_size, dilation=dilation)
        ours = neighborhood_attention(*map(torch.tensor, (query, key, value)), kernel_size, dilation)
    expected = reference.neighborhood_attention(query, key, value, kernel_size, dilation)
    assert np.abs(theirs.numpy() - expected).max() < 1e-5
    assert np.abs(ours.numpy() - expected).max() < 1e-5


@EAGER_FLEX
def test_nattens_modules_exchange_state_dicts_with_ours():
    natten = pytest.importorskip("natten", reason="natten is not installed (extra [natten])")
    theirs = natten.NeighborhoodAttention2D(embed_dim=32, num_heads=2, kernel_size=5, dilation=2)
    ours = NeighborhoodAttention2D(32, 2, 5, 2)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(1, 12, 13, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-5)
