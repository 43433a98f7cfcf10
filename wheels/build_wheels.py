"""Builds what is given away, into dist/: the sdist, and from it a wheel for each machine; checks them.

    python wheels/build_wheels.py [--output FOLDER]

Needs the extra `wheels`. One clang serves every machine, and links against a glibc of 2018 whatever is installed here;
the C++ library becomes part of ours. Nothing is left in the folder unless all is well.
"""

import argparse
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from check_wheel import LINKED, MACHINES, ROOT, check_contents, check_libraries

GLIBC = (2, 28)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=ROOT / "dist", metavar="FOLDER", help="default: dist")
    output = parser.parse_args(argv).output
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, "made")
        sources = build_sdist(made, Path(folder, "sources"))
        add_licences(sources)
        for machine in MACHINES:
            build_wheel(sources, machine, made)
        problems = []
        for wheel in made.glob("*.whl"):
            problems += [f"{wheel.name}: {problem}" for problem in check_contents(wheel) + check_libraries(wheel)]
        if problems:
            print("\n".join(problems), file=sys.stderr)
            return 1
        output.mkdir(parents=True, exist_ok=True)
        for file in sorted(made.iterdir()):
            shutil.copy2(file, output)
            print(f"{file.stat().st_size / 2**20:5.1f} MiB  {output / file.name}")
    return 0


def build_sdist(made: Path, unpacked: Path) -> Path:
    """Builds the sdist into `made`, unpacks it into `unpacked`, and returns the folder in that."""
    run_build("--sdist", ROOT, made, {})
    [archive] = made.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        files.extractall(unpacked, filter="data")
    return unpacked / archive.name.removesuffix(".tar.gz")


def add_licences(sources: Path) -> None:
    """Puts the licences of what becomes part of the libraries where `license_files` of setup.cfg finds them."""
    for name, path in LINKED.items():
        shutil.copyfile(zig_folder() / path, sources / f"LICENSE.{name}")


def zig_folder() -> Path:
    return Path(importlib.util.find_spec("ziglang").origin).parent


def build_wheel(sources: Path, machine: str, made: Path) -> None:
    """Builds the wheel for `machine` into `made`."""
    compiler = f"{shlex.quote(str(zig_folder() / 'zig'))} c++ -target {machine}-linux-gnu.{GLIBC[0]}.{GLIBC[1]}"
    environment = {
        "CXX": compiler,
        "CXXFLAGS": "-DNDEBUG",  # in place of the flags with which this Python was built
        "LDCXXSHARED": f"{compiler} -shared -s",
        "_PYTHON_HOST_PLATFORM": f"linux-{machine}",
    }
    platform = f"manylinux_{GLIBC[0]}_{GLIBC[1]}_{machine}"
    run_build("--wheel", sources, made, environment, f"-C--build-option=--plat-name={platform}")


def run_build(kind: str, sources: Path, made: Path, environment: dict[str, str], *options: str) -> None:
    """Runs `python -m build` in an environment of its own with the pinned setuptools; raises what it says if it fails.

    Flags for compilers and linkers that are set here are meant for others than these.
    """
    foreign = ("CC", "CXX", "CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS", "LDSHARED", "LDCXXSHARED")
    kept = {name: value for name, value in os.environ.items() if name not in foreign}
    process = subprocess.run(
        [sys.executable, "-m", "build", kind, "--outdir", made, *options, sources],
        env=kept | {"PIP_CONSTRAINT": str(ROOT / "constraints.txt")} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if process.returncode:
        raise RuntimeError(f"python -m build {kind} failed:\n{process.stdout[-5000:]}")


if __name__ == "__main__":
    sys.exit(main())
