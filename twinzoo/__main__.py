"""The command line: `twinzoo`, also `python -m twinzoo`."""

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from twinzoo import export_command, inference_commands, training_commands
from twinzoo.command_parser import CommandParser

DONE, FAILED = 0, 1

_EPILOG = """\
examples:
  twinzoo info checkpoint.pth                     what is in this file
  twinzoo convert dinat_mini.pth my-dinat --model dinat-mini
  twinzoo convert old-folder new-folder --dtype float16 --max-shard-size 1GB
  twinzoo finetune photos --model dinat_mini.pth --output my-dinat
  twinzoo list 'dinat-*'                          what is published
  twinzoo classify cat.jpg --model my-dinat       what an image shows
  twinzoo evaluate photos --model my-dinat --framework both
  twinzoo probe photos --model vit-msn-small      what features are worth
  twinzoo export my-dinat dinat.onnx --format onnx    to run it without this package

exit status: 0 done; 1 it could not be done; 2 a wrong command
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 0 (done), 1 (it could not be done) or 2 (a wrong command).

    Args:
        argv: the arguments; those of the process by default.
    """
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as leaving:
        return int(leaving.code or 0)
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        return _fail("interrupted")
    except BrokenPipeError:  # as by `| head`
        sys.stderr.close()
        return FAILED
    except (ImportError, OSError, TypeError, ValueError) as error:
        return _fail(" ".join(str(error).split()) or type(error).__name__)


def _fail(reason: str) -> int:
    print(f"twinzoo: error: {reason}", file=sys.stderr)
    return FAILED


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="twinzoo",
        description="Vision transformers in Keras and PyTorch: their files, what they see, and how good they are.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    source = "a folder, a file of weights, a Hub id, or the name of a published variant"
    info = commands.add_parser("info", help="say what is in a file of weights", description=_info.__doc__)
    info.add_argument("path", metavar="PATH", help=source)
    info.add_argument("--revision", help="branch, tag or commit of a Hub repository")
    info.add_argument("--json", action="store_true", help="print JSON instead of a table")
    info.set_defaults(run=_info)
    convert = commands.add_parser(
        "convert", help="rewrite a file for both frameworks and the Hub", description=_convert.__doc__
    )
    convert.add_argument("source", metavar="SRC", help=source)
    convert.add_argument("destination", metavar="DST", help="the folder to write; other files in it are kept")
    convert.add_argument("--model", metavar="NAME", help="the published variant, where the file cannot tell")
    convert.add_argument("--dtype", default="auto", help="float32, float16, bfloat16, float64; the file's by default")
    convert.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="limit of one file (default: 5GB)")
    convert.add_argument("--kernel-size", type=int, metavar="K", help="resize NAT's and DiNAT's tables of biases")
    convert.add_argument("--image-size", type=int, metavar="N", help="resize ViT-MSN's table of positions")
    convert.add_argument(
        "--attention-norm", metavar="NORM", help="SwiftFormer's: softmax or l2 (default: what the source was made for)"
    )
    convert.add_argument("--revision", help="branch, tag or commit of a Hub repository")
    convert.add_argument("--json", action="store_true", help="print JSON instead of a table")
    convert.set_defaults(run=_convert)
    training_commands.add_commands(commands)
    inference_commands.add_commands(commands)
    export_command.add_command(commands)
    return parser


def _info(arguments: argparse.Namespace) -> int:
    """Say what is in a file of weights: format, dialect, family, variant, dtype, labels, missing and other keys."""
    import dataclasses

    from modelspec.checkpoints import describe

    found = dataclasses.asdict(describe(arguments.path, arguments.revision))
    if arguments.json:
        print(json.dumps(found, indent=2))
        return DONE
    labels = found["labels"]
    found["labels"] = ", ".join(labels[:3]) + (f", ... {labels[-1]}" if len(labels) > 3 else "")
    found["parameters"] = f"{found['parameters']:,}"
    found["sha256"] = "right" if found["sha256"] else "none"
    _print_table(found)
    return DONE


def _convert(arguments: argparse.Namespace) -> int:
    """Rewrite a checkpoint of any known format and dialect as config.json and model.safetensors, for both frameworks
    and for the Hub."""
    import dataclasses

    from modelspec.checkpoints import convert

    options = {name: getattr(arguments, name) for name in ("kernel_size", "image_size", "attention_norm")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = convert(
            arguments.source,
            arguments.destination,
            model=arguments.model,
            dtype=arguments.dtype,
            max_shard_size=arguments.max_shard_size,
            revision=arguments.revision,
            **{name: value for name, value in options.items() if value is not None},
        )
    found = {"written": arguments.destination} | dataclasses.asdict(report)
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        _print_table(found)
    return DONE


def _print_table(rows: dict) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        if isinstance(value, list):
            entries = [_with_shapes(entry) for entry in value]
            more = f", and {len(entries) - 8} more" if len(entries) > 8 else ""
            value = ", ".join(entries[:8]) + more
        table.add_row(name.replace("_", " "), Text("-" if value in (None, "") else str(value)))
    Console(highlight=False).print(table)


def _with_shapes(entry: Any) -> str:
    if isinstance(entry, str):
        return entry
    key, found, needed = entry
    return f"{key} {tuple(found)} -> {tuple(needed)}"


if __name__ == "__main__":
    sys.exit(main())
