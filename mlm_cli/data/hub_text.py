"""Documents of a Hub data set, streamed through `datasets`: `hf://owner/name[/config][:split]`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from mlm_cli.data.segment import Segment, Spool
from mlm_cli.data.sources import Source
from mlm_cli.errors import DataError


def parse_name(path: str) -> tuple[str, str | None, str]:
    """(repository, configuration, split) of `hf://owner/name[/config][:split]`; the split defaults to `train`."""
    name, _, split = path.removeprefix("hf://").partition(":")
    parts = name.split("/")
    config = "/".join(parts[2:]) or None
    return "/".join(parts[:2]), config, split or "train"


def hub_segments(
    number: int, source: Source, start: int, keys: tuple[str, ...], spool: Spool, chunk_bytes: int
) -> Iterator[Segment]:
    """Segments of mode `jsonl`, spooled. ``start`` and ``resume`` count rows; the sha256 is over the rows as JSON."""
    digest = hashlib.sha256()
    done = 0
    lines: list[bytes] = []
    size = 0

    def segment(last: bool) -> Segment:
        path = spool.next_path()
        path.write_bytes(b"".join(lines))
        first = done == len(lines)
        sha256 = digest.hexdigest() if last else None
        return Segment(number, "jsonl", str(path), 0, size, done, 0, first, last, sha256, spooled=True)

    for row in _rows(source.path):
        picked = {key: row[key] for key in keys if key in row} or dict.fromkeys(row)
        line = json.dumps(picked, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass") + b"\n"
        digest.update(line)
        done += 1
        if done <= start:
            continue
        lines.append(line)
        size += len(line)
        if size >= chunk_bytes:
            yield segment(last=False)
            lines, size = [], 0
    if done == 0:
        yield Segment(number, "empty", source.path, 0, 0, 0, 0, True, True, digest.hexdigest())
    else:
        yield segment(last=True)


def _rows(path: str) -> Iterator[dict[str, Any]]:
    name, config, split = parse_name(path)
    try:
        import datasets

        datasets.disable_progress_bars()
        yield from datasets.load_dataset(name, config, split=split, streaming=True)
    except Exception as error:  # datasets, huggingface_hub and the network raise many kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"Hub data set `{name}` (split `{split}`) cannot be read: {reason}",
            hint="check the name and the network (HF_HUB_OFFLINE unset); if a file was meant, it does not exist",
        ) from error
