"""Builds the operators of csrc/ while installing, where torch and a compiler are; all else is in pyproject.toml."""

import runpy
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


class BuildWithOperators(build_py):
    """``build_py`` that also compiles ``csrc/`` into the package; a build without them is complete, only slower."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return  # `make build` puts the libraries beside the sources
        build = runpy.run_path(str(ROOT / "mlm_cli" / "ops" / "build.py"), run_name="mlm_build")
        build["build_into"](ROOT / "csrc", Path(self.build_lib) / "mlm_cli" / "ops" / "_lib")


class PlatformDistribution(Distribution):
    """The wheel carries compiled libraries, so it belongs to one platform."""

    def has_ext_modules(self) -> bool:
        return True


setup(cmdclass={"build_py": BuildWithOperators}, distclass=PlatformDistribution)
