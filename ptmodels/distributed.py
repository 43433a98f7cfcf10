"""One training in several processes, which `torchrun` starts, on torch's engines: DDP and FSDP.

A batch is cut into shares, one per process, and everything else is as in one process: losses, gradients and batch
normalization are of the whole batch, random masks are those that one process draws, the state is written once.

Sources: Li et al., PyTorch Distributed, VLDB 2020 (arXiv:2006.15704), `DistributedDataParallel`; Zhao et al., PyTorch
FSDP, VLDB 2023 (arXiv:2304.11277), in its second form, `fully_shard`.
"""

import contextlib
import copy
import datetime
import json
import os
import re
from collections.abc import Iterator, Sequence
from inspect import signature
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from modelspec.training import BatchShare, TrainingBatches, TrainingState
from ptmodels.gradient_checkpointing import BlockSequence
from ptmodels.layers import SharesBatch
from ptmodels.pretrained import PreTrainedModel

STRATEGIES = ("ddp", "fsdp")
# How long a process waits for the others inside of a step: longer, and one of them is taken for dead.
STEP_TIMEOUT = datetime.timedelta(seconds=60)
# The same while the first process alone works, for example writes to a slow disk.
WAIT_TIMEOUT = datetime.timedelta(hours=1)
_KEPT = "the state after the last finished epoch is kept: start again, with as many processes as there are, to go on"
# by which strategies, the innermost last, and the processes that wait patiently
_joined: list[tuple[str | None, Any]] = [(None, None)]


class ProcessLostError(ConnectionError):
    """Another process of the training has died, or does not answer."""


def share_batch(model: nn.Module, share: BatchShare | None) -> None:
    """Makes a model's batch normalization and random masks those of a batch that several processes share.

    Training then takes batches of `share.size` samples, in all processes at once; inference is not affected, nor are
    names and checkpoints. For loops of your own around `DistributedDataParallel`; `fine_tune` does it by itself.

    Args:
        model: one of this package.
        share: of each batch; None ends it.
    """
    for module in model.modules():
        if isinstance(module, SharesBatch):
            module.share = share


def check_strategy(strategy: str | None) -> None:
    """Raises if processes were started for no strategy, or a strategy has no processes.

    Raises:
        ValueError: the message says how to start.
    """
    _check_name(strategy)
    started = os.environ.get("WORLD_SIZE")
    if strategy is not None and started is None:
        raise ValueError(
            f"strategy {strategy} trains in the processes that torchrun starts: "
            f"torchrun --standalone --nproc-per-node 2 -m twinzoo finetune ... --strategy {strategy}"
        )
    if strategy is None and int(started or 1) > 1:
        raise ValueError(
            f"there are {started} processes; give a strategy, {' or '.join(STRATEGIES)}, to train together"
        )


def _check_name(strategy: str | None) -> None:
    if strategy not in (None, *STRATEGIES):
        raise ValueError(f"strategy is {strategy!r}; allowed are {', '.join(STRATEGIES)}")


@contextlib.contextmanager
def joined(strategy: str | None) -> Iterator[None]:
    """Inside, `fine_tune` trains together with the other processes that `torchrun` started.

    They are connected by nccl where there are GPUs, each process having the one of its local rank, else by gloo; where
    `torch.distributed` is initialised already, as it is.

    Args:
        strategy: `"ddp"`: every process has the whole model, and gradients are averaged; `"fsdp"`: every process keeps
            a part of each parameter; None: nothing is joined.

    Raises:
        ValueError: another strategy, or `torchrun` has not started this process.
        ProcessLostError: inside, another process was lost.
    """
    _check_name(strategy)
    if strategy is not None and not dist.is_initialized():
        check_strategy(strategy)
        with losses_told(), _connected():
            with joined(strategy):
                yield
        return
    patient = None if strategy is None else dist.new_group(backend="gloo", timeout=WAIT_TIMEOUT)
    _joined.append((strategy, patient))
    try:
        yield
    finally:
        _joined.pop()


@contextlib.contextmanager
def _connected() -> Iterator[None]:
    backend = "gloo"
    if torch.cuda.is_available():
        local_rank, devices = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local_rank >= devices:
            raise ValueError(
                f"process {local_rank} of this machine has no GPU, of which there are {devices}; start as many "
                "processes as there are GPUs, or hide them all, by an empty CUDA_VISIBLE_DEVICES"
            )
        torch.cuda.set_device(local_rank)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=STEP_TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def losses_told() -> Iterator[None]:
    """Turns what torch raises when a process is lost into a `ProcessLostError`."""
    try:
        yield
    except RuntimeError as error:
        said = str(error)
        if isinstance(error, dist.DistError) or any(name in said.lower() for name in ("gloo", "nccl")):
            said = re.sub(r"^\[\S*\] ", "", said).split(". ")[0].splitlines()[0]
            raise ProcessLostError(
                f"another process of this training has died or does not answer ({said}); {_KEPT}"
            ) from error
        raise


