"""Which tokens go on with the word before them: what whole-word masking needs to know of a vocabulary.

WordPiece says so itself (`##`). In byte-level BPE and SentencePiece a word begins with its space, and beyond that at a
change between letters or digits and other characters, so that "(however" is two words. Scripts that are written without
spaces have no words that a rule could find: there each token that begins with one of their characters is a word.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

import numpy as np

from mlm_cli.data.tokenizer import Tokenizer

# Thai to Myanmar, Khmer, the newer scripts of South-East Asia, and all from the CJK symbols on but Hangul
UNSPACED = ((0x0E00, 0x0F00), (0x1000, 0x10A0), (0x1780, 0x1800), (0x1950, 0x19E0), (0x2E80, 0xA000), (0xF900, 0xFB00))
_WIDE_LEAD = 0xE3  # first byte, in UTF-8, of nearly all characters written without spaces


@dataclass(frozen=True)
class Words:
    """Word boundaries by token id.

    Attributes:
        continues: bool [v], the token goes on with the word before it, unless that one ended.
        ends: bool [v], the token's last character ends its word whatever follows.
    """

    continues: np.ndarray
    ends: np.ndarray

    def starts(self, tokens: np.ndarray) -> np.ndarray:
        """Bool [s]: where words begin in a run of ids [s]; its first token begins one."""
        begins = ~self.continues[tokens]
        begins[1:] |= self.ends[tokens[:-1]]
        begins[:1] = True
        return begins


def single_tokens(vocab_size: int) -> Words:
    """Every token is a word: masking of single tokens."""
    return Words(np.zeros(vocab_size, bool), np.ones(vocab_size, bool))


def words_of(tokenizer: Tokenizer) -> Words:
    """Word boundaries of a tokenizer's vocabulary."""
    continues = np.zeros(tokenizer.vocab_size, bool)
    ends = np.zeros(tokenizer.vocab_size, bool)
    if tokenizer.kind == "WordPiece":
        prefix = tokenizer.definition["model"].get("continuing_subword_prefix") or "##"
        for token, number in tokenizer.token_ids.items():
            continues[number] = token.startswith(prefix) and len(token) > len(prefix)
        return Words(continues, ends)
    for number in tokenizer.token_ids.values():
        content = tokenizer.token_bytes(number)
        if content is None or number in tokenizer.special_ids:
            ends[number] = True
        elif content:
            continues[number] = _goes_on(content)
            last = content[-4:].decode("utf-8", "ignore")[-1:]
            whole = last != "" and content.endswith(last.encode())  # else it stops inside a character
            ends[number] = whole and bool(content.strip(b" ")) and not _is_word(last)
    return Words(continues, ends)


def _goes_on(content: bytes) -> bool:
    """Can a token with these bytes be the rest of a word?"""
    lead = content[0]
    if 0x80 <= lead < 0xC0:  # the rest of a character
        return True
    size = 1 if lead < 0x80 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
    if len(content) == 1 and size > 1:  # the beginning of a character that other tokens finish
        return lead < _WIDE_LEAD
    whole = len(content) >= size
    character = content[:size].ljust(size, b"\x80").decode("utf-8", "replace")
    if whole and unicodedata.category(character)[0] == "M":
        return True
    if any(low <= ord(character) < high for low, high in UNSPACED) or ord(character) >= 0x20000:
        return False
    return not whole or _is_word(character)


def _is_word(character: str) -> bool:
    """Letters, digits and the marks on them; "don't" is three words, as in BERT."""
    return unicodedata.category(character)[0] in "LMN"
