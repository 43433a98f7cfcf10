"""What a type checker tells users of this package: nothing about right calls, and the line of every wrong one."""

import configparser
import os
import re
import site
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("modelspec", "neighborhood", "tfmodels", "ptmodels", "parity", "twinzoo")

PROGRAM = """
from pathlib import Path

import numpy as np
import torch

import parity
import ptmodels
import ptmodels.export
import ptmodels.layers
import ptmodels.ops
import ptmodels.training
import tfmodels
import tfmodels.export
import tfmodels.layers
import tfmodels.ops
import tfmodels.training
from modelspec import DinatConfig, ImageProcessor, NatConfig, ViTMSNConfig, get_config, get_variant, load_config
from modelspec.training import ArrayImages, EvaluationBatches, Recipe, TrainingBatches
from neighborhood import reference
from twinzoo.plots import plot_neighborhoods

folder = Path("checkpoint")
images = np.zeros((2, 3, 64, 64), np.float32)
tensors = torch.zeros(1, 8, 8, 2, 4)

config = NatConfig(depths=[2, 1], num_heads=[2, 4], num_labels=10, out_features=["stage1"])
NatConfig(depths=3)  # wrong
NatConfig(num_labels="ten")  # wrong
NatConfig(dilations=[[1, 2], [1]])  # wrong
DinatConfig(dilations=[[1, 2], [1]], id2label={0: "cat", 1: "dog"})
DinatConfig(id2label=["cat", "dog"])  # wrong
ViTMSNConfig(hidden_size=32, image_size=64).replace(image_size=32).save_pretrained(folder)
config.depths = "3"  # wrong
config.num_labels = 5
doubled: int = config.num_labels * 2
for index, label in config.id2label.items():
    label.upper()
    index.upper()  # wrong
get_config("nat-mini", num_labels=10).to_json_string().encode()
get_config(5)  # wrong
load_config(folder, revision="main")
load_config(folder, revision=1)  # wrong
get_variant("nat-mini").image_procesor  # wrong

processor = ImageProcessor(**get_variant("nat-mini").image_processor)
ImageProcessor(size={"height": 64, "width": 32}, image_mean=[0.5], image_std=0.5)
ImageProcessor(size="64")  # wrong
ImageProcessor(image_mean=(0.5, "0.5", 0.5))  # wrong
ImageProcessor.from_pretrained(folder, size=32)(images, return_tensors="pt").to("cpu")
processor(images, return_tensors=True)  # wrong

model = tfmodels.create_model("nat-mini", num_labels=10, seed=1, dtype="float64")
tfmodels.create_model("nat-mini", seed="1")  # wrong
tfmodels.create_model("nat-mini", 10)  # wrong
model.save_pretrained(folder, image_processor=processor, max_shard_size="5GB")
model.save_pretrained(folder, image_processor="processor")  # wrong
model.freeze("stem")
model.freeze(1)  # wrong
loaded = tfmodels.TFNatForImageClassification.from_pretrained("nat-mini", config=config, torch_dtype="auto")
loaded.reset_classifier("10")  # wrong
tfmodels.TFNatModel.from_pretrained(folder, num_labels="10")  # wrong
tfmodels.TFNatModel(config="nat-mini")  # wrong
found, report = tfmodels.load(folder, output_loading_info=True)
found.num_parameters() + len(report.missing)
report.mising  # wrong

twin = ptmodels.create_model("nat-mini", config_overrides={"kernel_size": 3})
ptmodels.create_model("nat-mini", config_overrides=["kernel_size"])  # wrong
mine: ptmodels.NatForImageClassification = ptmodels.NatForImageClassification.from_pretrained(folder)
other: ptmodels.NatModel = ptmodels.NatForImageClassification.from_pretrained(folder)  # wrong
pair, loading = ptmodels.NatModel.from_pretrained(folder, output_loading_info=True, dtype=torch.float64)
pair.eval().forward_features(torch.from_numpy(images)).mean()
pair.forward_features(images)  # wrong
loading.append("key")  # wrong
ptmodels.NatModel.from_pretrained(folder, dtype=64)  # wrong
ptmodels.NatModel.from_pretrained(3)  # wrong
one, two = ptmodels.NatModel.from_pretrained(folder)  # wrong
ptmodels.load(folder).set_attn_implementation("eager")
ptmodels.load(folder).set_attn_implementation(None)  # wrong

tfmodels.export.export_saved_model(model, folder)
tfmodels.export.export_saved_model(twin, folder)  # wrong
tfmodels.export.export_litert(model, folder, image_size=(64, 64))
tfmodels.export.export_onnx(model, 3)  # wrong
ptmodels.export.export_onnx(twin, folder, image_size=64)
ptmodels.export.export_program(twin, folder, image_size="64")  # wrong

reference.neighborhood_attention(images, images, images, 3, dilation=(1, 2)).mean()
reference.neighborhood_attention(images, images, images, 3.5)  # wrong
ptmodels.ops.neighborhood_attention(tensors, tensors, tensors, (3, 3), scale=0.5).mean()
output, weights = ptmodels.ops.neighborhood_attention(tensors, tensors, tensors, 3, return_probabilities=True)
output.mean() + weights.mean()
ptmodels.ops.neighborhood_attention(tensors, tensors, images, 3)  # wrong
ptmodels.ops.neighborhood_attention(tensors, tensors, tensors, 3, rel_pos_bias=0.5)  # wrong
ptmodels.layers.NeighborhoodAttention2D(8, 2, kernel_size=3)
ptmodels.layers.NeighborhoodAttention2D(8, 2, kernel_size="3")  # wrong
tfmodels.ops.neighborhood_attention(images, images, images, 3, 2, implementation="composed")
tfmodels.ops.neighborhood_attention(images, images, images, "3")  # wrong
tfmodels.layers.NeighborhoodAttention2D(8, 2, kernel_size="3")  # wrong

recipe = Recipe(epochs=2, ema=0.9, freeze="stem")
Recipe(epochs="2")  # wrong
Recipe(learning_rat=0.1)  # wrong
data = ArrayImages(images, np.zeros(2, np.int64))
batches = TrainingBatches(data, recipe, 10)
losses = ptmodels.training.fine_tune(twin, batches, validation=EvaluationBatches(data, 10))["loss"][-1] / 2
ptmodels.training.fine_tune(twin, recipe)  # wrong
tfmodels.training.fine_tune(model, batches, on_epoch=lambda state: print(state.epoch))
tfmodels.training.fine_tune(model, batches, state_path=1)  # wrong

comparison = parity.compare(model, twin, (images, images), names={"a": "b"}, seed=1)
comparison.passed and print(comparison.first_divergence)
comparison.pased  # wrong
parity.compare(model, twin, images, names=["a"])  # wrong
parity.compare(model, twin, images, 1)  # wrong
parity.check(["nat-mini"], dtypes=["float64"], size=(64, 64)).results[0].agreement.max_rel + 1
parity.check("nat-mini", size=64)  # wrong
plot_neighborhoods(images, [], twin.config, pixel=(1, 2)).savefig("picture.png")
plot_neighborhoods(images, [], twin.config, pixel=3)  # wrong
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """The Python of an environment in which this package is installed, as far as type checkers can see."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    places = [ROOT, *site.getsitepackages(), Path(np.__file__).parents[1]]
    (packages / "all.pth").write_text("\n".join(map(str, dict.fromkeys(places))) + "\n")
    return folder / "bin" / "python"


