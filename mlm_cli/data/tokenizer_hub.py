"""Tokenizer files from the Hugging Face Hub, through its cache."""

from __future__ import annotations

import contextlib
from pathlib import Path

from mlm_cli.errors import DataError

# first set whose first file exists wins
_SETS = (
    ("tokenizer.json",),
    ("vocab.json", "merges.txt"),
    ("vocab.txt",),
    ("spiece.model",),
    ("tokenizer.model",),
)
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")


def download_tokenizer(name: str) -> Path:
    """Folder with the tokenizer files of Hub repository ``name``.

    Raises:
        DataError: no such repository, no tokenizer in it, or the Hub cannot be reached.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError

    def fetch(file: str) -> Path | None:
        try:
            return Path(hf_hub_download(name, file))
        except LocalEntryNotFoundError as error:  # offline and not in the cache: a subclass of EntryNotFoundError
            raise DataError(
                f"tokenizer `{name}` is not a file or folder here, and cannot be fetched from the Hub (offline?)",
                hint="check the path; with a network, unset HF_HUB_OFFLINE; without, copy the tokenizer's files here",
            ) from error
        except EntryNotFoundError:
            return None

    try:
        for files in _SETS:
            found = [fetch(file) for file in files]
            if found[0] is not None and all(found):
                for file in _SETTINGS:
                    with contextlib.suppress(DataError):  # a cache filled without them: the tokenizer is complete
                        fetch(file)
                return found[0].parent
    except RepositoryNotFoundError as error:
        raise DataError(
            f"tokenizer `{name}` is neither a file or folder here nor a repository on the Hub",
            hint="check the spelling; a private repository needs `hf auth login`",
        ) from error
    except OSError as error:
        raise DataError(f"tokenizer `{name}` cannot be fetched from the Hub: {error}") from error
    raise DataError(f"Hub repository `{name}` has no tokenizer files that can be read")
