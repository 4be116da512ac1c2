"""Builds the native part by CMakeLists.txt; all else about the package is in pyproject.toml.

Without a C++ compiler the package is still whole: reference and Triton backends, in Python alone.
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def find_compiler() -> str | None:
    """The C++ compiler CMake would take, or None."""
    named = os.environ.get("CXX")
    return (
        shutil.which(named)
        if named
        else next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    )


class CleanBuild(build):
    """A wheel of what the tree holds now, without what an earlier build left behind."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    """One CMake build yields every binary; `_C` stands for all of them in setuptools' eyes."""

    def run(self) -> None:
        if find_compiler() is None:
            print("deepfusion: no C++ compiler found: pure Python (reference and Triton)")
            return
        # the cmake and ninja of an environment that was not activated
        os.environ["PATH"] += os.pathsep + sysconfig.get_path("scripts")
        folder = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        target = Path(self.get_ext_fullpath("deepfusion_kernels._C")).parent.resolve()
        configure = ["cmake", f"-S{ROOT}", f"-B{folder}", "-GNinja", "-DCMAKE_BUILD_TYPE=Release"]
        configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_INSTALL_PREFIX={target}"]
        # the folder may remember the ninja of an isolated build whose environment is gone
        if ninja := shutil.which("ninja"):
            configure += [f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        subprocess.check_call(configure + shlex.split(os.environ.get("CMAKE_ARGS", "")))
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count()))
        subprocess.check_call(["cmake", "--build", str(folder), "-j", jobs])
        subprocess.check_call(["cmake", "--install", str(folder), "--component", "python"])

    def get_outputs(self) -> list[str]:
        if find_compiler() is None:
            return []
        return [self.get_ext_fullpath(extension.name) for extension in self.extensions]

    def copy_extensions_to_source(self) -> None:
        """Nothing to copy: CMake installs beside the package itself."""


setup(
    packages=find_packages(
        include=["deepfusion", "deepfusion.*", "deepfusion_kernels", "deepfusion_kernels.*"]
    ),
    cmdclass={"build": CleanBuild, "build_ext": CMakeBuild},
    ext_modules=[Extension("deepfusion_kernels._C", sources=[])],
)