def check_types(program: str, environment: Path, folder: Path) -> str:
    """Returns what mypy says of a program that stands outside of this repository, without its configuration."""
    (folder / "program.py").write_text(program)
    (folder / "mypy.ini").write_text(
        "[mypy]\n[mypy-keras.*,tensorflow.*,h5py.*,sklearn.*]\nignore_missing_imports = True\n"
    )
    command = [sys.executable, "-m", "mypy", "--python-executable", str(environment), "--no-pretty", "program.py"]
    own = {name: value for name, value in os.environ.items() if not name.startswith("MYPY")}
    process = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=own)
    assert process.returncode in (0, 1), process.stdout + process.stderr
    return process.stdout


def test_wrong_calls_are_found_and_right_ones_are_not(environment, tmp_path):
    said = check_types(PROGRAM, environment, tmp_path)
    lines = PROGRAM.splitlines()
    reported = {int(number) for number in re.findall(r"^program\.py:(\d+): error", said, re.MULTILINE)}
    wrong = {number for number, line in enumerate(lines, start=1) if line.endswith("# wrong")}
    missed = [lines[number - 1] for number in sorted(wrong - reported)]
    assert not missed and not reported - wrong, f"not found: {missed}\n{said}"
    assert re.search(r"^Found \d+ errors in 1 file", said, re.MULTILINE), said


def test_every_package_says_that_it_has_types():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert "py.typed" in setup["options.package_data"]["*"]
    assert [name for name in PACKAGES if not (ROOT / name / "py.typed").is_file()] == []
