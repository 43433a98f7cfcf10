"""Says what is wrong with wheels: `python wheels/check_wheel.py WHEEL...` exits with 1 if anything is.

All wheels are looked through; those for a manylinux platform also as what others will run: needs the extra `wheels`.
"""

import configparser
import ctypes
import email
import json
import platform
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = {"neighborhood/libneighborhood.so", "neighborhood/libneighborhood_tensorflow.so"}
# What every Linux has. libstdc++ is none of it: it may be older there than the one that was built with.
NEEDED = {"libneighborhood.so", "libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0"}
# part of the libraries of a wheel for manylinux -> its licence in the package `ziglang`
LINKED = {
    "libc++": "lib/libcxx/LICENSE.TXT",
    "libc++abi": "lib/libcxxabi/LICENSE.TXT",
    "libunwind": "lib/libunwind/LICENSE.TXT",
    "zig": "LICENSE",
}
# machine -> its number in the header of a library, its loader
MACHINES = {"x86_64": ("EM_X86_64", "ld-linux-x86-64.so.2"), "aarch64": ("EM_AARCH64", "ld-linux-aarch64.so.1")}
# instruction set -> what /proc/cpuinfo names where it can be had
CPU_FLAGS = {
    "avx512": {"avx512f", "avx512vl", "avx512bw", "avx512dq", "avx2", "fma", "f16c"},
    "avx2": {"avx2", "fma", "f16c"},
    "baseline": set(),
}


def check_contents(wheel: Path, root: Path = ROOT) -> list[str]:
    """Returns what is wrong with tags and files: these are those of the packages under `root`, and the libraries."""
    problems = []
    tag = _tag(wheel)
    if not tag.startswith("py3-none-") or tag.endswith("-any"):
        problems.append(f"is tagged {tag}; it must be for any Python 3 and one platform: py3-none-<platform>")
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if not name.endswith("/")}
        metadata = {Path(name).name: name for name in files if Path(name).parent.suffix == ".dist-info"}
        told = email.message_from_bytes(archive.read(metadata["WHEEL"]))
    for field, expected in {"Tag": tag, "Root-Is-Purelib": "false"}.items():
        if told[field] != expected:
            problems.append(f"says inside {field}: {told[field]}; it must be {expected}")
    if not any(name.endswith(".dist-info/licenses/LICENSE") for name in files):
        problems.append("lacks the LICENSE")
    for part in LINKED if "-manylinux_" in tag else ():
        if not any(name.endswith(f".dist-info/licenses/LICENSE.{part}") for name in files):
            problems.append(f"lacks the licence of {part}, which is part of its libraries")
    files = {name for name in files if ".dist-info/" not in name}
    expected = package_files(root) | LIBRARIES
    problems += [f"lacks {name}" for name in sorted(expected - files)]
    problems += [f"holds {name}, which is no part of the packages" for name in sorted(files - expected)]
    return problems


def package_files(root: Path = ROOT) -> set[str]:
    """Returns the files of the packages that setup.cfg names, relative to `root`: all but what is built, and C++."""
    config = configparser.ConfigParser()
    config.read(root / "setup.cfg")
    packages = [pattern.rstrip("*") for pattern in config["options.packages.find"]["include"].split()]
    paths = [path.relative_to(root) for package in packages for path in (root / package).rglob("*") if path.is_file()]
    return {str(path) for path in paths if path.suffix != ".so" and not {"csrc", "__pycache__"} & set(path.parts)}


def check_libraries(wheel: Path) -> list[str]:
    """Returns what is wrong with the libraries of a wheel for manylinux: their machine, and what they need and show.

    auditwheel is asked too; and where this machine can, it runs every instruction set that it has.
    """
    machine = next((machine for machine in MACHINES if wheel.stem.endswith(f"_{machine}")), None)
    if machine is None:
        return [f"is for an unknown machine; known are {', '.join(MACHINES)}"]
    problems = _audit(wheel, machine)
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(wheel) as archive:
            present = sorted(LIBRARIES & set(archive.namelist()))
            libraries = [Path(archive.extract(name, folder)) for name in present]
        for library in libraries:
            problems += [f"{library.name} {problem}" for problem in _check_library(library, machine)]
        kernels = Path(folder, "neighborhood", "libneighborhood.so")
        if kernels.exists() and machine == platform.machine():
            problems += check_instruction_sets(kernels)
    return problems


