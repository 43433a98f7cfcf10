"""The command `twinzoo export`."""

import argparse
import importlib
import json
import os
from pathlib import Path
from typing import Any

from twinzoo.tables import indented, standard_output, table_of

DONE = 0
# format -> the half it is made from, or both that it can be made from, the default first
FORMATS = {"saved_model": ("tf",), "litert": ("tf",), "onnx": ("torch", "tf"), "program": ("torch",)}
ANY = "any"
_CALIBRATED_WITH = 200


def add_command(commands: argparse._SubParsersAction) -> None:
    """Adds the command to those of `twinzoo`."""
    export = commands.add_parser("export", help="make a file that runs without this package", description=_run.__doc__)
    export.set_defaults(run=_run)
    export.add_argument("source", metavar="SRC", help="folder, file, Hub id or published variant")
    export.add_argument("destination", metavar="DST", help="the file to write, or the folder of a SavedModel")
    export.add_argument("--format", choices=FORMATS, required=True, help="what to make")
    export.add_argument(
        "--framework", choices=("tf", "torch"), help="of the model that is exported (ONNX: torch by default)"
    )
    export.add_argument(
        "--image-size",
        metavar="N",
        help=f"pixels of a side, or {ANY!r} (ONNX, program); default: the checkpoint's. A SavedModel takes any",
    )
    export.add_argument("--top-k", type=int, metavar="N", help="labels that serving_bytes gives (default: 5)")
    export.add_argument(
        "--native", action="store_true", help="keep the native neighborhood attention (SavedModel), which needs us"
    )
    export.add_argument("--fold-batch-norm", action="store_true", help="merge batch normalizations into convolutions")
    export.add_argument("--quantization", choices=("float16", "int8"), help="numbers of fewer bits (LiteRT)")
    export.add_argument(
        "--calibration-images", metavar="DIR", help=f"for int8: images, of which at most {_CALIBRATED_WITH} are read"
    )
    export.add_argument("--json", action="store_true", help="print JSON, and nothing else")


def _run(arguments: argparse.Namespace) -> int:
    """Make a SavedModel, ONNX, LiteRT or torch.export program of a checkpoint. What is made is loaded in a fresh
    process and compared with the live model on photographs before it takes its name: where it differs by more than a
    bound, nothing is left. The difference is printed, and kept in what is made."""
    report = export_checkpoint(
        arguments.source,
        arguments.destination,
        arguments.format,
        framework=arguments.framework,
        image_size=arguments.image_size,
        quantization=arguments.quantization,
        calibration_images=arguments.calibration_images,
        fold_batch_norm=arguments.fold_batch_norm,
        native=arguments.native,
        top_k=arguments.top_k,
    )
    if arguments.json:
        print(json.dumps({name: getattr(report, name) for name in ("path", "kind", "half", "differences", "bound")}))
    else:
        _print_report(report)
    return DONE


def export_checkpoint(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    format: str,
    *,
    framework: str | None = None,
    image_size: int | str | None = None,
    quantization: str | None = None,
    calibration_images: str | os.PathLike | None = None,
    fold_batch_norm: bool = False,
    native: bool = False,
    top_k: int | None = None,
) -> Any:
    """Exports a checkpoint.

    Args:
        source: a folder, a file, a Hub id, or the name of a published variant.
        destination: what to write.
        format: a key of `FORMATS`.
        framework: `"tf"` or `"torch"`; by default what the format is made from.
        image_size: pixels of a side, or `"any"`; by default the image processor's.
        quantization, fold_batch_norm, native, top_k: of the halves' `export_...` functions.
        calibration_images: a folder, searched with all its folders.

    Returns:
        The `modelspec.exports.ExportReport`.

    Raises:
        modelspec.exports.ExportError: what was made differs from the live model.
        ValueError, OSError: the checkpoint cannot be loaded, or an option does not go with the format.
    """
    from parity.quiet_import import standard_error_held_back
    from twinzoo.evaluating import load_trained_classifier
    from twinzoo.halves import import_half, load_processor

    framework = _framework(format, framework)
    options = _options(format, image_size, quantization, calibration_images, native, top_k)
    processor = load_processor(source)
    if calibration_images is not None:
        options["calibration_images"] = _sample(calibration_images)
    import_half(framework)
    exports = importlib.import_module({"tf": "tfmodels.export", "torch": "ptmodels.export"}[framework])
    if format != "saved_model" and "image_size" not in options:
        options["image_size"] = (processor.size["height"], processor.size["width"])
    model = load_trained_classifier(framework, source)
    export = getattr(exports, f"export_{format}")
    options |= {"image_processor": processor, "fold_batch_norm": fold_batch_norm, "verbose": False}
    with standard_error_held_back():  # converters remark on themselves
        return export(model, destination, **options)


def _framework(format: str, framework: str | None) -> str:
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}; allowed are {', '.join(FORMATS)}")
    if framework is not None and framework not in FORMATS[format]:
        raise ValueError(f"framework is {framework!r}; {format} is made from {' or '.join(FORMATS[format])}")
    return framework or FORMATS[format][0]


def _options(
    format: str, image_size: Any, quantization: Any, calibration_images: Any, native: bool, top_k: int | None
) -> dict[str, Any]:
    """Returns the options that were given; each goes with its formats only."""
    given = {
        "quantization": (quantization, ("litert",)),
        "calibration_images": (calibration_images, ("litert",)),
        "native": (native or None, ("saved_model",)),
        "top_k": (top_k, ("saved_model",)),
        "image_size": (image_size, ("onnx", "program") if image_size == ANY else ("litert", "onnx", "program")),
    }
    given = {name: entry for name, entry in given.items() if entry[0] is not None}
    for name, (value, formats) in given.items():
        if format not in formats:
            raise ValueError(f"{name} is {value!r}; that goes with {', '.join(formats)}, not with {format}")
    if (quantization == "int8") != (calibration_images is not None):
        raise ValueError("quantization int8 needs calibration_images, and nothing else does")
    options = {name: value for name, (value, _) in given.items() if name != "calibration_images"}
    if image_size is not None:
        options["image_size"] = None if image_size == ANY else _pixels(image_size)
    return options


def _pixels(image_size: int | str) -> int:
    try:
        return int(image_size)
    except ValueError:
        raise ValueError(f"image_size is {image_size!r}; give pixels, or {ANY!r}") from None


def _sample(folder: str | os.PathLike) -> list[Path]:
    """Returns image files of a folder and the folders in it, evenly from all of them."""
    from twinzoo.image_folder import IMAGE_SUFFIXES

    found = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if not found:
        raise ValueError(f"{folder} holds no images")
    count = min(len(found), _CALIBRATED_WITH)
    return [found[index * len(found) // count] for index in range(count)]


def _print_report(report: Any) -> None:
    from rich.text import Text

    console = standard_output()
    words = {"saved_model": "SavedModel", "onnx": "ONNX", "litert": "LiteRT", "program": "torch.export program"}
    half = {"keras": "Keras", "torch": "PyTorch"}[report.half]
    console.print(
        Text.assemble((report.path, "bold cyan"), f"  {words[report.kind]} of the {half} model"), soft_wrap=True
    )
    table = table_of("against the live model, in a fresh process", "difference>")
    for case, difference in report.differences.items():
        table.add_row(case, f"[bold]{difference:.1e}[/bold]")
    console.print(indented(table))
    console.print(f"Parts of the rms of what the live model gives; the bound is {report.bound:.0e}.", style="dim")
