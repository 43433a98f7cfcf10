"""The argument parser of `twinzoo`: errors in one line, and options that are looked up only when they are needed."""

import argparse
from collections.abc import Callable
from typing import Any, NoReturn

MISUSED = 2


class CommandParser(argparse.ArgumentParser):
    """Says what is wrong in one line, where argparse would print the usage as well.

    Args:
        complete: adds options that are costly to name, before the first arguments are parsed; `twinzoo --help` does
            without them.
        **options: of `argparse.ArgumentParser`.
    """

    def __init__(self, *, complete: Callable[[argparse.ArgumentParser], None] | None = None, **options: Any):
        super().__init__(**options)
        self.complete = complete

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        complete, self.complete = self.complete, None
        if complete is not None:
            complete(self)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        self.exit(MISUSED, f"{self.prog}: error: {message} (see {self.prog} --help)\n")
