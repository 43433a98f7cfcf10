"""Curves for TensorBoard, whose own writer would load all of TensorFlow."""

import os
import shutil
import socket
import time
from collections.abc import Mapping
from pathlib import Path


class TensorBoardLog:
    """Writes curves, one number per epoch; nothing where the package tensorboard is not installed.

    What an earlier run left in the folder is removed at the first write: a run that goes on writes all its epochs.

    Args:
        folder: made if need be.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder, self.written = Path(folder), 0
        self.path: Path | None = None

    def write(self, history: Mapping[str, list[float]]) -> None:
        """Appends what is new of the curves; epochs count from 1.

        Args:
            history: name -> numbers; `val_...` are of held-out images.

        Raises:
            OSError: it cannot be written.
        """
        try:
            from tensorboard.compat.proto.event_pb2 import Event
            from tensorboard.compat.proto.summary_pb2 import Summary
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError:
            return
        events = []
        if self.path is None:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            self.path = self.folder / f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
            events.append(Event(wall_time=time.time(), file_version="brain.Event:2"))
        epochs = max(map(len, history.values()), default=0)
        for epoch in range(self.written, epochs):
            values = [
                Summary.Value(tag=_tag(name), simple_value=numbers[epoch])
                for name, numbers in history.items()
                if epoch < len(numbers)
            ]
            events.append(Event(wall_time=time.time(), step=epoch + 1, summary=Summary(value=values)))
        with open(self.path, "ab") as file:
            records = RecordWriter(file)
            for event in events:
                records.write(event.SerializeToString())
        self.written = epochs


def _tag(name: str) -> str:
    return f"{name.removeprefix('val_')}/{'held_out' if name.startswith('val_') else 'training'}"
