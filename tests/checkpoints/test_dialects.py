"""Files of others, made of canonical checkpoints, load into both halves bit for bit."""

import subprocess
import sys

import foreign
import numpy as np
import pytest
import torch
from halves import HALVES
from safetensors.numpy import save_file

from modelspec import CheckpointError, get_config, get_variant, list_models
from modelspec.checkpoints import matching_variants, parameter_shapes, probing_weights, read_checkpoint
from parity.variants import reduced
from tfmodels.weights import read_weights

BODIES = {"nat": "Nat", "dinat": "Dinat", "swiftformer": "SwiftFormer", "vit_msn": "ViTMSN"}
SMALLEST = ("nat-mini", "dinat-mini", "swiftformer-xs", "vit-msn-small")


def config_of(name):
    config = get_config(name)
    return config if name in SMALLEST else reduced(config)


def save(tensors: dict, path, **around) -> None:
    """Writes with torch, as the authors did."""
    tensors = {key: torch.from_numpy(np.array(value)) for key, value in tensors.items()}
    torch.save({**around, "model": tensors} if around else tensors, path)


def write(dialect, config, tensors, folder):
    """Writes `tensors` in a dialect; returns the path."""
    if dialect == "tensorflow":
        foreign.write_tensorflow(folder / "tf_model.h5", tensors)
        return folder / "tf_model.h5"
    path = folder / "checkpoint.pth"
    if dialect == "nat":
        save(foreign.as_nat(tensors, config.base_model_prefix), path)
    elif dialect == "swiftformer":
        save(foreign.as_swiftformer(tensors), path)
    elif dialect == "swiftformer, of the trainer":
        save(
            foreign.as_swiftformer(tensors), path, epoch=300, optimizer={"state": {0: {"step": 3}}, "param_groups": []}
        )
    elif dialect == "timm":
        save_file(foreign.as_timm(tensors), folder / "model.safetensors")
        return folder / "model.safetensors"
    elif dialect == "msn":
        target = {key: torch.from_numpy(np.array(x)) for key, x in foreign.as_msn(tensors).items()}
        torch.save({"target_encoder": target, "prototypes": torch.ones(16, 4)}, path)
    return path


DIALECTS = [(name, "nat") for name in (*list_models("nat*"), *list_models("dinat*"))]
for _name in list_models("swiftformer*"):
    DIALECTS += [(_name, dialect) for dialect in ("swiftformer", "swiftformer, of the trainer", "timm", "tensorflow")]
DIALECTS += [(name, "msn") for name in list_models("vit*")]


@pytest.mark.parametrize(("name", "dialect"), DIALECTS)
def test_both_halves_load_a_dialect_bit_for_bit(name, dialect, tmp_path):
    config = config_of(name)
    architecture = "Model" if dialect == "msn" else "ForImageClassification"
    tensors = probing_weights(config, 0)
    if architecture == "Model":
        tensors = {key: tensors[f"vit.{key}"] for key in parameter_shapes(config, "Model")}
    elif dialect == "tensorflow":  # Keras does not count batches
        tensors = {key: 0 * value if key.endswith("tracked") else value for key, value in tensors.items()}
    path = write(dialect, config, tensors, tmp_path)
    for half in HALVES:
        model, report = half.model(
            f"{BODIES[config.model_type]}{architecture}", path, config=config, output_loading_info=True
        )
        loaded = read_weights(model) if half.name == "keras" else {k: v.numpy() for k, v in model.state_dict().items()}
        assert loaded.keys() == tensors.keys()
        for key, value in tensors.items():
            np.testing.assert_array_equal(loaded[key], value, err_msg=key)
        expected = {"swiftformer, of the trainer": "swiftformer", "tensorflow": "transformers-tf"}
        assert report.dialect == expected.get(dialect, dialect)
        assert not report.missing and not report.unexpected


def test_what_pretraining_needs_is_kept_apart(tmp_path):
    config = config_of("vit-msn-base")
    path = write("msn", config, probing_weights(config, 0), tmp_path)
    found = read_checkpoint(path)
    assert found.pretraining.keys() == {"fc.fc1.weight", "fc.bn1.running_mean", "prototypes"}
    assert not any(key.startswith("fc.") for key in found.tensors)


@pytest.mark.parametrize("half", HALVES, ids=lambda half: half.name)
def test_the_recorded_tensorflow_file_gives_the_recorded_outputs(half, golden, tmp_path):
    for name in ("config.json", "tf_model.h5"):
        (tmp_path / name).symlink_to(golden("swiftformer_tiny") / name)
    recorded = np.load(golden("swiftformer_tiny") / "io.npz")
    model = half.model("SwiftFormerForImageClassification", tmp_path)
    logits = half.run(model, pixel_values=recorded["square.pixel_values"])["logits"]
    np.testing.assert_allclose(logits, recorded["square.logits"], atol=2e-5 * np.abs(recorded["square.logits"]).max())


