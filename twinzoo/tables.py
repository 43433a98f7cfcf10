"""How the commands of `twinzoo` print tables; rich is imported only when something is printed."""

import os
from typing import Any


def table_of(*headers: str) -> Any:
    """A table without lines; a header that ends in ">" has its column on the right."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for header in headers:
        right = header.endswith(">")
        table.add_column(header.removesuffix(">"), justify="right" if right else "left", no_wrap=right)
    return table


def indented(renderable: Any) -> Any:
    """Moves a table two columns to the right."""
    from rich.padding import Padding

    return Padding(renderable, (0, 0, 0, 2), expand=False)


def standard_output() -> Any:
    """Standard output; what is not a terminal has no edge to wrap lines at."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 200
    return console
