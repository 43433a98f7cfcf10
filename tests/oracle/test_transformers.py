"""Live against transformers: files both ways, outputs, training statistics, and its Trainer."""

import numpy as np
import pytest
import torch

import ptmodels
import tfmodels
from modelspec.agreement import FLOAT32_BOUND, FLOAT32_GOLDEN_BOUND, FLOAT64_BOUND, compare_all
from modelspec.checkpoints import CheckpointWarning, probing_weights
from modelspec.configs import get_config

transformers = pytest.importorskip("transformers", reason="pip install '.[oracle]'")
pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
    pytest.mark.filterwarnings("ignore::UserWarning:accelerate"),
]

NAMES = ["swiftformer-xs", "vit-msn-small"]


def small(name):
    """A published variant with at most two blocks per stage, or two layers, and ten labels."""
    config = get_config(name, num_labels=10)
    if config.model_type == "swiftformer":
        return config.replace(depths=[min(depth, 2) for depth in config.depths])
    return config.replace(num_hidden_layers=2)


def reference_class(config):
    return {
        "swiftformer": transformers.SwiftFormerForImageClassification,
        "vit_msn": transformers.ViTMSNForImageClassification,
    }[config.model_type]


def half_class(package, config):
    return package.auto.model_class(config.model_type)


def assert_logits_agree(actual, reference):
    agreement = compare_all({"logits": actual}, {"logits": reference}, FLOAT32_GOLDEN_BOUND)["logits"]
    assert agreement.passed, agreement


def assert_all_agree(actual, reference, bound):
    arrays = [{str(index): tensor.numpy() for index, tensor in enumerate(side)} for side in (actual, reference)]
    assert arrays[0] and len(arrays[0]) == len(arrays[1])
    assert not {key: value for key, value in compare_all(*arrays, bound).items() if not value.passed}


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).standard_normal((2, 3, 224, 224), np.float32)


@pytest.mark.parametrize("max_shard_size", ["5GB", "2MB"])
@pytest.mark.parametrize("name", NAMES)
def test_what_keras_saved_loads_without_a_missing_or_unexpected_key(name, max_shard_size, images, tmp_path):
    config = small(name)
    model = half_class(tfmodels, config).from_weights(config, probing_weights(config))
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors").exists() == (max_shard_size == "5GB")
    theirs, info = reference_class(config).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        logits = theirs.eval()(torch.from_numpy(images)).logits.numpy()
    assert_logits_agree(np.asarray(model(images).logits), logits)
    assert theirs.config.num_labels == 10


def test_a_bare_keras_model_loads_too(images, tmp_path):
    config = small("vit-msn-small")
    cls = tfmodels.auto.model_class("vit_msn", "Model")
    model = cls.from_weights(config, probing_weights(config, architecture="Model"))
    model.save_pretrained(tmp_path)
    theirs, info = transformers.ViTMSNModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        reference = theirs.eval()(torch.from_numpy(images)).last_hidden_state.numpy()
    assert_logits_agree(np.asarray(model(images).last_hidden_state), reference)


@pytest.mark.parametrize("name", NAMES)
def test_what_transformers_saved_loads_into_both_halves(name, images, tmp_path):
    torch.manual_seed(0)
    config = small(name)
    config.save_pretrained(tmp_path)
    cls = reference_class(config)
    theirs = cls(cls.config_class.from_pretrained(tmp_path)).eval()
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        reference = theirs(torch.from_numpy(images)).logits.numpy()
        for package in (ptmodels, tfmodels):
            model, report = half_class(package, config).from_pretrained(tmp_path, output_loading_info=True)
            assert not (report.missing or report.unexpected or report.mismatched)
            inputs = torch.from_numpy(images) if package is ptmodels else images
            assert_logits_agree(np.asarray(model(inputs).logits), reference)


