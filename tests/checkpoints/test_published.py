"""The published checkpoints give the recorded logits, where the Hub or its cache is within reach.

Recorded by the reference's own tests and conversion scripts, of COCO's image 000000039769 (two cats).
"""

import functools
import socket
import urllib.parse

import numpy as np
import pytest
from halves import HALVES
from PIL import Image

from modelspec import ImageProcessor, get_variant
from modelspec.checkpoints import SourceError, resolve_weights

LOGITS = {
    "nat-mini": ([0.3805, -0.8676, -0.3912], 1e-4),
    "dinat-mini": ([-0.1545, -0.7667, 0.4642], 1e-4),
    "swiftformer-xs": ([-2.1703, 2.1107, -2.0811, 0.88685, 0.2436], 1e-3),
    "swiftformer-s": ([0.39636, 0.23478, -1.6963], 1e-3),
    "swiftformer-l1": ([-0.42768, -0.47429, -1.0897], 1e-3),
    "swiftformer-l3": ([-0.2533, 0.24211, -0.60185], 1e-3),
}
FEATURES = {  # of the class token
    "vit-msn-small": [-1.0915, -1.4876, -1.1809],
    "vit-msn-base": [14.2889, -18.9045, 11.7281],
    "vit-msn-large": [41.5028, -22.8681, 45.6475],
    "vit-msn-base-4": [-4.3868, 5.2932, -0.4137],
    "vit-msn-large-7": [-0.1792, -0.6465, 2.4263],
}
CLASSES = {"nat": "Nat", "dinat": "Dinat", "swiftformer": "SwiftFormer"}

pytestmark = pytest.mark.pretrained


@functools.cache
def _reachable() -> bool:
    from huggingface_hub import constants

    address = urllib.parse.urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((address.hostname, address.port or 443), timeout=3).close()
    except OSError:
        return False
    return True


@pytest.fixture
def fetch(monkeypatch):
    """Finds a file of the Hub, or skips; without a network only the cache is asked."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", not _reachable())

    def find(function, *arguments, **options):
        try:
            return function(*arguments, **options)
        except (SourceError, OSError) as error:
            pytest.skip(f"not within reach: {' '.join(str(error).split())[:200]}")

    return find


@pytest.fixture
def cats(fetch):
    from huggingface_hub import hf_hub_download

    return Image.open(fetch(hf_hub_download, "huggingface/cats-image", "cats_image.jpeg", repo_type="dataset"))


@pytest.mark.parametrize("half", HALVES, ids=lambda half: half.name)
@pytest.mark.parametrize("name", LOGITS)
def test_logits_are_the_recorded_ones(name, half, fetch, cats):
    fetch(resolve_weights, name)
    expected, tolerance = LOGITS[name]
    model = half.model(f"{CLASSES[get_variant(name).model_type]}ForImageClassification", name)
    images = ImageProcessor.from_pretrained(name)(cats)["pixel_values"]
    logits = half.run(model, pixel_values=images)["logits"][0]
    np.testing.assert_allclose(logits[: len(expected)], expected, atol=tolerance)


@pytest.mark.parametrize("half", HALVES, ids=lambda half: half.name)
@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.filterwarnings("ignore::modelspec.CheckpointWarning")  # the files have no mask token
def test_features_are_the_recorded_ones(name, half, fetch, cats):
    fetch(resolve_weights, name)
    model = half.model("ViTMSNModel", name)
    images = ImageProcessor.from_pretrained(name)(cats)["pixel_values"]
    token = half.run(model, pixel_values=images)["last_hidden_state"][0, 0, :3]
    np.testing.assert_allclose(token, FEATURES[name], atol=1e-4 * max(1.0, np.abs(FEATURES[name]).max()))
