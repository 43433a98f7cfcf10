"""Random calls of the kernels' C interface, good and hostile (fuzz.cc), plain and under the compiler's sanitizers."""

import shutil
import subprocess
from pathlib import Path

import pytest

from neighborhood import native

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory):
    program = tmp_path_factory.mktemp("fuzz") / "fuzz"
    library = native.LIBRARY.resolve()
    subprocess.run(
        [
            "g++",
            "-std=c++17",
            "-O2",
            HERE / "fuzz.cc",
            library,
            f"-Wl,-rpath,{library.parent}",
            "-lpthread",
            "-o",
            program,
        ],
        check=True,
    )

    def run(calls: int, seed: int) -> str:
        process = subprocess.run([program, str(calls), str(seed)], capture_output=True, text=True, timeout=3000)
        assert process.returncode == 0, process.stdout + process.stderr
        return process.stdout

    return run


def test_random_calls_neither_crash_nor_err(fuzz):
    assert fuzz(3000, 1).endswith("0 failures\n")


@pytest.mark.slow
def test_a_hundred_thousand_calls_neither_crash_nor_err(fuzz):
    assert fuzz(100_000, 2).endswith("0 failures\n")


@pytest.mark.slow
@pytest.mark.parametrize(("sanitizer", "calls"), [("address,undefined", 10_000), ("thread", 3000)])
def test_sanitizers_find_nothing(sanitizer, calls):
    command = [HERE / "sanitize.sh", sanitizer, str(calls)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=3000)
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stdout.endswith("0 failures\n")