def is_first() -> bool:
    """Whether this process is the one that writes: the first, or the only one."""
    return not dist.is_initialized() or dist.get_rank() == 0


def wait_for_all() -> None:
    """Returns when all joined processes are here; patient, since the first one may have to write or to read much."""
    strategy, patient = _joined[-1]
    if strategy is not None:
        dist.barrier(patient)


def share_value(value: Any) -> Any:
    """Returns the first process's value, which JSON can hold, in all joined processes; as patient as `wait_for_all`."""
    return value if _joined[-1][0] is None else _values_of_all(value if is_first() else None)[0]


def _values_of_all(value: Any) -> list[Any]:
    """Returns what each process gave, in the order of their ranks."""
    patient, text = _joined[-1][1], json.dumps(value).encode()
    sizes = torch.zeros(dist.get_world_size(), dtype=torch.int64)
    sizes[dist.get_rank()] = len(text)
    dist.all_reduce(sizes, group=patient)
    texts = [torch.zeros(int(sizes.max()), dtype=torch.uint8) for _ in sizes]
    padded = torch.frombuffer(bytearray(text.ljust(len(texts[0]))), dtype=torch.uint8)
    dist.all_gather(texts, padded, group=patient)
    return [json.loads(bytes(found.tolist())) for found in texts]


