"""Text columns of Parquet files, as segments of a few thousand rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlm_cli.data.segment import BLOCK, Segment, Spool, open_source
from mlm_cli.data.sources import Source
from mlm_cli.errors import DataError

_ROWS = 1024


def parquet_segments(
    number: int, source: Source, start: int, keys: tuple[str, ...], spool: Spool, chunk_bytes: int
) -> Iterator[Segment]:
    """Segments of mode `arrow`: each an Arrow file in the spool. ``start`` and ``resume`` count rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    raw, stream = open_source(source)
    path = Path(source.path)
    if source.packed or source.is_stream:  # Parquet is read from its end
        path = spool.next_path().with_suffix(".parquet")
        with path.open("wb") as out:
            while block := stream.read(BLOCK):
                out.write(block)
    digest = raw.finish()
    if path.stat().st_size == 0:
        yield Segment(number, "empty", source.path, 0, 0, 0, source.size, True, True, digest)
        return
    try:
        with pq.ParquetFile(path, memory_map=False, pre_buffer=False) as table:
            columns = [key for key in keys if key in table.schema_arrow.names]
            missing = [key for key in keys if key not in columns]
            if missing:
                names = ", ".join(f"`{name}`" for name in table.schema_arrow.names[:12])
                raise DataError(
                    f"`{source.path}` has no column `{missing[0]}` (it has {names})", hint="give --json-key"
                )
            total = table.metadata.num_rows
            if total == 0:
                yield Segment(number, "empty", source.path, 0, 0, 0, source.size, True, True, digest)
                return
            done = 0
            for batch in _sized(table.iter_batches(_ROWS, columns=columns), chunk_bytes):
                if done + batch.num_rows <= start:
                    done += batch.num_rows
                    continue
                batch = batch.slice(max(0, start - done))
                done = max(done, start) + batch.num_rows
                piece = spool.next_path()
                with pa.OSFile(str(piece), "wb") as out, pa.ipc.new_file(out, batch.schema) as writer:
                    writer.write_batch(batch)
                consumed = source.size * done // total
                last = done == total
                size, sha256 = piece.stat().st_size, digest if last else None
                yield Segment(number, "arrow", str(piece), 0, size, done, consumed, False, last, sha256, spooled=True)
            if start >= total:
                yield Segment(number, "end", source.path, 0, 0, start, source.size, False, True, digest)
    except pa.ArrowInvalid as error:
        raise DataError(
            f"`{source.path}` is not a Parquet file that can be read: {str(error).splitlines()[0]}"
        ) from error
    finally:
        if path != Path(source.path):
            path.unlink(missing_ok=True)


def _sized(batches: Any, chunk_bytes: int) -> Iterator[Any]:
    """Batches of at most about ``chunk_bytes``: rows may be of any length."""
    for batch in batches:
        parts = min(batch.num_rows, max(1, batch.nbytes // chunk_bytes))
        size = -(-batch.num_rows // parts)
        for start in range(0, batch.num_rows, size):
            yield batch.slice(start, size)


def read_table(path: str, keys: tuple[str, ...]) -> list[dict[str, Any]]:
    """Rows of an Arrow file written above."""
    import pyarrow as pa

    with pa.OSFile(path, "rb") as stream, pa.ipc.open_file(stream) as reader:
        rows: list[dict[str, Any]] = reader.read_all().select(list(keys)).to_pylist()
    return rows
