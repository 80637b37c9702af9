"""Recipes that come with the package: where they are and what they are called."""

from __future__ import annotations

import difflib
from pathlib import Path

from mlm_cli.errors import UsageError


def recipes_root() -> Path:
    """The folder of built-in recipes: inside an installed package, else beside it in a source checkout."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "_recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def builtin_names() -> list[str]:
    """Every built-in name, such as ``gpt/355m``, sorted."""
    root = recipes_root()
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))


def builtin_scripts() -> dict[str, str]:
    """Job scripts that come with the recipes, such as ``slurm/pretrain.sh``, and the first line of what they say."""
    root = recipes_root()
    found = {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*.sh"))}
    return {name: path.read_text(encoding="utf-8").splitlines()[1].lstrip("# ") for name, path in found.items()}


def find_recipe(spec: str, *, beside: Path | None = None) -> Path:
    """The file a recipe is read from.

    Args:
        spec: a file, a run folder (its ``recipe.yaml``) or a built-in name.
        beside: the recipe that names ``spec`` as its base; relative files are looked for in its folder.

    Raises:
        UsageError: there is no such recipe; the hint names the nearest.
    """
    path = Path(spec).expanduser()
    if beside is not None:
        path = beside.parent / path
    if path.is_file():
        return path
    if (path / "recipe.yaml").is_file():
        return path / "recipe.yaml"
    name = spec.removesuffix(".yaml")
    builtin = recipes_root() / f"{name}.yaml"
    if name in builtin_names():
        return builtin
    looks_like_file = spec.endswith((".yaml", ".yml")) or spec.startswith((".", "/", "~"))
    what = "no recipe file" if looks_like_file else "no built-in recipe or file"
    raise UsageError(f"{what} `{spec}`", hint=_nearest(name, path))


def _nearest(name: str, path: Path) -> str:
    names = builtin_names()
    short = {builtin.rsplit("/", 1)[-1]: builtin for builtin in names}
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    close += [short[match] for match in difflib.get_close_matches(name, short, n=2, cutoff=0.6)]
    folder = path.parent if path.parent.is_dir() else Path()
    files = [str(file) for file in folder.glob("*.y*ml")]
    close = difflib.get_close_matches(str(path), files, n=1, cutoff=0.7) + close
    if close:
        return "did you mean " + " or ".join(f"`{match}`" for match in dict.fromkeys(close)) + "?"
    return "`mlm recipe ls` lists the built-in recipes"
