"""What README and docs say runs: the Python word by word, from top to bottom; the commands as they are spelt."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest

import parity.__main__
import twinzoo.__main__

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
RUN_ELSEWHERE = {"docs/serving.md"}  # tests/exports/test_serving.py, with a server
PROGRAMS = {"twinzoo": twinzoo.__main__, "parity": parity.__main__}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def commands(page: str) -> list[list[str]]:
    """The lines of all console blocks, as words, without torchrun; a line that ends in a backslash goes on."""
    lines = "".join(blocks(page, "console")).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines if line.strip()]
    return [line[line.index("-m") + 1 :] if line[0] == "torchrun" else line for line in words]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python") and page not in RUN_ELSEWHERE])
def test_the_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert twinzoo.__main__.main(["digits", "digits"]) == 0
    names = {}
    for block in blocks(page, "python"):
        exec(compile(block, page, "exec"), names)


def test_pages_with_examples_are_found():
    assert {page for page in PAGES if blocks(page, "python")} >= {
        "README.md",
        "docs/fine-tuning.md",
        "docs/exporting.md",
    }
    assert len(commands("README.md")) >= 15 and len(commands("docs/exporting.md")) == 5


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_spelt_as_they_are_taken(page):
    """Subcommands, options and their values exist; make has the targets."""
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for program, *arguments in commands(page):
        if program == "make":
            assert set(arguments) <= set(targets), f"make {' '.join(arguments)}"
        elif program in PROGRAMS:
            said = io.StringIO()
            with contextlib.redirect_stderr(said):
                try:
                    PROGRAMS[program]._parser().parse_args(arguments)
                except SystemExit:
                    pytest.fail(f"{program} {' '.join(arguments)}: {said.getvalue()}")


@pytest.mark.slow
def test_the_commands_of_exporting_run(tmp_path, monkeypatch):
    import ptmodels
    from modelspec import ImageProcessor, get_variant

    monkeypatch.chdir(tmp_path)
    small = {"depths": [1, 1], "num_heads": [1, 2], "embed_dim": 16, "kernel_size": 3, "dilations": [[2], [1]]}
    model = ptmodels.create_model("dinat-mini", config_overrides=small | {"num_labels": 10})
    processor = ImageProcessor(**{**get_variant("dinat-mini").image_processor, "size": 32})
    model.save_pretrained("my-dinat", image_processor=processor)
    assert twinzoo.__main__.main(["digits", "photos"]) == 0
    for program, *arguments in commands("docs/exporting.md"):
        assert PROGRAMS[program].main(arguments) == 0, arguments
    assert {path.name for path in tmp_path.iterdir()} >= {
        *("served", "dinat.onnx", "dinat-any.onnx", "dinat.tflite", "dinat.pt2"),
    }
