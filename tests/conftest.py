"""What all tests share."""

import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores: threads of one would wait for those of another
    for name in ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS"):
        os.environ.setdefault(name, "1")

import numpy as np  # noqa: E402 - after the environment is set
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

from modelspec import DinatConfig, ImageProcessor, NatConfig, SwiftFormerConfig, ViTMSNConfig  # noqa: E402

# A loaded machine is slow, and CI draws the same examples every time.
settings.register_profile("twinzoo", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("twinzoo")

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden():
    """Name -> folder of recorded weights, inputs and outputs; each is a complete checkpoint."""
    return lambda name: GOLDEN / name


@pytest.fixture
def swiftformer_config():
    return SwiftFormerConfig(depths=[2, 1], embed_dims=[16, 24], downsamples=[True, True], num_labels=10)


@pytest.fixture
def vit_msn_config():
    return ViTMSNConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        num_labels=10,
    )


NEIGHBORHOOD = {"depths": [2, 1], "num_heads": [2, 4], "embed_dim": 16, "kernel_size": 3, "drop_path_rate": 0.0}


@pytest.fixture
def nat_config():
    return NatConfig(**NEIGHBORHOOD, num_labels=10)


@pytest.fixture
def dinat_config():
    return DinatConfig(**NEIGHBORHOOD, dilations=[[1, 2], [1]], layer_scale_init_value=0.5, num_labels=10)


@pytest.fixture(params=["nat", "dinat", "swiftformer", "vit_msn"])
def config(request):
    """A small classifier of each family, for images of 32x32."""
    return request.getfixturevalue(f"{request.param}_config")


@pytest.fixture(scope="session")
def digits():
    """200 of scikit-learn's digits as pixel values (200, 3, 32, 32) float32, and their labels (200,) int64."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = list(np.uint8(data.images[:200] * 15.9375))
    return ImageProcessor(size=32)(images)["pixel_values"], data.target[:200].astype(np.int64)
