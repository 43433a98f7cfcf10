"""A process's share of a batch: what is drawn for it, what is normalised, and what an engine gives back."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from small_training import small_config
from torch import nn
from torch_training import train, trained

import ptmodels.auto
import ptmodels.distributed
import ptmodels.ops
from modelspec.training import ArrayImages, BatchShare, EvaluationBatches, Recipe, TrainingBatches
from ptmodels.layers import BatchNorm2d, Dropout, DropPath


@pytest.fixture
def one_process():
    """`torch.distributed` with this process alone, which needs no port."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("make", [lambda: Dropout(0.4), lambda: DropPath(0.4)], ids=["Dropout", "DropPath"])
def test_shares_of_the_masks_are_those_of_one_process(make):
    x = torch.ones(7, 6, 5, dtype=torch.float64)
    layer = make()
    torch.manual_seed(0)
    whole, after = layer(x), torch.rand(())
    assert set(whole.unique().tolist()) == {0.0, 1 / 0.6}
    parts = []
    for rank in range(3):
        layer.share = BatchShare.of(7, 3, rank)
        torch.manual_seed(0)
        parts.append(layer(x[layer.share.begin : layer.share.stop]))
        assert torch.rand(()) == after  # and so the next layer's are, too
    assert [len(part) for part in parts] == [3, 2, 2]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("layer", [Dropout(0.5), DropPath(0.5), BatchNorm2d(4)], ids=lambda layer: type(layer).__name__)
def test_batches_of_another_size_are_refused(layer):
    layer.share = BatchShare.of(7, 2, 1)
    with pytest.raises(ValueError, match="there are 4 samples; this process's share of 7 is 3"):
        layer(torch.zeros(4, 4, 2, 2))
    assert layer.eval()(torch.zeros(4, 4, 2, 2)).shape == (4, 4, 2, 2)  # of which inference knows nothing
    layer.train().share = None


@pytest.mark.parametrize("shape", [(4, 3, 5, 6), (3, 3, 1, 1)])
def test_shared_batch_normalization_is_that_of_torch(shape, one_process):
    draws = np.random.default_rng(0)
    values, gradients = (torch.from_numpy(draws.standard_normal(shape)) + 3 for _ in range(2))
    found = []
    for layer in (BatchNorm2d(3, eps=1e-3), nn.BatchNorm2d(3, eps=1e-3)):
        ptmodels.distributed.share_batch(layer, BatchShare.of(shape[0], 1, 0))  # nothing to torch's own
        layer.double()
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(draws.uniform(0.5, 1.5, 3)) if not found else found[0][2])
        x = values.clone().requires_grad_()
        output = layer(x)
        output.backward(gradients)
        statistics = (layer.running_mean, layer.running_var, layer.num_batches_tracked)
        found.append((output, x.grad, layer.weight, layer.weight.grad, layer.bias.grad, *statistics))
    assert type(found[0][0].grad_fn).__name__ == "SynchronizedNormalizationBackward"
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_one_value_per_channel_is_refused(one_process):
    layer = BatchNorm2d(3)
    layer.share = BatchShare.of(1, 1, 0)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(torch.zeros(1, 3, 1, 1))


def test_native_attention_runs_under_fsdp(one_process, monkeypatch):
    calls = []
    forward = ptmodels.ops._forward

    def counted(*arguments, **options):
        calls.append(arguments)
        return forward(*arguments, **options)

    monkeypatch.setattr(ptmodels.ops, "_forward", counted)
    train("dinat", "fsdp", recipe={"epochs": 1, "warmup_epochs": 0})
    assert len(calls) == 3 * (8 + 3)  # blocks; parts of steps, and held-out batches


def test_fsdp_gives_the_model_back_as_it_was(one_process):
    model, _, _ = trained("swiftformer", "fsdp", recipe={"epochs": 1, "warmup_epochs": 0, "freeze": "stage1"})
    fresh = ptmodels.auto.model_class("swiftformer")(small_config("swiftformer"))
    assert type(model) is type(fresh) and model.checkpoint_shapes() == fresh.checkpoint_shapes()
    assert list(model.state_dict()) == list(fresh.state_dict()) and not model.training
    for key, parameter in model.named_parameters():
        assert type(parameter) is nn.Parameter and parameter.device.type == "cpu"
        frozen = key.startswith(("swiftformer.patch_embed", "swiftformer.encoder.network.0"))
        assert parameter.requires_grad is not frozen
    images = torch.zeros(2, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    model.train()(images, labels=torch.tensor([0, 1])).loss.backward()  # alone again
    assert images.grad is not None


@pytest.mark.parametrize(
    ("strategy", "reason"),
    [("ddp", "torchrun --standalone --nproc-per-node 2"), ("horovod", "'horovod'; allowed are ddp, fsdp")],
)
def test_who_cannot_join_is_told(strategy, reason, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match=reason), ptmodels.distributed.joined(strategy):
        pass


def test_only_what_torch_says_of_others_is_a_lost_process():
    gloo = "[/src/gloo/transport/tcp/pair.cc:537] Read error [::1]:57570: Connection reset by peer. This is typical"
    with pytest.raises(ptmodels.distributed.ProcessLostError, match=r"answer \(Read error .* by peer\); the state"):
        with ptmodels.distributed.losses_told():
            raise RuntimeError(gloo)
    with pytest.raises(RuntimeError, match="^mat1 and mat2"), ptmodels.distributed.losses_told():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


@pytest.mark.parametrize("mixup", [0.0, 0.4])
def test_shares_of_batches_are_cut_from_them_and_read_nothing_else(mixup):
    read = []

    class Noted(ArrayImages):
        def image(self, index):
            read.append(index)
            return super().image(index)

    data = Noted(np.random.default_rng(0).standard_normal((20, 3, 4, 4)), np.arange(20) % 5)
    batches = TrainingBatches(data, Recipe(batch_size=10, mixup=mixup, seed=4), 5)
    whole = batches.part(1, 1)
    assert sorted(read) == sorted(set(read)) and len(read) == 10
    parts = []
    for rank in range(3):
        read.clear()
        share = BatchShare.of(10, 3, rank)
        parts.append(batches.part(1, 1, share))
        assert len(set(read)) == len(read) and share.size <= len(read) <= (2 if mixup else 1) * share.size
    for array, pieces in zip(whole, zip(*parts, strict=True), strict=True):
        np.testing.assert_array_equal(np.concatenate(pieces), array)


def test_every_held_out_image_counts_once():
    data = ArrayImages(np.arange(7.0)[:, None, None, None] * np.ones((1, 3, 2, 2)), np.arange(7) % 3)
    batches = EvaluationBatches(data, 3, batch_size=3)
    shares = [list(batches.shares(2, rank)) for rank in range(2)]
    assert [[count for _, _, count in share] for share in shares] == [[2, 2, 1], [1, 1, 0]]
    counted = [images[:count, 0, 0, 0] for share in shares for images, _, count in share]
    assert sorted(np.concatenate(counted)) == list(range(7))
    assert all(len(images) == len(targets) > 0 for share in shares for images, targets, _ in share)
