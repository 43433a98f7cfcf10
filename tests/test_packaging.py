"""The sdist and the wheels: what is in them, and that they work where there is no compiler."""

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CHECK = ROOT / "wheels" / "check_wheel.py"
COMPILERS = ("g++", "c++", "gcc", "cc", "clang++", "clang", "zig")
needs_wheels = pytest.mark.skipif(not importlib.util.find_spec("ziglang"), reason="needs the extra [wheels]")
# of Debian's libc6-arm64-cross; qemu-user-static runs its programs
ARM_LIBRARIES = Path(os.environ.get("QEMU_LD_PREFIX", "/usr/aarch64-linux-gnu"))
needs_arm = pytest.mark.skipif(
    not shutil.which("qemu-aarch64-static") or not ARM_LIBRARIES.exists(),
    reason="needs qemu-aarch64-static and the C library of aarch64",
)


def run(*command, **options) -> str:
    process = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    assert process.returncode == 0, process.stdout
    return process.stdout


def build(kind: str, sources: Path, output: Path, environment=None) -> Path:
    output.mkdir(exist_ok=True)
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(output)!r}))"
    said = run(sys.executable, "-W", "ignore", "-c", code, cwd=sources, env=environment)
    return output / said.split()[-1]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The sources as one who works on them has them, with data files that are still to come."""
    tree = tmp_path_factory.mktemp("packaging") / "tree"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.so", "*.egg-info", "build", "dist", "golden", "shared")
    shutil.copytree(ROOT, tree, ignore=ignored)
    for name in (
        "modelspec/exports/photographs/cat.jpg",
        "modelspec/exports/photographs/NOTICE.png",
        "parity/py.typed",
        "notebooks/tour.ipynb",
    ):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("planted")
    return tree


@pytest.fixture(scope="module")
def sdist(tree):
    return build("sdist", tree, tree.parent / "made")


@pytest.fixture(scope="module")
def wheel(tree, sdist):
    """Built from the sdist by the system's compiler, without its optimizations, for they take a minute."""
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    with tarfile.open(sdist) as archive:
        archive.extractall(tree.parent / "unpacked", filter="data")
    compiler = tree.parent / "compile"
    compiler.write_text('#!/bin/sh\nexec g++ "$@" -O0\n')
    compiler.chmod(0o755)
    environment = os.environ | {"CXX": str(compiler), "LDCXXSHARED": f"{compiler} -shared"}
    return build("wheel", tree.parent / "unpacked" / sdist.name.removesuffix(".tar.gz"), sdist.parent, environment)


def check(wheel: Path, root: Path) -> str:
    """Returns what check_contents finds wrong, one problem a line."""
    code = (
        "import sys, check_wheel; print(*check_wheel.check_contents(*map(check_wheel.Path, sys.argv[1:])), sep='\\n')"
    )
    return run(sys.executable, "-c", code, wheel, root, cwd=CHECK.parent).strip()


def test_the_sdist_holds_all_that_building_needs(tree, sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames() if archive.getmember(name).isfile()}
    needed = {"setup.py", "setup.cfg", "pyproject.toml", "MANIFEST.in", "constraints.txt", "README.md", "LICENSE"}
    packages = ("modelspec", "neighborhood", "tfmodels", "ptmodels", "parity", "twinzoo")
    needed |= {str(path.relative_to(tree)) for name in packages for path in (tree / name).rglob("*") if path.is_file()}
    assert not needed - names
    assert "neighborhood/csrc/kernels.cc" in names and "neighborhood/csrc/simd.h" in names


def test_the_sdist_leaves_out_tests_benchmarks_and_what_is_built(sdist):
    with tarfile.open(sdist) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "notebooks")) or name.endswith(".so")]


def test_a_wheel_from_the_sdist_is_for_any_python_and_complete(tree, wheel):
    assert wheel.name.startswith("twinzoo-") and "-py3-none-linux_" in wheel.name
    assert check(wheel, tree) == ""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    for name in (
        "neighborhood/libneighborhood.so",
        "neighborhood/libneighborhood_tensorflow.so",
        "parity/templates/report.html",
        "parity/py.typed",
        "modelspec/exports/photographs/cat.jpg",
        "modelspec/exports/photographs/NOTICE.png",
    ):
        assert name in names
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "notebooks"))]