@pytest.mark.parametrize(
    ("name", "size"), [("swiftformer-xs", (224, 224)), ("swiftformer-xs", (97, 130)), ("vit-msn-small", (224, 224))]
)
def test_every_hidden_state_agrees_in_float64(name, size, tmp_path):
    config = small(name)
    ours = half_class(ptmodels, config).from_weights(config, probing_weights(config), dtype="float64").eval()
    ours.save_pretrained(tmp_path)
    theirs = reference_class(config).from_pretrained(tmp_path).double().eval()
    images = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 3, *size)))
    with torch.no_grad():
        actual, reference = (model(images, output_hidden_states=True) for model in (ours, theirs))
    assert_all_agree(actual.hidden_states, reference.hidden_states, FLOAT64_BOUND)
    assert_all_agree([actual.logits], [reference.logits], FLOAT64_BOUND)


def test_attentions_agree(images, tmp_path):
    config = small("vit-msn-small")
    ours = half_class(ptmodels, config).from_weights(config, probing_weights(config)).eval()
    ours.save_pretrained(tmp_path)
    theirs = reference_class(config).from_pretrained(tmp_path, attn_implementation="eager").eval()
    with torch.no_grad():
        actual, reference = (model(torch.from_numpy(images), output_attentions=True) for model in (ours, theirs))
    # in float32: the reference's eager softmax is float32 whatever the model is
    assert_all_agree(actual.attentions, reference.attentions, FLOAT32_BOUND)


class Images(torch.utils.data.Dataset):
    """Noise around a brightness that is the label."""

    def __len__(self):
        return 32

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return {"pixel_values": torch.randn(3, 32, 32, generator=generator) + index % 4, "labels": index % 4}


def test_the_trainer_of_transformers_fine_tunes_our_models(config, tmp_path):
    torch.manual_seed(0)
    model = half_class(ptmodels, config)(config.replace(num_labels=4))
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "runs"),
        max_steps=20,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        dataloader_pin_memory=False,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Images(), eval_dataset=Images())
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    trainer.save_model(str(tmp_path / "saved"))
    model.save_pretrained(tmp_path / "saved")
    again = ptmodels.load(tmp_path / "saved")
    inputs = Images()[1]["pixel_values"][None]
    torch.testing.assert_close(again(inputs).logits, model.eval()(inputs).logits, rtol=0, atol=0)


def test_a_swapped_head_is_reported_by_both(tmp_path):
    config = small("swiftformer-xs")
    half_class(tfmodels, config).from_weights(config, probing_weights(config)).save_pretrained(tmp_path)
    _, info = transformers.SwiftFormerForImageClassification.from_pretrained(
        tmp_path, num_labels=3, ignore_mismatched_sizes=True, output_loading_info=True
    )
    with pytest.warns(CheckpointWarning, match="dist_head.weight"):
        _, report = half_class(ptmodels, config).from_pretrained(tmp_path, num_labels=3, output_loading_info=True)
    assert {entry[0] for entry in info["mismatched_keys"]} == {entry[0] for entry in report.mismatched}


def test_transformers_own_dinat_runs_with_our_natten_functions(monkeypatch):
    """Its head split, broken since 4.55, is repaired here: (B, W, H, heads, d) becomes (B, heads, H, W, d)."""
    pytest.importorskip("natten", reason="transformers' DiNAT asks for natten (extra [natten])")
    from ptmodels import natten_compat

    natten_compat.install()
    from transformers.models.dinat import modeling_dinat

    def repaired(x):
        return x.permute(0, 3, 2, 1, 4)

    monkeypatch.setattr(
        modeling_dinat,
        "natten2dqkrpb",
        lambda query, key, *rest: natten_compat.natten2dqkrpb(repaired(query), repaired(key), *rest),
    )
    monkeypatch.setattr(
        modeling_dinat, "natten2dav", lambda attn, value, *rest: natten_compat.natten2dav(attn, repaired(value), *rest)
    )
    config = get_config("dinat-mini", num_labels=10)
    weights = probing_weights(config)
    theirs = modeling_dinat.DinatForImageClassification(transformers.DinatConfig(**config.to_dict())).eval()
    theirs.load_state_dict({key: torch.from_numpy(value) for key, value in weights.items()})
    ours = ptmodels.DinatForImageClassification.from_weights(config, weights).eval()
    images = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 3, 160, 200), np.float32))
    with torch.no_grad():
        assert_logits_agree(ours(images).logits.numpy(), theirs(images).logits.numpy())
