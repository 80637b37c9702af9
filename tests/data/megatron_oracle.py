"""What Megatron-LM writes for given texts, by the algorithm of its tools/preprocess_data.py and indexed_dataset.py.

Independent of the code under test: plain lists, `struct`, and the `tokenizers` library one text at a time.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

from tokenizers import Tokenizer


class Builder:
    """IndexedDatasetBuilder: ids to a buffer, lengths and document borders in lists, the index at the end."""

    def __init__(self, vocab_size: int) -> None:
        self.code, self.letter, self.size = (8, "H", 2) if vocab_size < 65500 else (4, "i", 4)
        self.data = b""
        self.lengths: list[int] = []
        self.documents = [0]

    def add_document(self, ids: list[int], lengths: list[int]) -> None:
        self.data += struct.pack(f"<{len(ids)}{self.letter}", *ids)
        self.lengths += lengths
        self.documents.append(len(self.lengths))

    def index(self) -> bytes:
        pointers, at = [], 0
        for length in self.lengths:
            pointers.append(at)
            at += length * self.size
        count = len(self.lengths)
        return (
            b"MMIDIDX\x00\x00"
            + struct.pack("<QBQQ", 1, self.code, count, len(self.documents))
            + struct.pack(f"<{count}i", *self.lengths)
            + struct.pack(f"<{count}q", *pointers)
            + struct.pack(f"<{len(self.documents)}q", *self.documents)
        )


def preprocess(jsonl: Path, tokenizer_json: Path, *, key: str = "text", eod: int | None) -> tuple[bytes, bytes]:
    """(.bin, .idx) of a JSON-lines file."""
    tokenizer = Tokenizer.from_file(str(tokenizer_json))
    builder = Builder(tokenizer.get_vocab_size())
    with jsonl.open(encoding="utf-8") as lines:
        for line in lines:
            text = json.loads(line)[key]
            ids: list[int] = []
            lengths: list[int] = []
            for sentence in text if isinstance(text, list) else [text]:
                found = tokenizer.encode(sentence, add_special_tokens=False).ids
                if len(found) > 0:
                    ids.extend(found)
                    lengths.append(len(found))
            if len(ids) > 0 and eod is not None:
                ids.append(eod)
                lengths[-1] += 1
            builder.add_document(ids, lengths)
    return builder.data, builder.index()
