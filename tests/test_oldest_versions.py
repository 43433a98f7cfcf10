"""What setup.cfg allows is what `make oldest-versions` tests."""

from configparser import ConfigParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]


def required():
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
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
