"""Fine-tuning in several processes, seen from the command line: who writes, and what all have to know."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

STRATEGIES = {"torch": ("ddp", "fsdp")}
Value = TypeVar("Value")


class Processes:
    """One process alone; the base of several.

    Attributes:
        first: whether this is the process that writes and tells.
    """

    first = True

    def share(self, find: Callable[[], Value]) -> Value:
        """Returns what `find` returns in the first process; the others wait for it."""
        return find()

    def wait(self) -> None:
        """Returns when all processes are here."""

    def place(self, model: Any) -> Any:
        """Returns a model where this process shall compute."""
        return model


class TorchProcesses(Processes):
    """Those that `torchrun` started."""

    def __init__(self) -> None:
        from ptmodels import distributed

        self.distributed = distributed
        self.first = distributed.is_first()

    def share(self, find: Callable[[], Value]) -> Value:
        return self.distributed.share_object(find() if self.first else None)

    def wait(self) -> None:
        self.distributed.wait_for_all()

    def place(self, model: Any) -> Any:
        return model.to(self.distributed.own_device())


@contextlib.contextmanager
def joined(framework: str, strategy: str | None) -> Iterator[Processes]:
    """Inside, this process belongs to those of a strategy; None: it is alone.

    Args:
        framework: `"tf"` or `"torch"`.
        strategy: one of the framework's `STRATEGIES`.

    Raises:
        ValueError: the framework has no such strategy, or it was not started as the strategy needs it.
        ProcessLostError: inside, another process was lost.
    """
    allowed = STRATEGIES.get(framework, ())
    if strategy is not None and strategy not in allowed:
        raise ValueError(
            f"strategy is {strategy!r}; allowed with framework {framework} are {', '.join(allowed) or 'none'}"
        )
    if framework != "torch":
        yield Processes()
        return
    from ptmodels import distributed

    distributed.check_strategy(strategy)
    with distributed.joined(strategy):
        yield Processes() if strategy is None else TorchProcesses()
