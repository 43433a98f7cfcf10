"""How Keras' ways of giving inputs to a model become the arguments of its `call`."""

import functools
import inspect
from collections.abc import Callable
from typing import Any


def unpack_inputs(call: Callable) -> Callable:
    """Lets a model's `call` take its inputs as one list, tuple or dict in the first argument, as well as by keyword."""
    names = list(inspect.signature(call).parameters)[1:]

    @functools.wraps(call)
    def unpacked(self: Any, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], (list, tuple)):
            if len(args[0]) > len(names):
                raise ValueError(f"{len(args[0])} inputs were given; {type(self).__name__} takes {', '.join(names)}")
            kwargs = dict(zip(names, args[0], strict=False)) | kwargs
            args = ()
        elif args and isinstance(args[0], dict):
            unknown = [name for name in args[0] if name not in names]
            if unknown:
                raise ValueError(f"inputs {unknown} are unknown; {type(self).__name__} takes {', '.join(names)}")
            kwargs = {name: value for name, value in args[0].items() if value is not None} | kwargs
            args = ()
        return call(self, *args, **kwargs)

    return unpacked
