"""The README's Python runs, word by word, from top to bottom; that of the docs likewise."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(("page", "blocks"), [("README.md", 3), ("docs/fine-tuning.md", 1)])
def test_the_examples_run(page, blocks, tmp_path, monkeypatch):
    from twinzoo.__main__ import main

    monkeypatch.chdir(tmp_path)
    assert main(["digits", "digits"]) == 0
    found = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    assert len(found) >= blocks
    names = {}
    for block in found:
        exec(compile(block, page, "exec"), names)
