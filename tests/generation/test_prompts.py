"""Prompts from JSONL, and what is said about lines that are none."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from mlm_cli.errors import DataError
from mlm_cli.generation import prompts


def write(folder: Path, content: bytes) -> str:
    path = folder / "prompts.jsonl"
    path.write_bytes(content)
    return str(path)


def test_order_ids_and_other_fields_are_kept(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        b'{"prompt": "a", "id": "x", "topic": [1]}\n\n{"text": "b"}\r\n{"prompt": "", "text": "t", "id": null}',
    )
    read = list(prompts.from_jsonl(path))
    assert [(p.number, p.text, p.id, p.fields) for p in read] == [
        (0, "a", "x", {"topic": [1]}),
        (1, "b", 1, {}),
        (2, "", None, {"text": "t"}),
    ]
    assert read[1].where == f"{path}:3"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "a"', "not JSON"),
        (b"[" * 100_000, "not JSON: nested too deeply"),
        (b'["a"]', "object was expected, not list"),
        (b'{"question": "a"}', "no `prompt` in it; keys: 'question'"),
        (b'{"prompt": 3}', "`prompt` is not a string but int"),
        (b'{"prompt": "\xff"}', "not UTF-8 at byte 12"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = write(tmp_path, b'{"prompt": "fine"}\n' * 3 + line + b"\n")
    with pytest.raises(DataError, match=message) as caught:
        list(prompts.from_jsonl(path))
    assert f"{path}:4" in caught.value.message


def test_an_overlong_line_is_not_read_into_memory(tmp_path: Path) -> None:
    path = write(tmp_path, b'{"prompt": "' + b"a" * (17 << 20) + b'"}\n')
    with pytest.raises(DataError, match=":1: a line of more than 16 MiB"):
        next(prompts.from_jsonl(path))


def test_files_that_are_empty_or_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no prompts"):
        next(prompts.from_jsonl(write(tmp_path, b"\n \n")))
    with pytest.raises(DataError, match="No such file"):
        next(prompts.from_jsonl(str(tmp_path / "none.jsonl")))
    with pytest.raises(DataError, match="cannot be read"):
        next(prompts.from_jsonl(str(tmp_path)))


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path: Path) -> None:
    assert next(prompts.from_jsonl(write(tmp_path, b'\xef\xbb\xbf{"prompt": "a"}\n'))).text == "a"


def test_standard_input_as_one_prompt() -> None:
    assert prompts.from_text_stream(io.BytesIO("zwei\nZeilen ü\n".encode())).text == "zwei\nZeilen ü\n"
    with pytest.raises(DataError, match="not UTF-8 at byte 2"):
        prompts.from_text_stream(io.BytesIO(b"ab\xff"))
