"""What setup.cfg allows is what `make oldest-versions` tests, and what README names."""

import re
from configparser import ConfigParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]


def read_setup():
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    return setup


def required():
    setup = read_setup()
    extras = setup["options.extras_require"]
    return [*setup["options"]["install_requires"].split(), *extras["tf"].split(), *extras["torch"].split()]


@pytest.mark.parametrize("requirement", required())
def test_the_oldest_version_allowed_is_the_one_tested(requirement):
    lines = (ROOT / "constraints-oldest.txt").read_text().splitlines()
    pinned = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
    requirement = Requirement(requirement)
    (minimum,) = requirement.specifier
    assert minimum.operator == ">="
    tested = pinned[canonicalize_name(requirement.name)]
    assert Version(tested) == Version(minimum.version), f"setup.cfg allows {requirement}, tested is {tested}"


def test_the_readme_names_the_oldest_versions_allowed():
    """As exactly as it likes: 2.16 is 2.16.1, but 2.15 and 2.16.2 are not."""
    minima = {
        requirement.name: next(iter(requirement.specifier)).version for requirement in map(Requirement, required())
    }
    minima["python"] = read_setup()["options"]["python_requires"].removeprefix(">=")
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    sentence = r"Python ([\d.]+\d), and at least Keras ([\d.]+\d) on TensorFlow ([\d.]+\d), or PyTorch ([\d.]+\d)"
    (named,) = re.findall(sentence, text)
    for package, version in zip(("python", "keras", "tensorflow", "torch"), named, strict=True):
        allowed = minima[package].split(".")
        assert version.split(".") == allowed[: version.count(".") + 1], (
            f"README: {package} {version}; setup.cfg: {allowed}"
        )
