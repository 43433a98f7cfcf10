"""Fine-tuning in several processes, seen from the command line: who writes, and what all have to know."""

import contextlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from twinzoo.image_folder import ImageFolder

STRATEGIES = {"torch": ("ddp", "fsdp"), "tf": ("mirrored", "multiworker")}


class Processes:
    """One process alone; the base of several.

    Attributes:
        first: whether this is the process that writes and tells.
    """

    first = True

    def share(self, find: Callable[[], "list[ImageFolder]"]) -> "list[ImageFolder]":
        """Returns the folders that `find` returns in the first process; the others wait for the lists of files."""
        return find()

    def wait(self) -> None:
        """Returns when all processes are here."""

    def finish(self) -> None:
        """Ends it all, when the first process has written everything; the others may wait for that here."""

    def place(self, model: Any) -> Any:
        """Returns a model where this process shall compute."""
        return model


class SeveralProcesses(Processes):
    """Those of an engine.

    Args:
        distributed: the module of the framework's package.
    """

    def __init__(self, distributed: Any):
        self.distributed = distributed
        self.first = distributed.is_first()

    def share(self, find: Callable[[], "list[ImageFolder]"]) -> "list[ImageFolder]":
        from twinzoo.image_folder import ImageFolder

        if self.first:
            found = find()
            self.distributed.share_value([folder.to_dict() for folder in found])
            return found
        return [ImageFolder.from_dict(folder) for folder in self.distributed.share_value(None)]


class TorchProcesses(SeveralProcesses):
    """Those that `torchrun` started."""

    def __init__(self) -> None:
        from ptmodels import distributed

        super().__init__(distributed)

    def wait(self) -> None:
        self.distributed.wait_for_all()

    def place(self, model: Any) -> Any:
        return model.to(self.distributed.own_device())


class KerasProcesses(SeveralProcesses):
    """Those that `TF_CONFIG` lists, or one with several replicas."""

    def __init__(self) -> None:
        import tensorflow

        from tfmodels import distributed

        super().__init__(distributed)
        self.strategy = tensorflow.distribute.get_strategy()

    def wait(self) -> None:
        self.distributed.share_value(None)

    def finish(self) -> None:
        # TensorFlow takes a process that leaves for one that has died, and says so
        with self.distributed.losses_told(), self.strategy.scope():
            self.wait()


def only_helps(strategy: str | None) -> bool:
    """Whether this process is not the first of those that were started, by what their starters say of it."""
    if strategy in STRATEGIES["torch"]:
        return os.environ.get("RANK", "0") != "0"
    if strategy == "multiworker":
        with contextlib.suppress(ValueError, KeyError, TypeError):
            return json.loads(os.environ["TF_CONFIG"])["task"] not in (
                {"type": "chief", "index": 0},
                {"type": "worker", "index": 0},
            )
    return False


@contextlib.contextmanager
def joined(framework: str, strategy: str | None, *, replicas: int | None = None) -> Iterator[Processes]:
    """Inside, this process belongs to those of a strategy; None: it is alone.

    Args:
        framework: `"tf"` or `"torch"`.
        strategy: one of the framework's `STRATEGIES`.
        replicas: of `"mirrored"`: how many devices; all GPUs by default.

    Raises:
        ValueError: the framework has no such strategy, or it was not started as the strategy needs it.
        ProcessLostError: inside, another process was lost.
    """
    allowed = STRATEGIES.get(framework, ())
    if strategy is not None and strategy not in allowed:
        raise ValueError(
            f"strategy is {strategy!r}; allowed with framework {framework} are {', '.join(allowed) or 'none'}"
        )
    if replicas is not None and strategy != "mirrored":
        raise ValueError(f"replicas is {replicas}; it is an option of strategy mirrored")
    if framework == "tf":
        if strategy is None:
            yield Processes()
            return
        from twinzoo.halves import import_half

        import_half(framework, start=False)
        from tfmodels.distributed import joined as joined_in_keras

        with joined_in_keras(strategy, replicas=replicas):
            yield KerasProcesses()
        return
    from ptmodels import distributed

    distributed.check_strategy(strategy)
    if strategy is None:
        yield Processes()
        return
    with _told_when_ended(), distributed.joined(strategy):
        yield TorchProcesses()


@contextlib.contextmanager
def _told_when_ended() -> Iterator[None]:
    """Inside, SIGTERM, by which torchrun ends the processes that are left when one has failed, is an error."""

    def tell(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # this process is ending, and has something to say
        raise ConnectionError(
            "another process of this training has ended, and torchrun ended this one; the state after the last "
            "finished epoch is kept: start again, with as many processes as there are, to go on"
        )

    before = signal.signal(signal.SIGTERM, tell)
    try:
        yield
    except BaseException:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise
    signal.signal(signal.SIGTERM, before)
