"""Writing one ``.safetensors`` file in a single pass, hashed on the way and safe from a full disk.

The format (github.com/huggingface/safetensors) is 8 bytes of header length, a JSON header, then the tensors' bytes. The
library's own writer hides ``errno``; here a full disk is an ``OSError``, and the hash costs no second read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from mlm_cli import heartbeat
from mlm_cli.checkpoint.manifest import FileRecord

_DTYPES = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
    torch.int32: "I32",
    torch.int64: "I64",
}
_CHUNK = 1 << 26  # bytes handed to the file at once


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> FileRecord:
    """Write CPU tensors, sorted by name so that equal contents give equal bytes, and make the file durable.

    Returns:
        its size and the SHA-256 of what was handed to the file system.
    """
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)  # tensors begin aligned
    digest = hashlib.sha256()
    size = 0
    with path.open("wb", buffering=0) as file:
        for piece in (len(head).to_bytes(8, "little"), head, *(_bytes_of(tensors[name]) for name in sorted(tensors))):
            view = memoryview(piece).cast("B")  # type: ignore[arg-type]
            for start in range(0, len(view), _CHUNK):
                chunk = view[start : start + _CHUNK]
                digest.update(chunk)
                heartbeat.beat()
                while chunk:
                    written = file.write(chunk)
                    size += written
                    chunk = chunk[written:]
        os.fsync(file.fileno())
    return FileRecord(size, digest.hexdigest())


def _bytes_of(tensor: Tensor) -> memoryview[int]:
    flat = tensor.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
