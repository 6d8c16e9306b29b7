"""spectrum.parquet of a run directory: the singular values of every measured step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datamodules.atomic import atomic_write
from datamodules.errors import first_line

FILE = "spectrum.parquet"


class DamagedSpectra(ValueError):
    """A spectrum.parquet that cannot be read."""


def _schema() -> Any:
    import pyarrow as pa  # a slow import, which --help does not need

    return pa.schema(
        {
            "step": pa.int64(),
            "projection": pa.string(),
            "role": pa.string(),
            "factor": pa.string(),  # A, B, BA; for a chain of adapters also sum, the sum of BA over all links
            "singular_values": pa.list_(pa.float32()),
            "relative_norm": pa.float32(),  # ‖sBA‖_F / ‖W‖_F, on rows of BA and sum
        }
    )


def read_spectra(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file: one row for each step, projection and factor.

    Raises:
        DamagedSpectra: If the file cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path, schema=_schema()).to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DamagedSpectra(f"{path} is damaged ({first_line(error)}).") from error


def write_spectra(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows atomically."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with atomic_write(path) as file:
        pq.write_table(pa.Table.from_pylist(rows, _schema()), file, compression="zstd")
