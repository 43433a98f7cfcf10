"""Exports for tests of something else than the comparison with the live model, which has tests of its own."""

import pytest

from modelspec.exports import ExportReport


@pytest.fixture
def uncompared(monkeypatch):
    """Inside, what is exported is not compared with the live model, so that an export takes half the time."""

    def pass_over(kind, path, half, inputs, expected, bound, **options):
        return ExportReport(str(path), kind, half, dict.fromkeys(inputs, 0.0), bound)

    monkeypatch.setattr("tfmodels.export.compare_with_live", pass_over)
    monkeypatch.setattr("ptmodels.export.compare_with_live", pass_over)
