"""The examples of the transformers documentation run here; changed are the import line, the checkpoint, the image.

The checkpoints are ours, with weights drawn in place of the published ones: no label is asserted.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf
import torch
from PIL import Image
from skimage import data

import ptmodels
from modelspec import CheckpointWarning, ImageProcessor, get_variant


@pytest.fixture(scope="module")
def image():
    return Image.fromarray(data.chelsea())


def checkpoint(name, folder, **kwargs):
    ptmodels.create_model(name, **kwargs).save_pretrained(folder)
    ImageProcessor(**get_variant(name).image_processor).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def swiftformer_xs(tmp_path_factory):
    return checkpoint("swiftformer-xs", tmp_path_factory.mktemp("swiftformer-xs"))


@pytest.fixture(scope="module")
def vit_msn_small(tmp_path_factory):
    # published as the bare encoder
    return checkpoint("vit-msn-small", tmp_path_factory.mktemp("vit-msn-small"), architecture="Model")


@pytest.fixture(scope="module")
def nat_mini(tmp_path_factory):
    return checkpoint("nat-mini", tmp_path_factory.mktemp("nat-mini"))


@pytest.fixture(scope="module")
def dinat_mini(tmp_path_factory):
    return checkpoint("dinat-mini", tmp_path_factory.mktemp("dinat-mini"))


def test_nat_config():
    from ptmodels import NatConfig, NatModel

    configuration = NatConfig()
    model = NatModel(configuration)
    configuration = model.config
    assert configuration.depths == [3, 4, 6, 5]


def test_nat_model(image, nat_mini):
    from ptmodels import AutoImageProcessor, NatModel

    image_processor = AutoImageProcessor.from_pretrained(nat_mini)
    with pytest.warns(CheckpointWarning, match="left out: classifier.bias"):
        model = NatModel.from_pretrained(nat_mini)
    inputs = image_processor(image, return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    last_hidden_states = outputs.last_hidden_state
    assert list(last_hidden_states.shape) == [1, 7, 7, 512]


def test_nat_for_image_classification(image, nat_mini):
    from ptmodels import AutoImageProcessor, NatForImageClassification

    image_processor = AutoImageProcessor.from_pretrained(nat_mini)
    model = NatForImageClassification.from_pretrained(nat_mini)
    inputs = image_processor(image, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    predicted_label = logits.argmax(-1).item()
    assert model.config.id2label[predicted_label] == f"LABEL_{predicted_label}"


def test_dinat_config():
    from ptmodels import DinatConfig, DinatModel

    configuration = DinatConfig()
    model = DinatModel(configuration)
    configuration = model.config
    assert configuration.dilations[0] == [1, 8, 1]


def test_dinat_model(image, dinat_mini):
    from ptmodels import AutoImageProcessor, DinatModel

    image_processor = AutoImageProcessor.from_pretrained(dinat_mini)
    with pytest.warns(CheckpointWarning, match="left out: classifier.bias"):
        model = DinatModel.from_pretrained(dinat_mini)
    inputs = image_processor(image, return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    last_hidden_states = outputs.last_hidden_state
    assert list(last_hidden_states.shape) == [1, 7, 7, 512]


def test_dinat_for_image_classification(image, dinat_mini):
    from ptmodels import AutoImageProcessor, DinatForImageClassification

    image_processor = AutoImageProcessor.from_pretrained(dinat_mini)
    model = DinatForImageClassification.from_pretrained(dinat_mini)
    inputs = image_processor(image, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    predicted_label = logits.argmax(-1).item()
    assert model.config.id2label[predicted_label] == f"LABEL_{predicted_label}"


def test_swiftformer_config():
    from ptmodels import SwiftFormerConfig, SwiftFormerModel

    configuration = SwiftFormerConfig()
    model = SwiftFormerModel(configuration)
    configuration = model.config
    assert configuration.embed_dims == [48, 56, 112, 220]


def test_swiftformer_model(image, swiftformer_xs):
    from ptmodels import AutoImageProcessor, SwiftFormerModel

    image_processor = AutoImageProcessor.from_pretrained(swiftformer_xs)
    with pytest.warns(CheckpointWarning, match="left out: dist_head.bias"):
        model = SwiftFormerModel.from_pretrained(swiftformer_xs)
    inputs = image_processor(image, return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    last_hidden_states = outputs.last_hidden_state
    assert list(last_hidden_states.shape) == [1, 220, 7, 7]


def test_swiftformer_for_image_classification(image, swiftformer_xs):
    from ptmodels import AutoImageProcessor, SwiftFormerForImageClassification

    image_processor = AutoImageProcessor.from_pretrained(swiftformer_xs)
    model = SwiftFormerForImageClassification.from_pretrained(swiftformer_xs)
    inputs = image_processor(image, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    predicted_label = logits.argmax(-1).item()
    assert model.config.id2label[predicted_label] == f"LABEL_{predicted_label}"


def test_vit_msn_config():
    from ptmodels import ViTMSNConfig, ViTMSNModel

    configuration = ViTMSNConfig()  # the document writes ViTConfig by mistake
    model = ViTMSNModel(configuration)
    configuration = model.config
    assert configuration.hidden_size == 768


def test_vit_msn_model(image, vit_msn_small):
    from ptmodels import AutoImageProcessor, ViTMSNModel

    image_processor = AutoImageProcessor.from_pretrained(vit_msn_small)
    model = ViTMSNModel.from_pretrained(vit_msn_small)
    inputs = image_processor(images=image, return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    last_hidden_states = outputs.last_hidden_state
    assert list(last_hidden_states.shape) == [1, 197, 384]


def test_vit_msn_for_image_classification(image, vit_msn_small):
    from ptmodels import AutoImageProcessor, ViTMSNForImageClassification

    torch.manual_seed(2)
    image_processor = AutoImageProcessor.from_pretrained(vit_msn_small)
    with pytest.warns(CheckpointWarning, match="newly initialised: classifier.weight, classifier.bias"):
        model = ViTMSNForImageClassification.from_pretrained(vit_msn_small)
    inputs = image_processor(images=image, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    predicted_label = logits.argmax(-1).item()
    assert predicted_label in model.config.id2label


def test_vit_msn_in_half_precision_with_sdpa(image, vit_msn_small):
    from ptmodels import AutoImageProcessor, ViTMSNForImageClassification

    with pytest.warns(CheckpointWarning, match="classifier"):
        model = ViTMSNForImageClassification.from_pretrained(
            vit_msn_small, attn_implementation="sdpa", torch_dtype=torch.float16
        )
    inputs = AutoImageProcessor.from_pretrained(vit_msn_small)(image, return_tensors="pt").to(torch.float16)
    with torch.no_grad():
        logits = model(**inputs).logits
    assert logits.dtype == torch.float16 and torch.isfinite(logits).all()


def test_tf_swiftformer_model(image, swiftformer_xs):
    from tfmodels import AutoImageProcessor, TFSwiftFormerModel

    image_processor = AutoImageProcessor.from_pretrained(swiftformer_xs)
    with pytest.warns(CheckpointWarning, match="left out: dist_head.bias"):
        model = TFSwiftFormerModel.from_pretrained(swiftformer_xs)
    inputs = image_processor(image, return_tensors="tf")
    outputs = model(**inputs, output_hidden_states=True)
    assert tuple(outputs.last_hidden_state.shape) == (1, 220, 7, 7)
    assert len(outputs.hidden_states) == 8
    assert tuple(outputs.hidden_states[0].shape) == (1, 48, 56, 56)


def test_tf_swiftformer_for_image_classification(image, swiftformer_xs):
    from tfmodels import AutoImageProcessor, TFSwiftFormerForImageClassification

    image_processor = AutoImageProcessor.from_pretrained(swiftformer_xs)
    model = TFSwiftFormerForImageClassification.from_pretrained(swiftformer_xs)
    pixel_values = image_processor(image, return_tensors="tf").pixel_values
    labels = tf.constant([281])
    by_keyword = model(pixel_values=pixel_values, labels=labels, training=False)
    for inputs in (
        [pixel_values, labels],
        (pixel_values, labels),
        {"pixel_values": pixel_values, "labels": labels},
    ):
        output = model(inputs)
        np.testing.assert_array_equal(output.logits, by_keyword.logits)
        assert float(output.loss) == float(by_keyword.loss)
    logits = model(pixel_values).logits
    np.testing.assert_array_equal(logits, by_keyword.logits)
    loss, in_tuple = model(pixel_values, labels=labels, return_dict=False)
    assert float(loss) == float(by_keyword.loss) and np.array_equal(in_tuple, logits)
    predicted_label = int(tf.argmax(logits, -1)[0])
    assert predicted_label in model.config.id2label


@pytest.mark.slow
def test_tf_swiftformer_trains_with_fit(swiftformer_xs):
    from tfmodels import TFSwiftFormerForImageClassification

    with pytest.warns(CheckpointWarning, match="head.weight"):
        model = TFSwiftFormerForImageClassification.from_pretrained(swiftformer_xs, num_labels=2)
    images = np.random.default_rng(0).standard_normal((4, 3, 64, 64), np.float32)
    model.compile(keras.optimizers.AdamW(1e-3), loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    history = model.fit({"pixel_values": images}, np.array([0, 1, 0, 1]), epochs=2, batch_size=4, verbose=0)
    assert history.history["loss"][1] < history.history["loss"][0]


def test_the_halves_agree_on_the_image(image, swiftformer_xs):
    import tfmodels

    pixel_values = ptmodels.AutoImageProcessor.from_pretrained(swiftformer_xs)(image).pixel_values
    with torch.no_grad():
        reference = ptmodels.load(swiftformer_xs)(torch.from_numpy(pixel_values)).logits.numpy()
    np.testing.assert_allclose(tfmodels.load(swiftformer_xs)(pixel_values).logits, reference, rtol=0, atol=1e-5)
