"""Builds the kernels of neighborhood attention; all else about this package stands in setup.cfg.

Two libraries: the kernels behind a C interface, and TensorFlow's op, which calls them. Neither needs a framework's
headers. Without a compiler the package installs all the same. Neither depends on the version of Python either, so one
wheel serves them all; wheels/build_wheels.py makes those that are given away.
"""

import os
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = Path("neighborhood/csrc")
FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=fast", "-Wall", "-Wextra"]
# name -> bytes of a register, what the compiler must be told
INSTRUCTION_SETS = {"baseline": (16, [])}
if sysconfig.get_platform().endswith(("-x86_64", "-amd64")):  # what is built for, in cross builds too
    INSTRUCTION_SETS |= {
        "avx2": (32, ["-mavx2", "-mfma", "-mf16c"]),
        "avx512": (64, ["-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mfma"]),
    }


class BuildLibraries(build_ext):
    def get_ext_filename(self, name):
        return name.replace(".", "/") + ".so"  # no module of Python

    def build_extension(self, extension):
        library = Path(self.get_ext_fullpath(extension.name))
        jobs = [job for source in extension.sources for job in self.variants(Path(source))]
        with ThreadPoolExecutor(os.cpu_count()) as executor:  # compilers are processes of their own
            objects = list(executor.map(lambda job: self.compile(*job), jobs))
        self.compiler.link_shared_object(
            [part for parts in objects for part in parts],
            str(library),
            libraries=extension.libraries,
            library_dirs=[str(library.parent)],
            extra_postargs=extension.extra_link_args,
            target_lang="c++",
        )

    def variants(self, source):
        """Source, folder of the object file and flags: once, or once per instruction set."""
        if source.name != "kernels.cc":
            return [(source, self.build_temp, [])]
        return [
            (source, f"{self.build_temp}/{name}", [*macros(name, size), *flags])
            for name, (size, flags) in INSTRUCTION_SETS.items()
        ]

    def compile(self, source, folder, flags):
        return self.compiler.compile([str(source)], output_dir=folder, extra_postargs=[*FLAGS, *flags])


class WheelForAnyPython(bdist_wheel):
    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


def macros(name, size):
    return [f"-DNEIGHBORHOOD_INSTRUCTION_SET={name}", f"-DNEIGHBORHOOD_VECTOR_BYTES={size}"]


headers = [str(path) for path in SOURCES.glob("*.h")]
exports = SOURCES / "exports.map"
setup(
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": WheelForAnyPython},
    ext_modules=[
        Extension(
            "neighborhood.libneighborhood",
            [str(SOURCES / name) for name in ("kernels.cc", "attention.cc", "thread_pool.cc")],
            depends=[*headers, str(exports)],
            libraries=["pthread"],
            extra_link_args=[f"-Wl,--version-script={exports}"],
            optional=True,
        ),
        Extension(
            "neighborhood.libneighborhood_tensorflow",
            [str(SOURCES / "tensorflow_op.cc")],
            depends=[*headers, str(exports)],
            libraries=["neighborhood", "dl"],
            extra_link_args=["-Wl,-rpath,$ORIGIN", f"-Wl,--version-script={exports}"],
            optional=True,
        ),
    ],
)