def check_instruction_sets(library: Path) -> list[str]:
    """Returns which instruction sets of this machine the kernels refuse, and whether they take another than the best.

    A library whose runtime does not know the processor computes the same, several times slower.
    """
    try:
        kernels = ctypes.CDLL(str(library))
    except OSError as error:
        return [f"{library.name} cannot be loaded: {error}"]
    kernels.neighborhood_instruction_set.restype = ctypes.c_char_p
    kernels.neighborhood_set_instruction_set.restype = ctypes.c_char_p
    cpuinfo = Path("/proc/cpuinfo").read_text()
    flags = next((set(line.split()) for line in cpuinfo.splitlines() if line.startswith("flags")), set())
    available = [name for name, needed in CPU_FLAGS.items() if needed <= flags]
    refusals = [kernels.neighborhood_set_instruction_set(name.encode()) for name in reversed(available)]
    problems = [f"{library.name} refuses: {refusal.decode()}" for refusal in refusals if refusal]
    chosen = kernels.neighborhood_instruction_set().decode()
    return problems + ([] if chosen == available[0] else [f"{library.name} takes {chosen}, not {available[0]}"])


def _tag(wheel: Path) -> str:
    return "-".join(wheel.stem.split("-")[-3:])


def _audit(wheel: Path, machine: str) -> list[str]:
    """Asks auditwheel for the oldest platform that the wheel would do for; that of its tag must not be older."""
    command = [sys.executable, "-m", "auditwheel", "show", "--json", wheel]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        return [f"auditwheel: {process.stderr.strip()}"]
    found = json.loads(process.stdout)
    faults = ("external_libs", "unsupported_isa", "pure")
    problems = [f"is found by auditwheel to have {name}: {found[name]}" for name in faults if found[name]]
    tagged = _tag(wheel).removeprefix("py3-none-")
    if _glibc(found["overall_tag"], machine) > _glibc(tagged, machine):
        problems.append(f"is tagged {tagged}; auditwheel finds it to need {found['overall_tag']}")
    return problems


def _glibc(tag: str, machine: str) -> tuple[int, ...]:
    """Returns the version of glibc in a tag; infinite where it names none."""
    version = tag.removeprefix("manylinux_").removesuffix(f"_{machine}")
    if not version.replace("_", "").isdigit():
        return (sys.maxsize,)
    return tuple(map(int, version.split("_")))


def _check_library(library: Path, machine: str) -> list[str]:
    from elftools.elf.elffile import ELFFile

    elf_machine, loader = MACHINES[machine]
    with library.open("rb") as file:
        elf = ELFFile(file)
        if elf["e_machine"] != elf_machine:
            return [f"is for {elf['e_machine']}, not {elf_machine}"]
        tags = list(elf.get_section_by_name(".dynamic").iter_tags())
        needed = {tag.needed for tag in tags if tag.entry.d_tag == "DT_NEEDED"}
        paths = {tag.runpath for tag in tags if tag.entry.d_tag == "DT_RUNPATH"}
        paths |= {tag.rpath for tag in tags if tag.entry.d_tag == "DT_RPATH"}
        symbols = elf.get_section_by_name(".dynsym").iter_symbols()
        shown = {symbol.name for symbol in symbols if symbol.name and symbol["st_shndx"] != "SHN_UNDEF"}
    problems = [f"needs {name}" for name in sorted(needed - NEEDED - {loader})]
    expected = {"$ORIGIN"} if "libneighborhood.so" in needed else set()
    if paths != expected:
        problems.append(f"is looked up in {sorted(paths)}; it must be {sorted(expected)}")
    problems += [f"shows {name} to others" for name in sorted(shown) if not name.startswith("neighborhood_")]
    return problems


def main(wheels: list[str]) -> int:
    failed = False
    for wheel in map(Path, wheels):
        problems = check_contents(wheel)
        if "-manylinux" in wheel.name:
            problems += check_libraries(wheel)
        failed |= bool(problems)
        print("\n".join(f"{wheel.name}: {problem}" for problem in problems) or f"{wheel.name}: good")
    return int(failed or not wheels)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