@pytest.mark.parametrize("half", HALVES, ids=lambda half: half.name)
def test_without_a_config_the_variant_is_found_by_the_shapes(half, tmp_path):
    config = get_config("swiftformer-xs")
    path = write("swiftformer", config, probing_weights(config, 0), tmp_path)
    model = half.model("SwiftFormerForImageClassification", path)
    assert model.config.depths == config.depths and model.config.num_labels == 1000
    assert model.config.attention_norm == "l2"
    assert half.model("SwiftFormerForImageClassification", path, attention_norm="softmax").config.attention_norm == (
        "softmax"
    )


def test_weights_that_may_be_of_several_variants_are_refused_by_name(tmp_path):
    shapes = parameter_shapes(get_config("dinat-large-in22k-in1k-224"))
    assert matching_variants(shapes) == ["dinat-large-in22k-in1k-224", "dinat-large-in22k-in1k-384"]
    nothing = {key: np.broadcast_to(np.float32(0), shape) for key, shape in shapes.items()}
    from modelspec.checkpoints.identify import infer_config

    with pytest.raises(CheckpointError, match="dinat-large-in22k-in1k-224 or dinat-large-in22k-in1k-384"):
        infer_config(type(get_config("dinat-mini")), nothing, "weights.pth")
    with pytest.raises(CheckpointError, match="of no published size; pass config="):
        infer_config(type(get_config("dinat-mini")), {}, "weights.pth")


@pytest.mark.parametrize("half", HALVES, ids=lambda half: half.name)
def test_windows_and_position_tables_are_resized_when_asked(half, golden, tmp_path):
    model, report = half.model(
        "DinatForImageClassification", golden("dinat_tiny"), kernel_size=7, output_loading_info=True
    )
    key, before, after = report.resized[0]
    assert (before[1:], after[1:]) == ((5, 5), (13, 13))
    table = torch.from_numpy(read_checkpoint(golden("dinat_tiny") / "model.safetensors").tensors[key])
    expected = torch.nn.functional.interpolate(table[None].double(), size=(13, 13), mode="bicubic")[0]
    weights = read_weights(model) if half.name == "keras" else model.state_dict()
    np.testing.assert_allclose(weights[key], expected, atol=1e-6)
    source = golden("vit_msn_tiny")
    model, report = half.model("ViTMSNForImageClassification", source, image_size=48, output_loading_info=True)
    (key, before, after), *_ = report.resized
    side = 48 // model.config.patch_size
    assert after[1] == 1 + side**2 != before[1]
    with pytest.raises(CheckpointError, match="rpb has shape"):
        broken = tmp_path / "broken"
        broken.mkdir()
        (broken / "model.safetensors").symlink_to(golden("dinat_tiny") / "model.safetensors")
        text = (golden("dinat_tiny") / "config.json").read_text().replace('"kernel_size": 3', '"kernel_size": 5')
        (broken / "config.json").write_text(text)
        half.model("DinatForImageClassification", broken)


# Files of one framework in a process that lacks it


@pytest.mark.parametrize(
    ("package", "absent", "file"),
    [("tfmodels.TF", "torch", "pytorch_model.bin"), ("ptmodels.", "tensorflow", "tf_model.h5")],
)
def test_the_other_framework_is_not_needed(package, absent, file, golden, tmp_path):
    (tmp_path / "config.json").write_text((golden("swiftformer_tiny") / "config.json").read_text())
    tensors = read_checkpoint(golden("swiftformer_tiny") / "model.safetensors").tensors
    if file.endswith(".bin"):
        save(tensors, tmp_path / file)
    else:
        foreign.write_tensorflow(tmp_path / file, tensors)
    module, _, prefix = package.partition(".")
    program = f"""
import importlib.machinery, sys
class Absent:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == {absent!r}:
            return importlib.machinery.ModuleSpec(name, self)
    def create_module(self, spec):
        raise ImportError(spec.name)
sys.meta_path.insert(0, Absent())
import {module}
model = {module}.{prefix}SwiftFormerForImageClassification.from_pretrained({str(tmp_path)!r})
print(model.num_parameters())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) == 78462


def test_a_config_says_which_variant_a_file_is_of():
    for name in list_models():
        found = matching_variants(parameter_shapes(get_config(name)), get_variant(name).model_type)
        assert name in found and len(found) <= 2