def test_the_libraries_of_a_wheel_show_their_c_interface_alone(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        for name in ("libneighborhood", "libneighborhood_tensorflow"):
            library = archive.extract(f"neighborhood/{name}.so", tmp_path)
            shown = run("nm", "--dynamic", "--defined-only", "--format=posix", library).splitlines()
            others = [line for line in shown if not line.startswith("neighborhood_")]
            assert not others and bool(shown) == (name == "libneighborhood")


def test_an_installed_wheel_computes_with_its_own_library(wheel, tmp_path):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
    run(*pip, "--target", tmp_path, wheel)
    code = """
import numpy as np
from neighborhood import native, reference
q, k, v = np.random.default_rng(0).standard_normal((3, 1, 9, 8, 2, 8))
assert np.allclose(native.neighborhood_attention(q, k, v, 3), reference.neighborhood_attention(q, k, v, 3))
print(native.LIBRARY)
"""
    library = run(sys.executable, "-c", code, cwd=tmp_path).strip()
    assert library == str(tmp_path / "neighborhood" / "libneighborhood.so")


@pytest.mark.slow
def test_where_there_is_no_compiler_a_wheel_of_the_sdist_computes_with_the_composed_operator(sdist, tmp_path):
    folders = {name: tmp_path / name for name in ("sources", "made", "installed", "binaries")}
    folders["binaries"].mkdir()
    kept = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX", "LDCXXSHARED", "PYTHONPATH")}
    environment = kept | {"PATH": str(folders["binaries"])}
    with tarfile.open(sdist) as archive:
        archive.extractall(folders["sources"], filter="data")
    sources = folders["sources"] / sdist.name.removesuffix(".tar.gz")
    wheel = build("wheel", sources, folders["made"], environment)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "neighborhood/native.py" in names and not [name for name in names if name.endswith(".so")]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
    run(*pip, "--target", folders["installed"], wheel, env=environment)
    code = """
import warnings
import numpy as np, tensorflow as tf, torch
import neighborhood, ptmodels.ops, tfmodels.ops
from neighborhood import native, reference
from parity.__main__ import main

assert native.LIBRARY.name == "libneighborhood.so" and "was not built" in native.why_unavailable()
q, k, v = np.random.default_rng(0).standard_normal((3, 1, 9, 8, 2, 8))
bias = np.random.default_rng(1).standard_normal((2, 5, 5))
expected = reference.neighborhood_attention(q, k, v, 3, 2, rel_pos_bias=bias)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for half, tensor in ((ptmodels.ops, torch.from_numpy), (tfmodels.ops, tf.constant)):
        found = half.neighborhood_attention(*map(tensor, (q, k, v)), 3, 2, rel_pos_bias=tensor(bias))
        assert np.abs(np.asarray(found) - expected).max() < 1e-12
assert any("runs without its C++ kernels, many times slower" in str(warning.message) for warning in said)
print(neighborhood.__file__)
raise SystemExit(main(["check", "nat-mini", "--reduced", "--size", "32x32", "--level", "outputs"]))
"""
    said = run(sys.executable, "-c", code, cwd=folders["installed"], env=environment)
    assert str(folders["installed"] / "neighborhood") in said and "pass" in said and "FAIL" not in said


def test_the_kernels_of_a_wheel_know_the_processor(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        library = archive.extract("neighborhood/libneighborhood.so", tmp_path)
    code = (
        "import sys, check_wheel; print(*check_wheel.check_instruction_sets(check_wheel.Path(sys.argv[1])), sep='\\n')"
    )
    assert run(sys.executable, "-c", code, library, cwd=CHECK.parent).strip() == ""


@pytest.mark.parametrize(
    ("drop", "add", "tag", "problem"),
    [
        ("neighborhood/libneighborhood.so", None, None, "lacks neighborhood/libneighborhood.so"),
        ("parity/templates/report.css", None, None, "lacks parity/templates/report.css"),
        ("LICENSE", None, None, "lacks the LICENSE"),
        (None, "tests/test_readme.py", None, "holds tests/test_readme.py, which is no part of the packages"),
        (None, None, "cp311-cp311-linux_x86_64", "is tagged cp311-cp311-linux_x86_64; it must be for any Python 3"),
        (None, None, "py3-none-manylinux_2_28_x86_64", "lacks the licence of libc++, which is part of its libraries"),
        (None, None, "py3-none-any", "says inside Tag: py3-none-linux_x86_64; it must be py3-none-any"),
    ],
)
def test_the_check_names_what_is_wrong_with_a_wheel(tree, wheel, tmp_path, drop, add, tag, problem):
    name = wheel.name if tag is None else "-".join([*wheel.name.split("-")[:2], f"{tag}.whl"])
    with zipfile.ZipFile(wheel) as archive, zipfile.ZipFile(tmp_path / name, "w") as damaged:
        for member in archive.namelist():
            if drop is None or not member.endswith(drop):
                damaged.writestr(member, archive.read(member))
        if add:
            damaged.writestr(add, "")
    assert problem in check(tmp_path / name, tree)


@pytest.fixture(scope="module")
def given_away(tmp_path_factory):
    """What wheels/build_wheels.py makes, and has checked; `TWINZOO_WHEELS` names a folder where it has done so."""
    if made := os.environ.get("TWINZOO_WHEELS"):
        return Path(made).absolute()
    output = tmp_path_factory.mktemp("dist")
    run(sys.executable, ROOT / "wheels" / "build_wheels.py", "--output", output)
    return output


@pytest.mark.slow
@needs_wheels
def test_wheels_for_two_machines_pass_the_check(given_away):
    version = next(given_away.glob("*.tar.gz")).name.removesuffix(".tar.gz")
    wheels = [given_away / f"{version}-py3-none-manylinux_2_28_{machine}.whl" for machine in ("x86_64", "aarch64")]
    assert sorted(given_away.glob("*.whl")) == sorted(wheels)
    assert run(sys.executable, CHECK, *wheels).count(": good\n") == 2


@pytest.mark.slow
@needs_wheels
def test_a_wheel_built_by_the_system_is_not_for_manylinux(wheel, tmp_path):
    """It needs the system's C++ library, and perhaps a newer glibc."""
    name = wheel.name.replace("-linux_", "-manylinux_2_28_")
    with zipfile.ZipFile(wheel) as archive, zipfile.ZipFile(tmp_path / name, "w") as retagged:
        for member in archive.namelist():
            retagged.writestr(member, archive.read(member).replace(b"none-linux_", b"none-manylinux_2_28_"))
    process = subprocess.run([sys.executable, CHECK, tmp_path / name], capture_output=True, text=True)
    assert process.returncode == 1 and "libneighborhood.so needs libstdc++.so.6" in process.stdout


@pytest.mark.slow
@needs_wheels
@needs_arm
def test_random_calls_of_the_library_for_aarch64_neither_crash_nor_err(given_away, tmp_path):
    [wheel] = given_away.glob("*_aarch64.whl")
    with zipfile.ZipFile(wheel) as archive:
        library = archive.extract("neighborhood/libneighborhood.so", tmp_path)
    compiler = [sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-linux-gnu.2.28", "-std=c++17", "-O2"]
    program = tmp_path / "fuzz"
    path = f"-Wl,-rpath,{Path(library).parent}"
    run(*compiler, ROOT / "tests" / "neighborhood" / "fuzz.cc", library, path, "-lpthread", "-o", program)
    assert run("qemu-aarch64-static", "-L", ARM_LIBRARIES, program, "300", "1").endswith(" 0 failures\n")


@pytest.fixture(scope="module")
def fresh(given_away, tmp_path_factory):
    """Runs commands of a fresh environment with the wheel and both frameworks, and no compiler."""
    folder = tmp_path_factory.mktemp("fresh")
    run(sys.executable, "-m", "venv", folder / "venv")
    binaries = folder / "venv" / "bin"
    kept = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX", "PYTHONPATH")}
    environment = kept | {"PATH": str(binaries)}
    assert not [name for name in COMPILERS if shutil.which(name, path=environment["PATH"])]
    [wheel] = given_away.glob(f"*_{os.uname().machine}.whl")
    pip = [binaries / "python", "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-cache-dir"]
    wanted = f"{wheel}[tf,torch]"
    run(*pip, "-c", ROOT / "constraints.txt", wanted, cwd=folder, env=environment)
    yield lambda name, *arguments: run(binaries / name, *arguments, cwd=folder, env=environment)
    shutil.rmtree(folder)  # gigabytes


@pytest.mark.slow
@needs_wheels
def test_the_operator_agrees_in_a_fresh_environment_without_a_compiler(fresh):
    said = fresh("parity", "check", "nat-mini", "--level", "op")
    for half in ("torch", "keras"):
        assert any("native" in line and half in line and "pass" in line for line in said.splitlines()), said


@pytest.mark.slow
@needs_wheels
def test_models_compute_with_the_native_operator_in_a_fresh_environment(fresh):
    code = """
import ptmodels.composed_attention, tfmodels.composed_attention
from neighborhood import native
from parity.__main__ import main

def composed(*arguments, **options):
    raise AssertionError("the composed implementation was used")

for half in (ptmodels, tfmodels):
    assert half.composed_attention.neighborhood_attention is not composed
    half.composed_attention.neighborhood_attention = composed
assert native.why_unavailable() is None and "site-packages" in str(native.LIBRARY)
raise SystemExit(main(["check", "nat-mini", "--level", "outputs"]))
"""
    said = fresh("python", "-c", code)
    assert "pass" in said and "twinzoo's coffee, 480x640" in said  # the image, too, came with the wheel
