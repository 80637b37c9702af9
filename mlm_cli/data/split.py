"""Shares of a corpus for train, valid and test, cut between documents exactly as Megatron-LM cuts them."""

from __future__ import annotations

from mlm_cli.config.split import parse_split

SPLITS = ("train", "valid", "test")


def split_documents(text: str, num_documents: int) -> dict[str, range]:
    """Document ranges of the three splits; they follow each other and cover all documents.

    Ends are the rounded products of cumulated shares, in the floating point and rounding of Megatron-LM
    (``megatron/core/datasets``: parse_and_normalize_split, convert_split_vector_to_split_matrix and the builder), so
    that a corpus is held out identically in both.
    """
    ends = [0.0]
    for share in parse_split(text):
        ends.append(ends[-1] + share)
    cuts = [round(end * float(num_documents)) for end in ends]
    return {name: range(start, stop) for name, start, stop in zip(SPLITS, cuts[:-1], cuts[1:], strict=True)}
