"""In float64 nothing but rounding may separate the halves, under weights that make every parameter matter."""

import numpy as np
import pytest
from halves import HALVES

from modelspec.agreement import FLOAT64_BOUND, compare_all
from modelspec.checkpoints import probing_weights
from modelspec.configs import get_config
from ptmodels.auto import model_class as torch_class
from tfmodels.auto import model_class as keras_class


@pytest.mark.parametrize("size", [(224, 224), (225, 161)], ids=["224x224", "225x161"])
@pytest.mark.parametrize("name", ["nat-mini", "dinat-mini", "swiftformer-xs", "vit-msn-small"])
def test_whole_variants_agree(name, size):
    config = get_config(name)
    weights = probing_weights(config, seed=1)
    images = np.random.default_rng(0).standard_normal((1, 3, *size))
    options = {"output_hidden_states": True}
    if config.model_type == "vit_msn":
        options |= {"output_attentions": True, "interpolate_pos_encoding": size != (224, 224)}
    elif config.model_type != "swiftformer":
        options["output_attentions"] = True
    outputs = []
    for half, model_class in zip(HALVES, (torch_class, keras_class), strict=True):
        model = model_class(config.model_type).from_weights(config, weights, dtype="float64")
        outputs.append(half.run(model, pixel_values=images, **options))
    reference, actual = outputs
    for kind in ("logits", "hidden_states", "attentions"):
        of_kind = [{k: v for k, v in output.items() if k.startswith(kind)} for output in (actual, reference)]
        failed = {k: v for k, v in compare_all(*of_kind, FLOAT64_BOUND).items() if not v.passed}
        assert not failed
    assert all(value.dtype == np.float64 for value in actual.values())


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("size", [(224, 224), (384, 384), (200, 312)], ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("name", ["nat-mini", "dinat-mini"])
def test_native_and_composed_attention_agree_at_any_size(name, size, attn_implementation):
    """`sdpa` takes the C++ kernels, `eager` the composed implementation."""
    config = get_config(name)
    weights = probing_weights(config, seed=2)
    images = np.random.default_rng(1).standard_normal((1, 3, *size))
    outputs = []
    for half, model_class in zip(HALVES, (torch_class, keras_class), strict=True):
        options = {"dtype": "float64", "attn_implementation": attn_implementation}
        model = model_class(config.model_type).from_weights(config, weights, **options)
        outputs.append(half.run(model, pixel_values=images, output_hidden_states=True))
    native = torch_class(config.model_type).from_weights(config, weights, dtype="float64")
    outputs.append(HALVES[0].run(native, pixel_values=images, output_hidden_states=True))
    reference = outputs.pop()
    for actual in outputs:
        for kind in ("logits", "hidden_states"):
            of_kind = [{k: v for k, v in output.items() if k.startswith(kind)} for output in (actual, reference)]
            failed = {k: v for k, v in compare_all(*of_kind, FLOAT64_BOUND).items() if not v.passed}
            assert not failed
