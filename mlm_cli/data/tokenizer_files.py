"""Tokenizer files of every kind -> one definition, the content of a Hugging Face ``tokenizer.json``.

Knows where tokenizers live (files, folders, the Hub) and what their files mean. Imports nothing heavy: the definition
is a plain dict that either backend can load.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlm_cli.data.tokenizer_pieces import (
    END_OF_TEXT,
    bert_normalizer,
    bert_template,
    bpe_model,
    byte_level,
    bytes_definition,
    definition_of,
)
from mlm_cli.data.tokenizer_spm import sentencepiece_definition
from mlm_cli.errors import DataError

NAMED = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
_LOADABLE = (
    "a folder or file with `tokenizer.json`, `vocab.json` + `merges.txt`, `vocab.txt` or `*.model`, "
    "a Hub name, or `bytes`"
)
_SPM_NAMES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_VOCAB_TO_MERGES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))


@dataclass
class TokenizerFiles:
    """A tokenizer as read: ``definition`` is what ``tokenizer.json`` holds, ``special`` the named special tokens."""

    definition: dict[str, Any]
    special: dict[str, str] = field(default_factory=dict)
    name: str = ""
    text: str | None = None  # the definition as it stood in its file


def read_tokenizer(spec: str) -> TokenizerFiles:
    """Find and read what ``spec`` names.

    Raises:
        DataError: nothing there, or a file that is not a tokenizer; names the file and what was expected.
    """
    if spec == "bytes":
        return TokenizerFiles(bytes_definition(), {"eos_token": END_OF_TEXT}, "bytes")
    path = Path(spec).expanduser()
    if path.is_dir():
        files = _read_folder(path)
    elif path.is_file():
        files = _read_file(path)
    elif (
        path.suffix in (".json", ".txt", ".model", ".bpe") or spec.startswith((".", "/", "~")) or not _is_hub_name(spec)
    ):
        raise DataError(f"tokenizer `{spec}` does not exist", hint=f"give {_LOADABLE}")
    else:
        from mlm_cli.data.tokenizer_hub import download_tokenizer

        files = _read_folder(download_tokenizer(spec))
        files.name = spec
    check_definition(files.definition, spec)
    if any(files.definition.get(setting) for setting in ("truncation", "padding")):
        files.definition |= {"truncation": None, "padding": None}
        files.text = None
    files.name = files.name or (path.name if path.is_dir() else path.parent.name or path.name)
    return files


def _is_hub_name(spec: str) -> bool:
    if Path(spec).suffix in (".json", ".txt", ".model", ".bpe"):
        return False
    name = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", spec)
    # `data/tok` where `data/` is a folder here is a mistyped path, not someone's repository
    return bool(name) and not ("/" in spec and Path(spec).parent.is_dir())


def check_definition(definition: Any, where: str) -> None:
    """Raise DataError unless ``definition`` has the shape of a ``tokenizer.json``."""
    model = definition.get("model") if isinstance(definition, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), (dict, list)) or not model["vocab"]:
        raise DataError(f"tokenizer `{where}` has no vocabulary: not the content of a `tokenizer.json`")
    if "type" not in model:  # files from before tokenizers 0.10 leave it out
        model["type"] = (
            "BPE" if "merges" in model else "WordPiece" if "max_input_chars_per_word" in model else "Unigram"
        )


def _read_folder(folder: Path) -> TokenizerFiles:
    if (folder / "tokenizer.json").is_file():
        return _read_file(folder / "tokenizer.json")
    for vocab, merges in _VOCAB_TO_MERGES:
        for candidate in sorted(folder.glob(f"*{vocab}")):
            if candidate.with_name(candidate.name.replace(vocab, merges)).is_file():
                return _read_file(candidate)
    if (folder / "vocab.txt").is_file():
        return _read_file(folder / "vocab.txt")
    models = [folder / name for name in _SPM_NAMES if (folder / name).is_file()] or sorted(folder.glob("*.model"))
    if len(models) == 1:
        return _read_file(models[0])
    if (folder / "model").is_dir():  # a checkpoint
        return _read_folder(folder / "model")
    if (folder / "latest").is_file():  # a run
        return _read_folder(folder / (folder / "latest").read_text().strip())
    raise DataError(f"no tokenizer in folder `{folder}`", hint=f"give {_LOADABLE}")


def _read_file(path: Path) -> TokenizerFiles:
    special = _named_specials(path.parent)
    try:
        if path.suffix == ".model":
            definition, found = sentencepiece_definition(path.read_bytes())
            return TokenizerFiles(definition, found | special)
        if path.name.endswith("merges.txt") or path.suffix == ".bpe":
            return TokenizerFiles(_byte_level_bpe(_vocab_beside(path), path), special)
        if path.suffix == ".txt":
            return TokenizerFiles(_wordpiece(path, special), special)
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
        if isinstance(content, dict) and isinstance(content.get("model", 0), int):  # `model` is also a word of GPT-2
            return TokenizerFiles(_byte_level_bpe(path, _merges_beside(path), content), special)
        return TokenizerFiles(content, special, text=text)
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"tokenizer `{path}` does not load: {reason}", hint=f"give {_LOADABLE}") from error


def _named_specials(folder: Path) -> dict[str, str]:
    special: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        try:
            content = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        for key in NAMED:
            token = content.get(key) if isinstance(content, dict) else None
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                special[key] = token
    return special


def _merges_beside(vocab: Path) -> Path:
    for ours, theirs in _VOCAB_TO_MERGES:
        merges = vocab.with_name(vocab.name.replace(ours, theirs))
        if vocab.name.endswith(ours) and merges.is_file():
            return merges
    raise ValueError("a vocabulary without its merges (`merges.txt` or `vocab.bpe`) beside it")


def _vocab_beside(merges: Path) -> Path:
    for theirs, ours in _VOCAB_TO_MERGES:
        vocab = merges.with_name(merges.name.replace(ours, theirs))
        if merges.name.endswith(ours) and vocab.is_file():
            return vocab
    raise ValueError("merges without their vocabulary (`vocab.json` or `encoder.json`) beside them")


def _byte_level_bpe(vocab_path: Path, merges_path: Path, vocab: dict[str, int] | None = None) -> dict[str, Any]:
    """GPT-2's kind: byte-level BPE with GPT-2's way of splitting words."""
    if vocab is None:
        vocab = json.loads(vocab_path.read_text(encoding="utf-8"))
    if not isinstance(vocab, dict) or not all(isinstance(number, int) for number in vocab.values()):
        raise ValueError("not a vocabulary (token -> id)")
    merges = []
    for number, line in enumerate(merges_path.read_text(encoding="utf-8").split("\n"), 1):
        if not line or line.startswith("#version"):
            continue
        pair = line.rstrip("\r").split(" ")
        if len(pair) != 2 or pair[0] + pair[1] not in vocab:
            raise ValueError(f"{merges_path.name}:{number}: `{line[:60]}` is not a merge of this vocabulary")
        merges.append(pair)
    marker = re.compile(r"<\|.+\|>|<s>|</s>|<pad>|<unk>|<mask>")
    special = [(token, number) for token, number in vocab.items() if token[:1] == "<" and marker.fullmatch(token)]
    return definition_of(
        bpe_model(vocab, merges),
        sorted(special, key=lambda item: item[1]),
        pre_tokenizer=byte_level(),
        decoder=byte_level(),
    )


def _wordpiece(path: Path, special: dict[str, str]) -> dict[str, Any]:
    """BERT's kind. Lower-cases unless the vocabulary has capitals (or ``tokenizer_config.json`` says otherwise)."""
    vocab = {
        line: number for number, line in enumerate(path.read_text(encoding="utf-8").removesuffix("\n").split("\n"))
    }
    if "[UNK]" not in vocab:
        raise ValueError("not a WordPiece vocabulary: it has no `[UNK]`")
    lowercase = not any(re.search("[A-Z]", token) for token in vocab if not token.startswith("["))
    config = path.with_name("tokenizer_config.json")
    if config.is_file():
        lowercase = bool(json.loads(config.read_text(encoding="utf-8")).get("do_lower_case", lowercase))
    names = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    roles = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    for role, name in zip(roles, names, strict=True):
        if name in vocab:
            special.setdefault(role, name)
    model = {
        "type": "WordPiece",
        "unk_token": "[UNK]",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
        "vocab": vocab,
    }
    return definition_of(
        model,
        [(name, vocab[name]) for name in names if name in vocab],
        normalizer=bert_normalizer(lowercase=lowercase),
        pre_tokenizer={"type": "BertPreTokenizer"},
        post_processor=bert_template(vocab),
        decoder={"type": "WordPiece", "prefix": "##", "cleanup": True},
    )
