"""Optimizer state that lies on a disk: tensors mapped from files of a folder, for ``parallel.offload: nvme``.

The place of ZeRO-Infinity's NVMe offload (Rajbhandari et al. 2021, section 5.2) without its own input and output: the
update walks through the state once, front to back, which is the pattern that the operating system reads ahead of and
writes behind by itself. What it keeps in free memory it need not read again.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import torch
from torch import Tensor


class DiskState:
    """Makes tensors whose bytes lie in files of ``folder``.

    The files have no names once they are mapped, so a job that ends, however it ends, leaves nothing behind.

    Raises:
        OSError: the folder cannot be made or written to, or its disk is full; each tensor's space is taken when it is
            made, because later a full disk would kill the process without a word.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._numbers = folder, itertools.count()

    def zeros(self, numel: int) -> Tensor:
        """``[numel]`` float32."""
        path = self._folder / f"state-{os.getpid()}-{next(self._numbers)}"
        size = max(1, numel) * torch.float32.itemsize
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.posix_fallocate(handle, 0, size)
            mapped = torch.from_file(str(path), shared=True, size=max(1, numel), dtype=torch.float32)
        except OSError as error:
            raise OSError(error.errno, os.strerror(error.errno or 0), str(self._folder)) from error
        finally:
            os.close(handle)
            path.unlink()
        return mapped[:numel]

    def copy_of(self, tensor: Tensor) -> Tensor:
        """The values of a float32 ``tensor`` of one dimension."""
        return self.zeros(tensor.numel()).copy_(tensor)
