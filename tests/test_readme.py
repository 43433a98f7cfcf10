"""What README and docs say runs: the Python word by word, from top to bottom; the commands as they are spelt."""

import contextlib
import io
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

import parity.__main__
import twinzoo.__main__

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md"]
PAGES += [
    str(path.relative_to(ROOT)) for pattern in ("docs/*.md", "notebooks/*.ipynb") for path in sorted(ROOT.glob(pattern))
]
RUN_ELSEWHERE = {"docs/serving.md"}  # tests/exports/test_serving.py, with a server
PROGRAMS = {"twinzoo": twinzoo.__main__, "parity": parity.__main__}


def text_of(page: str) -> str:
    """The page's Markdown; a notebook's is in cells of its own."""
    text = (ROOT / page).read_text(encoding="utf-8")
    if page.endswith(".ipynb"):
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells)
    return text


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text_of(page), re.DOTALL)


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
    """Subcommands, options and their values exist; make has the targets, benchmarks the options."""
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for program, *arguments in commands(page):
        if program == "make":
            assert set(arguments) <= set(targets), f"make {' '.join(arguments)}"
        elif "-m" in arguments and arguments[arguments.index("-m") + 1].startswith("benchmarks."):
            module = arguments[arguments.index("-m") + 1]
            source = (ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
            for option in (word for word in arguments if word.startswith("--")):
                assert f'"{option}"' in source, f"{module} {option}"
        elif program in PROGRAMS:
            said = io.StringIO()
            with contextlib.redirect_stderr(said):
                try:
                    PROGRAMS[program]._parser().parse_args(arguments)
                except SystemExit:
                    pytest.fail(f"{program} {' '.join(arguments)}: {said.getvalue()}")


def test_commands_in_notebooks_are_found():
    assert [line[:2] for line in commands("notebooks/2-fine-tune.ipynb")] == [
        ["twinzoo", "digits"],
        ["twinzoo", "finetune"],
    ]
    assert len(commands("notebooks/3-export-and-serve.ipynb")) == 5


def slug(heading: str) -> str:
    """The anchor that is made of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings_that_are_there(page):
    for target, anchor in re.findall(
        r"\]\(([^)\s#]*)(#[^)\s]+)?\)", re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL)
    ):
        if target.startswith("https://"):
            continue
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", text_of(str(path.resolve().relative_to(ROOT))), re.MULTILINE)
            assert anchor[1:] in map(slug, headings), target + anchor


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with what the commands name: small checkpoints, whole files of others, a photograph, digits."""
    import torch

    import ptmodels
    from modelspec import ImageProcessor, get_variant
    from modelspec.exports.photographs import read_photographs

    folder = tmp_path_factory.mktemp("prepared")
    names = {"id2label": {number: str(number) for number in range(10)}}
    windows = {"depths": [1, 1], "num_heads": [1, 2], "embed_dim": 16, "kernel_size": 3}
    tokens = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    for name, variant, small in (
        ("my-checkpoint", "vit-msn-small", tokens | {"image_size": 32}),
        ("my-nat", "nat-mini", windows),
        ("my-dinat", "dinat-mini", windows | {"dilations": [[2], [1]]}),
    ):
        model = ptmodels.create_model(variant, config_overrides=small | names)
        processor = ImageProcessor(**{**get_variant(variant).image_processor, "size": 32})
        model.save_pretrained(folder / name, image_processor=processor)
    for name, variant in (("swiftformer_xs.pth", "swiftformer-xs"), ("dinat.pth", "dinat-mini")):
        torch.save(ptmodels.create_model(variant).state_dict(), folder / name)
    shutil.copy(folder / "dinat.pth", folder / "dinat_mini.pth")
    (folder / "photo.jpg").write_bytes(read_photographs()[0])
    assert twinzoo.__main__.main(["digits", str(folder / "photos")]) == 0
    return folder


@pytest.fixture
def workplace(prepared, tmp_path, monkeypatch):
    """A copy of it, which is the working directory."""
    shutil.copytree(prepared, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def run(program: str, *arguments: str) -> None:
    assert PROGRAMS[program].main(arguments) == 0, (program, *arguments)


@pytest.mark.slow
def test_the_first_commands_of_the_readme_run(workplace):
    firsts = {}
    for line in commands("README.md"):
        firsts.setdefault(tuple(line[:2]), line)
    kinds = [
        ("twinzoo", "info"),
        ("twinzoo", "convert"),
        ("twinzoo", "export"),
        ("parity", "check"),
        ("parity", "verify"),
    ]
    for kind in kinds:
        run(*firsts[kind])
    assert {path.name for path in workplace.iterdir()} >= {"my-dinat", "served", "report.html"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "made"),
    [
        ("docs/exporting.md", ["served", "dinat.onnx", "dinat-any.onnx", "dinat.tflite", "dinat.pt2"]),
        ("docs/checkpoints.md", ["my-half/model.safetensors.index.json", "my-wider/model.safetensors"]),
        ("docs/looking.md", []),
        ("docs/proving.md", ["my-checkpoint/parity.json", "report.html", "more.json", "more.xml", "run.npz"]),
    ],
)
def test_all_commands_of_a_page_run(page, made, workplace):
    lines = commands(page)
    assert len(lines) >= 3 and {line[0] for line in lines} <= set(PROGRAMS)
    for line in lines:
        run(*line)
    assert not [name for name in made if not (workplace / name).exists()]
