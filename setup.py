"""The repository root is the package `edgeformer`: folders and files here map to edgeformer.<folder>."""

from __future__ import annotations

from setuptools import find_namespace_packages, setup
from setuptools.command.build_py import build_py

FOLDERS = ("compiler", "kernels", "runtime", "model", "bench", "autotune_cache")
NOT_MODULES = {"setup", "conftest"}


class BuildPackage(build_py):
    """Leaves out the files beside the modules in the root that are no part of the package."""

    def find_package_modules(self, package, package_dir):
        modules = super().find_package_modules(package, package_dir)
        return [entry for entry in modules if entry[1] not in NOT_MODULES]


folders = find_namespace_packages(
    ".",
    include=[pattern for folder in FOLDERS for pattern in (folder, f"{folder}.*")],
    exclude=["*.__pycache__", "*.__pycache__.*", "bench.results", "bench.results.*"],
)
setup(
    packages=["edgeformer", *(f"edgeformer.{folder}" for folder in folders)],
    package_dir={"edgeformer": "."},
    package_data={"edgeformer": ["py.typed"], "": ["*.yaml", "*.c", "*.json", "*.txt"]},
    include_package_data=False,
    cmdclass={"build_py": BuildPackage},
)
