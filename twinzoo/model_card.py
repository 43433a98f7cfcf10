"""The model card of a fine-tuned checkpoint: what it is, how good it is, and how alike the two halves are on it."""

import dataclasses
import json
from typing import TYPE_CHECKING, Any, Self

from modelspec import ImageProcessor, list_models

if TYPE_CHECKING:
    from twinzoo.finetuning import Outcome, Run


@dataclasses.dataclass(frozen=True)
class ParityFigures:
    """What comparing the halves on a checkpoint gave.

    Attributes:
        passed: whether all agreed.
        comparisons: how many there were.
        worst: (dtype, half) -> the largest difference, as a part of the array's scale, in words `"float64 keras"`.
        sentence: where they first differ, if they do.
    """

    passed: bool
    comparisons: int
    worst: dict[str, float]
    sentence: str | None

    @classmethod
    def of(cls, report: Any) -> Self:
        """Takes the figures from a `parity.report.Report`."""
        worst: dict[str, float] = {}
        for row in report.results:
            run = f"{row.dtype} {row.half}"
            worst[run] = max(worst.get(run, 0.0), row.agreement.max_rel)
        sentences = [model.explain_divergence() for model in report.models]
        return cls(report.passed, len(report.results), worst, next(filter(None, sentences), None))


def model_card(run: "Run", outcome: "Outcome", config: Any, processor: ImageProcessor) -> str:
    """Returns the text of the card, Markdown with the header of the Hub.

    Args:
        run: what was done.
        outcome: what came out.
        config: of the model.
        processor: of its images.
    """
    published = run.model in list_models()
    base = f"fresh weights of {run.model}" if run.from_scratch else f"`{run.model}`"
    header = [
        "---",
        "library_name: twinzoo",
        "pipeline_tag: image-classification",
        f"tags: [image-classification, vision, {config.model_type}]",
        "metrics: [accuracy]",
    ]
    if not run.from_scratch and not published and run.model.count("/") == 1 and not run.model.startswith((".", "/")):
        header.append(f"base_model: {run.model}")
    size = processor.size
    names = outcome.class_names
    shown = ", ".join(names[:20]) + (f", ... ({len(names)} in all)" if len(names) > 20 else "")
    lines = [
        *header,
        "---",
        "",
        f"# {config.model_type} for {len(names)} classes",
        "",
        f"Trained from {base} on {outcome.training_images} images of {size['height']}x{size['width']} pixels, with "
        f"{'TensorFlow' if run.framework == 'tf' else 'PyTorch'}.",
        "",
        f"Classes: {shown}.",
        "",
        "## How good it is",
        "",
    ]
    if outcome.validation_images:
        lines += [
            f"On {outcome.validation_images} images that were held out of training and used for no choice:",
            "",
            "| | accuracy |",
            "|---|---|",
            f"| this model | {outcome.accuracy:.2%} |",
        ]
        if outcome.baseline is not None:
            lines.append(f"| logistic regression on gray thumbnails of 8x8 | {outcome.baseline:.2%} |")
        lines += ["", "![curves](curves.png)", "", "![confusion matrix](confusion_matrix.png)"]
    else:
        lines.append("No image was held out, so nothing was measured.")
    lines += ["", "## How alike the halves are", "", *_parity_lines(outcome.parity), "", "## Use it", ""]
    lines += _usage(type(config).__name__.removesuffix("Config"))
    recipe = json.dumps(run.recipe.to_dict(), indent=2)
    lines += ["", "## How it was trained", "", "```json", recipe, "```", ""]
    if run.overrides:
        lines += [f"Config fields that differ from the origin's: `{json.dumps(dict(run.overrides))}`.", ""]
    if outcome.notes:
        lines += ["Notes:", "", *(f"- {note}" for note in outcome.notes), ""]
    return "\n".join(lines)


def _parity_lines(parity: ParityFigures | None) -> list[str]:
    if parity is None:
        return ["The Keras and the PyTorch half were not compared on this checkpoint."]
    verdict = "all agree" if parity.passed else f"**they differ**: {parity.sentence}"
    lines = [
        f"Outputs and layers of both halves on a photograph, against PyTorch in float64: {parity.comparisons} "
        f"comparisons, {verdict}. Details: `parity.json`.",
        "",
        "| | largest difference, as a part of the array's scale |",
        "|---|---|",
    ]
    for run, worst in parity.worst.items():
        dtype, half = run.split()
        lines.append(f"| {'Keras' if half == 'keras' else 'PyTorch'}, {dtype} | {worst:.1e} |")
    return lines


def _usage(family: str) -> list[str]:
    return [
        "```python",
        "from PIL import Image",
        f"from tfmodels import AutoImageProcessor, TF{family}ForImageClassification  # Keras, or",
        f"# from ptmodels import AutoImageProcessor, {family}ForImageClassification  # PyTorch",
        "",
        'processor = AutoImageProcessor.from_pretrained("FOLDER")',
        f'model = TF{family}ForImageClassification.from_pretrained("FOLDER")',
        'logits = model(**processor(Image.open("image.png"), return_tensors="tf")).logits',
        "print(model.config.id2label[int(logits[0].numpy().argmax())])",
        "```",
    ]
