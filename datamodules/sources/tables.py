"""Open tables by split, from the hub or from Parquet, CSV, TSV and JSON files. Rows stay on disk (memory-mapped)."""

from __future__ import annotations

import codecs
import csv
import difflib
import glob
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from datamodules.errors import DataError, counted, first_line
from datamodules.sources.findings import listed
from datamodules.sources.splits import is_helper, is_spelling, split_of

if TYPE_CHECKING:  # A run on a folder of images does not import `datasets`.
    import datasets

ROWS = ("data", "rows", "examples", "records")  # Keys of a JSON object that holds a list of rows.
INDEX = "__index_level_0__"  # Column of pandas' index. In CSV, it shows rows that are longer than the header.


@dataclass(frozen=True)
class Reading:
    """Options for reading the cells of files.

    Args:
        encoding: Encoding of CSV, TSV and JSONL, by its name in Python.
        as_text: Columns of CSV and TSV whose cells stay text: `007` is not 7.
    """

    encoding: str = "utf-8"
    as_text: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the encoding.

        Raises:
            DataError: If Python does not know the encoding.
        """
        try:
            "".encode(self.encoding)  # `codecs.lookup` would accept rot13 and base64, which encode no text.
        except (LookupError, ValueError) as error:
            raise DataError(
                f"data.encoding: {self.encoding!r} is unknown to Python. Use utf-8, utf-16 or cp1252, for example."
            ) from error

    @property
    def is_utf8(self) -> bool:
        """Return True for UTF-8 with or without a byte order mark."""
        return codecs.lookup(self.encoding).name in ("utf-8", "utf-8-sig")


PLAIN = Reading()
Reader = Callable[[list[Path], Reading], Any]


def _text_or_none(cell: str) -> str | None:
    return cell or None


def _patterns(files: list[Path]) -> list[str]:
    return [glob.escape(str(file)) for file in files]  # `datasets` reads names as patterns.


def _read_parquet(files: list[Path], reading: Reading) -> Any:
    import datasets

    data = datasets.Dataset.from_parquet(_patterns(files))
    return data.remove_columns([INDEX] if INDEX in data.column_names else [])


def _read_csv(files: list[Path], reading: Reading, separator: str = ",") -> Any:
    import datasets

    # Only empty cells are missing values: "null" and "NA" are text.
    return datasets.Dataset.from_csv(
        _patterns(files),
        sep=separator,
        keep_default_na=False,
        na_values=[""],
        encoding=reading.encoding,
        converters=dict.fromkeys(reading.as_text, _text_or_none) or None,
    )


def _read_json(files: list[Path], reading: Reading) -> Any:
    import datasets

    if reading.is_utf8:
        return datasets.Dataset.from_json(_patterns(files))  # `datasets` removes a byte order mark.
    # One chunk for each file, since a smaller chunk may split a character.
    largest = max(file.stat().st_size for file in files) + 1
    return datasets.Dataset.from_json(_patterns(files), encoding=reading.encoding, chunksize=largest)


READERS: dict[str, Reader] = {
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".tsv": partial(_read_csv, separator="\t"),
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".json": _read_json,
}
GZIPPABLE = (".csv", ".tsv", ".jsonl", ".ndjson", ".json")  # Kinds that may be gzipped, such as .csv.gz.


def kind_of(file: Path) -> str | None:
    """Return the suffix, in lower case, that decides how a file is read; None if the file is no table."""
    suffix = file.suffix.lower()
    if suffix == ".gz":
        inner = Path(file.stem).suffix.lower()
        return inner if inner in GZIPPABLE else None
    return suffix if suffix in READERS else None


@dataclass(frozen=True)
class Table:
    """Rows on disk.

    Args:
        data: The rows.
        where: Name of the table in messages: a file, or a name on the hub with the split.
        source: Full name of the source, with all files or the revision; if empty, the same as `where`.
        notes: Lines about assumptions in reading the rows.
        as_text: Columns that were read as text although their cells may be numbers or booleans.
    """

    data: datasets.Dataset
    where: str
    source: str = ""
    notes: tuple[str, ...] = ()
    as_text: frozenset[str] = frozenset()

    def __len__(self) -> int:
        return len(self.data)

    def select(self, rows: Tensor) -> Table:
        """Return the table of some rows, (rows,) int64, in the order given."""
        if torch.equal(rows, torch.arange(len(self))):
            return self
        return replace(self, data=self.data.select(rows.tolist()))


def open_table(
    path: str, splits: Sequence[str], config: str | None = None, revision: str | None = None, reading: Reading = PLAIN
) -> Table | None:
    """Open a split by one of its spellings.

    Args:
        path: A directory, a file, or a name on the hub. Files in a directory are named as `train.parquet`, `Train.csv`,
            `train-00000-of-00001.csv` or `training/0000.jsonl`. A single file is a training split.
        splits: Spellings of the split, best first. Case, separators and words such as `data` do not matter.
        config: The data set's configuration: on the hub, or a folder of that name in the directory.
        revision: Branch, tag or commit on the hub, such as `refs/convert/parquet`.
        reading: Options for reading cells.

    Returns:
        The table; None if there is no such split.

    Raises:
        DataError: If the path cannot be read, holds no training rows, holds the split under two spellings, holds
            several data sets, or is damaged.
    """
    check_path(path)
    folder = Path(path)
    if folder.is_file():
        return _read([folder], reading) if "train" in splits else None
    if not folder.exists():
        return _from_hub(path, splits, config, revision)
    return _from_folder(_configured(folder, config), splits, config, reading)


def check_path(path: str) -> None:
    """Check, without reading rows, that a path that looks local exists, and that a file is a table.

    A path looks local if it begins with `.`, `/` or `~`, has two slashes, or ends as a table does.

    Raises:
        DataError: If the path does not exist, or is a file of another kind.
    """
    kind = kind_of(Path(path))
    if os.path.isfile(path):
        if kind is None:
            raise DataError(f"data.path: {path} must be one of {', '.join(READERS)}.{_advice_for_images(path)}")
    elif not os.path.exists(path) and (path.startswith((".", "/", "~")) or path.count("/") > 1 or kind):
        raise DataError(f"data.path: {path} is not here. Give a directory, a file or a data set's name on the hub.")


def check_tables(path: str) -> None:
    """Check, without reading rows, a path as `check_path` does, and that a folder holds a table.

    Raises:
        DataError: If the path is wrong.
    """
    check_path(path)
    if os.path.isdir(path) and not tables_below(Path(path)):
        raise DataError(
            f"data.path: {path} holds no table. Give a folder with files of {', '.join(READERS)}."
            f"{_advice_for_images(path)}"
        )


def _advice_for_images(path: str) -> str:
    """Return the recipe for an image, or for a folder with images; empty for a path without an image."""
    from datamodules.sources.image_folders import SUFFIXES, find_images  # A run on texts does not import Pillow.

    is_image = path.lower().endswith(SUFFIXES)
    holds_images = is_image or (os.path.isdir(path) and bool(find_images(Path(path), "path").images))
    return " For a folder of images use --config conf/images.yaml." if holds_images else ""


def _from_folder(folder: Path, splits: Sequence[str], config: str | None, reading: Reading) -> Table | None:
    """Open the files of a folder that spell a split in their own name or in the name of their folder."""
    files = tables_below(folder)
    spelt = [(name, file) for file in files if (name := _split_name(file, folder, splits))]
    if spelt:
        _check_one_set([file for _, file in spelt], splits, folder, config)
        if len(names := sorted({name for name, _ in spelt})) > 1:
            raise DataError(
                f"data.path: {folder} has rows of {splits[0]} under {len(names)} names, {' and '.join(names)}. "
                "Keep one name."
            )
        kinds = [[file for _, file in spelt if kind_of(file) == kind] for kind in READERS]
        first, *others = [group for group in kinds if group]
        table = _read(first, reading)
        if others:
            unread = ", ".join(str(file.relative_to(folder)) for group in others for file in group[:1])
            table = replace(table, notes=(*table.notes, f"{splits[0]}: {first[0].name} is read, and {unread} is not"))
        return table
    if "train" in splits:
        shown = listed([str(file.relative_to(folder)) for file in files]) or "no file of a table"
        raise DataError(
            f"data.path: {folder} holds no file of training rows, such as train.parquet, train.csv, train.jsonl, "
            f"train-*.parquet or train/*.parquet. The folder holds {shown}. Rename the files, or give one "
            "file as data.path."
        )
    return None


def unread_files(path: str, splits: Sequence[str], config: str | None = None) -> list[str]:
    """Return the tables of a directory that belong to no split.

    Args:
        path: As for `open_table`; anything but a directory has no such files.
        splits: Spellings of all splits that are read.
        config: As for `open_table`.
    """
    if not Path(path).is_dir():
        return []
    folder = _configured(Path(path), config)
    files = tables_below(folder)
    return [str(file.relative_to(folder)) for file in files if _split_name(file, folder, splits) is None]


def tables_below(folder: Path) -> list[Path]:
    """Return the files of a folder that are tables, sorted, without helper files (`is_helper`)."""
    return sorted(
        file
        for file in folder.rglob("*")
        if kind_of(file) and not any(is_helper(part) for part in file.relative_to(folder).parts) and not file.is_dir()
    )


def open_file(path: str, key: str, reading: Reading = PLAIN) -> Table:
    """Open one file, for prediction.

    Raises:
        DataError: If the file is missing, a folder, of another kind, or damaged. The message begins with `key`.
    """
    check_file(path, key)
    return _read([Path(path)], reading, key)


def check_file(path: str, key: str) -> None:
    """Check, without reading rows, that a file exists and is a table.

    Raises:
        DataError: If the file is missing, a folder, or of another kind. The message begins with `key`.
    """
    kinds = ", ".join(READERS)
    if os.path.isdir(path):
        raise DataError(f"data.{key}: {path} is a folder. Name one file of the folder ({kinds}).")
    if not os.path.isfile(path):
        raise DataError(f"data.{key}: {path} is missing. Name an existing file ({kinds}).")
    if kind_of(Path(path)) is None:
        raise DataError(f"data.{key}: {path} is no table. Name a file of {kinds}.")


def spelt_column(column: str, names: Sequence[str]) -> str | None:
    """Return the spelling of a column in a table: the column itself, or the only name that differs in case; else None.

    Args:
        column: A configured column.
        names: The table's columns.
    """
    if column in names:
        return column
    similar = [name for name in names if name.casefold() == column.casefold()]
    return similar[0] if len(similar) == 1 else None


def match_columns(table: Table, columns: Mapping[str, str]) -> Table:
    """Return a table whose columns have their configured spelling. A column may differ in case, and gives a note.

    Args:
        table: The rows.
        columns: Configured columns by key. Columns that the table lacks are ignored.
    """
    names = table.data.column_names
    spelt = {key: (spelt_column(column, names), column) for key, column in columns.items()}
    found = {key: pair for key, pair in spelt.items() if pair[0] not in (None, pair[1])}
    if not found:
        return table
    renamed = {str(name): column for name, column in found.values()}
    notes = [
        f"data.{key}: {column} is read from the column {name} of {table.where}" for key, (name, column) in found.items()
    ]
    as_text = frozenset(renamed.get(name, name) for name in table.as_text)
    return replace(table, data=table.data.rename_columns(renamed), notes=(*table.notes, *notes), as_text=as_text)


def similar_column(column: str, names: Sequence[str]) -> str:
    """Return advice with the name that is closest to a missing column; empty if no name is close."""
    lower = {name.lower(): name for name in reversed(names)}
    close = difflib.get_close_matches(column.lower(), lower, n=1)
    return f" Did you mean {lower[close[0]]!r}?" if close else ""


def check_column(table: Table, key: str, column: str) -> None:
    """Check that a table has a column.

    Raises:
        DataError: If the column is missing. The message begins with `key` and lists the columns.
    """
    names = table.data.column_names
    if column in names:
        return
    advice = ""
    if other := _separator_advice(names):
        advice = f" {other}"
    elif padded := next((name for name in names if name.strip() == column), None):
        advice = f" Remove the spaces around {padded!r} in the first line."
    elif similar := similar_column(column, names):
        advice = similar
    else:
        advice = " Name one of these columns."
        if kind_of(Path(table.where)) in (".csv", ".tsv"):
            advice += " The first line of the file must name its columns."
    raise DataError(f"data.{key}: {table.where} has no column {column}; it has {', '.join(names)}.{advice}")


def check_texts(table: Table, key: str, column: str) -> Table:
    """Return a table whose column holds text; numbers, booleans and dates become text.

    Args:
        table: The rows.
        key: Key with which an error message begins.
        column: The column.

    Raises:
        DataError: If the column is missing, empty in every row, or of another type.
    """
    import datasets
    import pyarrow as pa

    check_column(table, key, column)
    feature = table.data.features[column]
    kind = feature.dtype if isinstance(feature, datasets.Value) else type(feature).__name__
    if kind in ("string", "large_string"):
        return table
    if kind == "null":
        raise DataError(f"data.{key}: {column} in {table.where} is empty in every row. Name another column.")
    if not isinstance(feature, datasets.Value | datasets.Json) or kind.startswith(("binary", "large_binary")):
        raise DataError(f"data.{key}: {column} in {table.where} must hold text, and it holds {kind}.")
    cells = table.data[column][:]
    if isinstance(feature, datasets.Json) and any(isinstance(cell, dict | list) for cell in cells):
        row = next(i for i, cell in enumerate(cells) if isinstance(cell, dict | list))
        raise DataError(
            f"data.{key}: {column} in {table.where} must hold text, but row {row} holds {cells[row]!r:.80}."
        )
    texts = pa.array([None if cell is None else str(cell) for cell in cells], pa.large_string())
    described = "values of several types" if isinstance(feature, datasets.Json) else kind
    note = f"{column} of {table.where} holds {described}, read as text"
    order = table.data.column_names
    data = table.data.add_column(f"{column} as text", texts).remove_columns(column)
    data = data.rename_column(f"{column} as text", column).select_columns(order)
    return replace(table, data=data, notes=(*table.notes, note))


def blank_rows(table: Table, column: str) -> set[int]:
    """Return the rows in which a column of text is empty or holds only spaces."""
    import pyarrow.compute as pc

    return _rows_where(table, column, lambda cells: pc.fill_null(pc.equal(pc.utf8_trim_whitespace(cells), ""), True))


def null_rows(table: Table, column: str) -> set[int]:
    """Return the rows in which a column has no value."""
    return _rows_where(table, column, lambda cells: cells.is_null())


def _rows_where(table: Table, column: str, test: Callable[[Any], Any]) -> set[int]:
    """Return the rows whose cells pass a test, a function from an arrow array to booleans."""
    passing: set[int] = set()
    first = 0
    for rows in table.data.select_columns(column).with_format("arrow").iter(batch_size=10_000):
        passing.update(first + int(i) for i in test(rows[column]).to_numpy().nonzero()[0])
        first += len(rows)
    return passing


# -------------------------------------------------------------------------------------------------------------- files


def _configured(folder: Path, config: str | None) -> Path:
    """Return the folder of a configuration, if there is one, or else the folder itself."""
    if config is None:
        return folder
    return next((f for f in (folder / config, folder / "data" / config) if f.is_dir()), folder)


def _split_name(file: Path, root: Path, splits: Sequence[str]) -> str | None:
    """Return the part of a file's or its folder's name that spells a split, or None."""
    stem = Path(file.stem).stem if file.suffix.lower() == ".gz" else file.stem
    # Remove the number of train-00000-of-00001 or train_0.
    unnumbered = re.sub(r"[-_. ]?\d+(?:[-_. ]?of[-_. ]?\d+)?(?:-\w+)?$", "", stem)
    candidates = (unnumbered, stem.partition("-")[0])
    for name in candidates:
        if is_spelling(name, splits):
            return name
    # If the file's name means a split, the file's name takes precedence over the folder's name.
    if file.parent == root or any(split_of(name) for name in candidates):
        return None
    return file.parent.name if is_spelling(file.parent.name, splits) else None


def _check_one_set(files: list[Path], splits: Sequence[str], root: Path, config: str | None) -> None:
    """Check that the files belong to one data set, and to the configuration if one is given.

    Raises:
        DataError: If the files belong to several data sets, or to another configuration.
    """
    sets = {
        "/".join(p for p in f.relative_to(root).parts[:-1] if not (is_spelling(p, splits) or p in ("data", "default")))
        or "."
        for f in files
    }
    if len(sets) > 1 or (config is not None and sets != {"."}):
        mismatch = f", and none of them is {config}" if config is not None else ""
        raise DataError(
            f"data.path: {root} has rows of {splits[0]} in the folders {', '.join(sorted(sets))}{mismatch}. Give the "
            "folder of one data set as data.path, or its name as data.config."
        )


def _read(files: list[Path], reading: Reading, key: str = "path") -> Table:
    first = str(files[0])
    kind = kind_of(files[0])
    assert kind is not None
    if missing := [f for f in files if not f.is_file()]:
        raise DataError(f"data.{key}: {missing[0]} is not a file, or is a broken link. Give an existing file.")
    if empty := [f for f in files if f.stat().st_size == 0]:
        raise DataError(f"data.{key}: {empty[0]} is an empty file. Remove or replace the file.")
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # The exceptions of `datasets` repeat its log messages.
    notes: list[str] = []
    try:
        if kind in GZIPPABLE:
            for file in files:
                _check_width(file, reading)
        if kind in (".csv", ".tsv"):  # Readers take the columns in the spelling of the file.
            header = _first_cells(files[0], kind, reading)
            reading = replace(reading, as_text=tuple(spelt_column(name, header) or name for name in reading.as_text))
        data = READERS[kind](files, reading)
        if READERS[kind] is _read_json:  # `datasets` does not check that text is UTF-8.
            for rows in data.with_format("arrow").iter(batch_size=10_000):
                rows.validate(full=True)
        if kind == ".json" and len(data) == 1 and (field := _only_list(data[0])):
            data = datasets.Dataset.from_json(_patterns(files), field=field, encoding=reading.encoding)
            notes.append(f"the rows of {first} are read from its key {field}")
    except DataError:
        raise
    except Exception as error:  # `datasets` raises many kinds of exceptions.
        raise _reading_error(error, files, kind, reading, key) from error
    if kind in (".csv", ".tsv"):
        _check_header(files[0], kind, reading, key)
    if INDEX in data.column_names:
        raise DataError(
            f"data.{key}: rows of {first} have more cells than its first line has names. "
            + (
                _separator_advice(_first_cells(files[0], kind, reading))
                or "Name each column in the first line, and put cells that hold a comma in quotes."
            )
        )
    if kind == ".tsv":
        notes += _joined_rows(data, reading.as_text, first)
    others = f" and {counted(len(files) - 1, 'more file')}" if len(files) > 1 else ""
    as_text = frozenset(reading.as_text) & frozenset(data.column_names) if kind in (".csv", ".tsv") else frozenset()
    return Table(data, first, f"{first}{others}", tuple(notes), as_text)


def _reading_error(error: Exception, files: list[Path], kind: str, reading: Reading, key: str) -> DataError:
    """Return the error for files that the library cannot read.

    Raises:
        DataError: If a line has another encoding or is not JSON, with the number of the line.
    """
    import datasets

    if "corresponds to no data" in str(error):
        return DataError(f"data.{key}: {files[0]} has no rows. Give a file with rows.")
    cause: BaseException = error.__cause__ or error
    # An errno means that the cache cannot be written. Errors of a damaged file have no errno.
    if isinstance(cause, OSError) and cause.errno:
        return DataError(
            f"data.{key}: {files[0]} could not be read into the cache {datasets.config.HF_DATASETS_CACHE} ({cause}). "
            "Free some space, or set HF_DATASETS_CACHE to another folder."
        )
    if kind in GZIPPABLE and not isinstance(cause, EOFError | OSError | zlib.error):  # These errors mean a damaged .gz.
        for file in files:
            _check_text_file(file, kind, reading, key)
    advice = _quoting_advice(str(cause)) or "The file may be damaged, or a column may hold values of several types."
    if "Expected" in str(cause) and kind in (".csv", ".tsv"):
        advice = _separator_advice(_first_cells(files[0], kind, reading)) or advice
    return DataError(
        f"data.{key}: {', '.join(map(str, files))} cannot be read as {kind[1:]} ({first_line(cause)}). {advice}"
    )


def _first_cells(file: Path, kind: str, reading: Reading) -> list[str]:
    """Return the cells of the first line of a CSV or TSV file."""
    with _open(file) as stream, io.TextIOWrapper(stream, reading.encoding, newline="") as text:
        return next(csv.reader(text, delimiter="\t" if kind == ".tsv" else ","), [])


def _separator_advice(names: Sequence[str]) -> str:
    """Return advice if the only name holds another separator; otherwise an empty string."""
    marks = {";": "semicolons", "\t": "tabs", "|": "bars", ",": "commas"}
    mark = next((mark for mark in marks if mark in names[0]), None) if len(names) == 1 else None
    return (
        f"The cells seem to be separated by {marks[mark]}. Save the file with commas as .csv or with tabs as .tsv."
        if mark
        else ""
    )


def _check_header(file: Path, kind: str, reading: Reading, key: str) -> None:
    """Check that the first line has no column of text twice, since `datasets` would rename the second column.

    Raises:
        DataError: If a column of text occurs twice.
    """
    header = _first_cells(file, kind, reading)
    if duplicates := [name for name in reading.as_text if header.count(name) > 1]:
        raise DataError(
            f"data.{key}: {file} has {header.count(duplicates[0])} columns {duplicates[0]}. Rename or drop all but one."
        )


def _quoting_advice(reason: str) -> str | None:
    """Return advice about quotation marks and separators; None for other reasons."""
    if opened := re.search(r"EOF inside string starting at row (\d+)", reason):
        return (
            f"A quotation mark that opens a cell, near line {int(opened[1]) + 1}, is never closed. Put the cell in "
            'quotation marks and double the marks inside ("").'
        )
    if longer := re.search(r"Expected (\d+) fields in line (\d+), saw (\d+)", reason):
        return (
            f"Line {longer[2]} has {longer[3]} cells, and the first line names {longer[1]}. Put cells that hold the "
            "separator in quotation marks."
        )
    return None


def _joined_rows(data: Any, columns: Sequence[str], name: str) -> list[str]:
    """Return a line for each column in which a stray quotation mark seems to have joined several rows."""
    import pyarrow.compute as pc

    lines = []
    for column in columns:
        if column not in data.column_names:
            continue
        cells = data.select_columns(column).with_format("arrow")[:][column]
        tabs, breaks = pc.match_substring(cells, "\t"), pc.match_substring_regex(cells, r"[\r\n]")
        if count := pc.sum(pc.and_(tabs, breaks)).as_py():
            lines.append(
                f"{column} of {name}: {counted(count, 'cell holds', 'cells hold')} tabs and line breaks; a quotation "
                "mark at the beginning of "
                'a cell may have joined rows. Put such cells in quotation marks and double the marks inside ("")'
            )
    return lines


def _only_list(row: dict[str, Any]) -> str | None:
    """Return the key of a JSON object that holds the list of all rows; None if there is none."""
    lists = [key for key, value in row.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    return next((key for key in lists if key in ROWS), None)


def _check_text_file(file: Path, kind: str, reading: Reading, key: str) -> None:
    """Check the encoding of each line of a file, and that each line of JSONL is JSON.

    Raises:
        DataError: For the first line that fails, with its number and advice.
    """
    if codecs.lookup(reading.encoding).name.startswith(("utf-16", "utf-32")):
        return  # In these encodings, a line does not end with a single byte.
    encoding, likely = ("utf-8-sig", "cp1252") if reading.is_utf8 else (reading.encoding, "utf-8")
    with _open(file) as stream:
        for number, line in enumerate(stream, 1):
            try:
                text = line.decode(encoding)
            except UnicodeDecodeError as error:
                raise DataError(
                    f"data.encoding: line {number} of {file} is not {reading.encoding} (byte 0x{line[error.start]:02x})"
                    f". The file is likely {likely}. Set the key to {likely}, or save the file as utf-8."
                ) from error
            if kind in (".jsonl", ".ndjson") and text.strip():
                try:
                    json.loads(text)
                except (ValueError, RecursionError) as error:
                    reason = str(error).partition(": line ")[0]
                    raise DataError(
                        f"data.{key}: line {number} of {file} cannot be read as {kind[1:]} ({reason}): "
                        f"{text.strip()[:60]!r}. Fix or remove the line."
                    ) from error


def _check_width(file: Path, reading: Reading) -> None:
    """Check that a file is not UTF-16 or UTF-32, unless this is the configured encoding.

    Raises:
        DataError: If the file has another wide encoding. The message has the likely encoding.
    """
    with _open(file) as stream:
        likely = _likely_wide(stream.read(4096))
    if likely and not codecs.lookup(reading.encoding).name.startswith(likely[:6]):
        raise DataError(
            f"data.encoding: {file} is not {reading.encoding}, but likely {likely}. Set the key to {likely}."
        )


def _open(file: Path) -> Any:
    return gzip.open(file) if file.suffix.lower() == ".gz" else file.open("rb")


def _likely_wide(head: bytes) -> str | None:
    """Return the likely encoding, UTF-16 or UTF-32, from the first bytes of a file; None for other encodings."""
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if head[1::2].count(0) > len(head) // 4:
        return "utf-16-le"
    return "utf-16-be" if head[::2].count(0) > len(head) // 4 else None


def _from_hub(name: str, splits: Sequence[str], config: str | None, revision: str | None) -> Table | None:
    import datasets

    try:
        available = datasets.get_dataset_split_names(name, config, revision=revision)
        matching = [s for spelling in splits for s in available if is_spelling(s, [spelling])]
        if not matching:
            return None
        data = datasets.load_dataset(name, config, split=matching[0], revision=revision)
    except Exception as error:  # The network and the repository can raise many exceptions.
        raise DataError(
            f"data.path: {name} is not a directory here, and could not be loaded from the hub ({first_line(error)}). "
            "Without a connection the data and the model each take a local path: --data.path DIRECTORY and "
            "--model.weights FILE.safetensors for images, --model.backbone DIRECTORY for text."
        ) from error
    first, *others = matching
    where = f"{name}/{config}/{first}" if config else f"{name}/{first}"
    notes = [f"{first} of {name} is read, and {', '.join(others)} is not"] if others else []
    return Table(data, where, f"{where} at revision {revision}" if revision else where, tuple(notes))
