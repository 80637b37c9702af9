"""YAML in and out: the core schema of YAML 1.2, with the line of every key.

PyYAML follows YAML 1.1, in which ``3e-4`` is text, ``no`` is false and ``1:30`` is ninety. Recipes are full of learning
rates, so plain scalars are resolved by the rules of YAML 1.2 (https://yaml.org/spec/1.2.2/, section 10.3).
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any, ClassVar

from mlm_cli.errors import UsageError

Lines = dict[tuple[str, ...], int]


@cache
def _loader() -> type:
    """The loader class, made on first use: importing yaml costs more than most commands take."""
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers: ClassVar[dict[Any, Any]] = {}

    def resolve(tag: str, pattern: str, first: str) -> None:
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"^(?:{pattern})$"), list(first))

    resolve("bool", "true|True|TRUE|false|False|FALSE", "tTfF")
    resolve("int", r"[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789")
    resolve(
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    )
    resolve("null", "~|null|Null|NULL|", "~nN\0")
    Loader.yaml_implicit_resolvers[""] = Loader.yaml_implicit_resolvers.pop("\0")
    resolve("merge", "<<", "<")

    def whole(loader: Any, node: Any) -> int:
        text = loader.construct_scalar(node).replace("_", "")
        return int(text, 0) if text.startswith(("0x", "0o")) else int(text)

    def real(loader: Any, node: Any) -> float:
        text = loader.construct_scalar(node).replace("_", "").lower()
        return float(text.replace(".inf", "inf").replace(".nan", "nan"))

    Loader.add_constructor("tag:yaml.org,2002:int", whole)
    Loader.add_constructor("tag:yaml.org,2002:float", real)
    return Loader


def parse(text: str, *, source: str) -> tuple[Any, Lines]:
    """Read one YAML document.

    Args:
        text: the document.
        source: file name for messages.

    Returns:
        The value, and the 1-based line of every key in it (keys as tuples from the root).

    Raises:
        UsageError: not YAML, or a key given twice, with file and line.
    """
    import yaml

    loader = _loader()(text)
    try:
        node = loader.get_single_node()
        lines: Lines = {}
        _walk(node, (), lines, source)
        return (None if node is None else loader.construct_document(node)), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{source}:{mark.line + 1}" if mark else source
        raise UsageError(f"{where}: not valid YAML: {error.problem or error}", hint=_yaml_hint(text, mark)) from None
    except yaml.YAMLError as error:
        raise UsageError(f"{source}: not valid YAML: {error}") from None
    finally:
        loader.dispose()


def _yaml_hint(text: str, mark: Any) -> str:
    line = text.splitlines()[mark.line] if mark and mark.line < len(text.splitlines()) else ""
    if "\t" in line:
        return "YAML is indented with spaces, not tabs"
    return "check indentation, quotes and the `key: value` form around that line"


def _walk(node: Any, path: tuple[str, ...], lines: Lines, source: str) -> None:
    import yaml

    if isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            _walk(item, (*path, str(number)), lines, source)
    if not isinstance(node, yaml.MappingNode):
        return
    own: set[str] = set()
    for key, value in node.value:
        if key.tag == "tag:yaml.org,2002:merge":
            continue
        here = (*path, str(key.value))
        line = key.start_mark.line + 1
        if here[-1] in own:
            raise UsageError(
                f"{source}:{line}: `{'.'.join(here)}` is given twice, first on line {lines[here]}",
                hint="keep one of them",
            )
        own.add(here[-1])
        lines[here] = line
        _walk(value, here, lines, source)


def parse_value(text: str) -> Any:
    """The value of a ``KEY=VALUE`` override: YAML where it is YAML, else the text itself."""
    import yaml

    try:
        return yaml.load(text, _loader())
    except yaml.YAMLError:
        return text


def dump(value: Any) -> str:
    """YAML text that ``parse`` reads back to the same value; lists of plain values stay on one line."""
    import yaml

    class Dumper(yaml.SafeDumper):
        yaml_implicit_resolvers: ClassVar[dict[Any, Any]] = _dump_resolvers()

    def sequence(dumper: Any, data: Any) -> Any:
        flat = all(not isinstance(item, (dict, list, tuple)) for item in data)
        return dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=flat)

    def real(dumper: Any, data: float) -> Any:
        text = repr(data)
        mantissa, mark, exponent = text.partition("e")
        if mark and "." not in mantissa:
            text = f"{mantissa}.0e{exponent}"
        return dumper.represent_scalar("tag:yaml.org,2002:float", text)

    Dumper.add_representer(list, sequence)
    Dumper.add_representer(tuple, sequence)
    Dumper.add_representer(float, real)
    return str(yaml.dump(value, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=110))


def _dump_resolvers() -> dict[Any, Any]:
    """Quote what either YAML 1.1 or 1.2 would not read as text, so that other programs read our files alike."""
    import yaml

    both = {key: list(value) for key, value in yaml.SafeDumper.yaml_implicit_resolvers.items()}
    for key, value in _loader().yaml_implicit_resolvers.items():  # type: ignore[attr-defined]
        both.setdefault(key, []).extend(value)
    return both
