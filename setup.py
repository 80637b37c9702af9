"""Builds the operators of csrc/ while installing, where torch and a compiler are; all else is in pyproject.toml."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

COMPILER = Path(__file__).resolve().parent / "mlm_cli" / "ops" / "compiler.py"


def load_compiler() -> ModuleType:
    """The one file that knows how to compile ``csrc/``; the package itself cannot be imported without torch."""
    spec = importlib.util.spec_from_file_location("mlm_compiler", COMPILER)
    assert spec is not None and spec.loader is not None
    module = sys.modules["mlm_compiler"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildWithOperators(build_py):
    """``build_py`` that also compiles ``csrc/`` into the package; a build without them is complete, only slower."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return  # `make build` puts the libraries beside the sources
        compiler = load_compiler()
        try:
            compiler.build_cpu(Path(self.build_lib).resolve() / "mlm_cli" / "ops" / "_lib")
        except compiler.BuildError as failure:
            compiler.say(f"CPU kernels not built ({failure}); once installed: python -m mlm_cli.ops.build")


class PlatformDistribution(Distribution):
    """The wheel carries compiled libraries, so it belongs to one platform."""

    def has_ext_modules(self) -> bool:
        return True


setup(cmdclass={"build_py": BuildWithOperators}, distclass=PlatformDistribution)
