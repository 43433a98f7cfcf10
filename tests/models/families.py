"""Tests that take long: on some families in every run, on the others in those with the slow tests."""

import pytest

FAMILIES = ["nat", "dinat", "swiftformer", "vit_msn"]


def slow_but_for(*quick: str) -> pytest.MarkDecorator:
    """Parametrizes the fixture `config` with all families, and marks those that are not `quick` as slow."""
    families = [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
    return pytest.mark.parametrize("config", families, indirect=True)