def own_device() -> torch.device:
    """Returns where a joined process computes: on the GPU of its local rank, or on the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


class Engine:
    """What trains a model: this process alone; the base of those that train in several.

    Args:
        model: a classifier, frozen as it shall be.

    Attributes:
        model: whose parameters and statistics are trained.
        forward: what gives the model's output in training.
        trained: checkpoint key -> what the optimizer works on; of FSDP, this process's parts.
    """

    processes, rank = 1, 0

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.forward: Any = model
        self.trained = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}

    def prepare(self, batches: TrainingBatches, state: TrainingState | None) -> None:
        """Makes the model ready for batches, and for going on from a state.

        Raises:
            ValueError: the processes cannot share the batches, or have come to something else each.
        """

    def share(self, samples: int) -> BatchShare | None:
        """Returns which of a batch's samples this process takes; None for all of them."""
        return None

    def accumulates(self, last: bool) -> contextlib.AbstractContextManager:
        """Inside, a part of a batch is computed, which may not be the last one."""
        return contextlib.nullcontext()

    def gradients(self) -> list[torch.Tensor]:
        """Returns the gradients of `trained`, of the whole batch, where the optimizer looks for them."""
        return [parameter.grad for parameter in self.trained.values() if parameter.grad is not None]

    def norm(self, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
        """Returns the L2 norm of all gradients together."""
        return torch.nn.utils.get_total_norm(gradients)

    def forget_gradients(self) -> None:
        """Ends a step."""
        for parameter in self.model.parameters():
            parameter.grad = None

    def sum(self, *values: float) -> list[float]:
        """Returns the sums over all processes."""
        return list(values)

    def whole(self, key: str, part: torch.Tensor) -> np.ndarray:
        """Returns a copy of a trained parameter, or of what has its shape and is kept for it, whole.

        In processes that do not write it is an empty array; so it is of `weights`.
        """
        return self.array(part)

    def part(self, key: str, whole: np.ndarray) -> torch.Tensor:
        """Returns this process's part of what `whole` returned, like the parameter."""
        return torch.from_numpy(whole).to(self.trained[key])

    def weights(self) -> dict[str, np.ndarray]:
        """Returns copies of all parameters and statistics, whole, by checkpoint key."""
        return {key: self.array(value) for key, value in self.model.state_dict().items()}

    def array(self, tensor: torch.Tensor) -> np.ndarray:
        """Returns a copy of a tensor, whole."""
        return tensor.detach().cpu().numpy().copy()

    def load(self, weights: dict[str, np.ndarray]) -> None:
        """Sets what `weights` returned."""
        self.model.load_state_dict({key: torch.from_numpy(value) for key, value in weights.items()})

    def finish(self) -> None:
        """Ends a training that succeeded: the model that was given has all that was trained."""

    def close(self) -> None:
        """Ends a training, whatever happened."""


class SeveralProcesses(Engine):
    """What DDP and FSDP share."""

    def __init__(self, model: PreTrainedModel):
        self.processes, self.rank = dist.get_world_size(), dist.get_rank()
        wait_for_all()  # who reads images may be late
        for tensor in (*model.parameters(), *model.buffers()):
            value = tensor.detach().contiguous()
            dist.broadcast(value, 0)
            tensor.detach().copy_(value)
        super().__init__(model)

    def prepare(self, batches: TrainingBatches, state: TrainingState | None) -> None:
        share = BatchShare.of(batches.part_size, self.processes, self.rank)
        if 0 in share.sizes:
            raise ValueError(
                f"parts of {batches.part_size} images cannot be shared by {self.processes} processes; give fewer "
                "processes, a larger batch_size, or fewer accumulation_steps"
            )
        ours = {
            "recipe": batches.recipe.to_dict(),
            "images": len(batches.images.labels),
            "classes": batches.num_labels,
            "finished epochs": 0 if state is None else state.epoch,
        }
        of_first, *others = _values_of_all(ours)
        for rank, theirs in enumerate(others, 1):
            for name in ours:
                if theirs[name] != of_first[name]:
                    raise ValueError(
                        f"process {rank} has {name} {theirs[name]}, and process 0 {of_first[name]}; start all "
                        "with the same arguments, on the same files"
                    )
        share_batch(self.model, share)

    def share(self, samples: int) -> BatchShare | None:
        return BatchShare.of(samples, self.processes, self.rank)

    def array(self, tensor: torch.Tensor) -> np.ndarray:
        whole = _whole(tensor)  # by all together
        return super().array(whole) if self.rank == 0 else np.empty(0)

    def sum(self, *values: float) -> list[float]:
        total = torch.tensor(values, dtype=torch.float64, device=self.model.device)
        dist.all_reduce(total)
        return total.tolist()

    def close(self) -> None:
        share_batch(self.model, None)


class Replicated(SeveralProcesses):
    """DDP: every process has the whole model, and gradients are averaged."""

    def __init__(self, model: PreTrainedModel):
        super().__init__(model)
        engine: Any = nn.parallel.DistributedDataParallel
        # statistics need no broadcast, being those of the whole batch in every process; the option gets a new name
        renamed = "forward_sync_buffers" in signature(engine).parameters
        option = "forward_sync_buffers" if renamed else "broadcast_buffers"
        self.forward = engine(model, init_sync=False, **{option: False})

    def accumulates(self, last: bool) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if last else self.forward.no_sync()


class Sharded(SeveralProcesses):
    """FSDP: every process keeps a part of each parameter, and of what the optimizer keeps for it.

    A block's parameters are put together while it is computed. The model that was given lends its parameters to a copy
    and has none until `finish`.
    """

    def __init__(self, model: PreTrainedModel):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        super().__init__(model)
        self.given, tensors = model, [*model.parameters(), *model.buffers()]
        self.model = self.forward = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
        mesh = init_device_mesh(model.device.type, (self.processes,))
        for module in self.model.modules():
            for blocks in module.children() if isinstance(module, BlockSequence) else ():
                for block in blocks if isinstance(blocks, nn.ModuleList) else ():
                    fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh, reshard_after_forward=True)
        self.given.to("meta")
        # The optimizer gets plain tensors that lie in the same memory, so that all it does is fast and needs no
        # support of distributed tensors.
        self.sharded: dict[str, Any] = {key: p for key, p in self.model.named_parameters() if p.requires_grad}
        self.trained = {key: nn.Parameter(value.to_local().detach()) for key, value in self.sharded.items()}

    def gradients(self) -> list[torch.Tensor]:
        for key, parameter in self.trained.items():
            gradient: Any = self.sharded[key].grad
            parameter.grad = None if gradient is None else gradient.to_local()
        return super().gradients()

    def norm(self, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
        squared = super().norm(gradients).square()
        dist.all_reduce(squared)
        return squared.sqrt()

    def whole(self, key: str, part: torch.Tensor) -> np.ndarray:
        from torch.distributed.tensor import DTensor

        like = self.sharded[key]
        layout = {"shape": like.shape, "stride": like.stride()}
        part = DTensor.from_local(part.detach(), like.device_mesh, like.placements, run_check=False, **layout)
        return self.array(part)

    def part(self, key: str, whole: np.ndarray) -> torch.Tensor:
        like = self.sharded[key]
        return _distributed(torch.from_numpy(whole).to(like.device, like.dtype), like).to_local()

    def load(self, weights: dict[str, np.ndarray]) -> None:
        with torch.no_grad():
            for key, target in self.model.state_dict().items():
                value = torch.from_numpy(weights[key]).to(target.device, target.dtype)
                target.copy_(value if type(target) is torch.Tensor else _distributed(value, target))

    def finish(self) -> None:
        weights = {key: _whole(value).detach().clone() for key, value in self.model.state_dict().items()}
        self.given.load_state_dict(weights, assign=True)


@contextlib.contextmanager
def engine_of(model: PreTrainedModel) -> Iterator[Engine]:
    """Yields what trains a model by the strategy that this process has joined."""
    engines: dict[str | None, type[Engine]] = {None: Engine, "ddp": Replicated, "fsdp": Sharded}
    engine = engines[_joined[-1][0]](model)
    try:
        yield engine
    finally:
        engine.close()


def _distributed(whole: torch.Tensor, like: Any) -> Any:
    """Returns a whole tensor, which all processes have, cut as `like` is."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def _whole(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
