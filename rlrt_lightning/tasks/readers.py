"""Reading of rows from data files or a dataset on the Hugging Face Hub, with a report of the bad ones."""

from __future__ import annotations

import csv
import json
import re
import reprlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rlrt_lightning.runtime.errors import ConfigError, first_line
from rlrt_lightning.tasks.base import Split
from rlrt_lightning.tasks.notation import RepeatedKey, first_repeated, loads

Row = dict[str, Any]

ENDINGS = (".parquet", ".jsonl", ".json", ".csv")
"""File name extensions of data files."""

_MAX_PLACES = 5  # bad rows listed for each cause
_MAX_EXCERPTS = 3  # values shown for each cause


class BadRow(Exception):
    """A row that cannot be used as a problem.

    Args:
        cause: What is wrong; the same text for all rows with the same cause.
        example: A short excerpt that shows it.
    """

    def __init__(self, cause: str, example: str) -> None:
        super().__init__(cause)
        self.cause = cause
        self.example = example


class BadRows:
    """Collects the bad rows of a source by cause."""

    def __init__(self) -> None:
        self.count = 0
        self._places: dict[str, list[str]] = {}
        self._counts: dict[str, int] = {}
        self._examples: dict[str, list[str]] = {}

    def add(self, place: str, row: BadRow) -> None:
        """Adds a bad row."""
        self.count += 1
        self._counts[row.cause] = self._counts.get(row.cause, 0) + 1
        places, examples = self._places.setdefault(row.cause, []), self._examples.setdefault(row.cause, [])
        if len(places) < _MAX_PLACES:
            places.append(place)
        if len(examples) < _MAX_EXCERPTS and row.example not in examples:
            examples.append(row.example)

    def __str__(self) -> str:
        by_count = sorted(self._counts, key=lambda cause: -self._counts[cause])
        return "; ".join(map(self._describe_cause, by_count))

    def _describe_cause(self, cause: str) -> str:
        places, count = self._places[cause], self._counts[cause]
        rows = ", ".join(place.removeprefix("row ") for place in places)
        more = f" and {count - len(places)} more" if count > len(places) else ""
        total = f"{count} rows, such as " if count > 1 else ""
        return f"row{'s' if count > 1 else ''} {rows}{more}: {cause} ({total}{', '.join(self._examples[cause])})"


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60
_SHORT.maxlevel = 3


def excerpt(value: Any) -> str:
    """A value, shortened to fit a message."""
    if isinstance(value, (bytes, bytearray)):
        value = bytes(value[:60])
    with suppress(Exception):
        return "null" if value is None else _SHORT.repr(value)
    return type(value).__name__


def printable(text: Any) -> str:
    """A name, shortened to fit a message and with invalid characters escaped."""
    return str(text)[:100].encode("utf-8", "backslashreplace").decode()


# -- sources -----------------------------------------------------------------------------------------------------------

Rows = list[tuple[str, "Row | BadRow"]]
"""Rows with their places in the source, such as "row 3"."""


def read_rows(source: str, split: Split) -> Rows:
    """Reads a source: a file, a folder of files, or a dataset on the Hub.

    Raises:
        ConfigError: If it cannot be read.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in ENDINGS)
        if not files:
            raise ConfigError(f"{split}: the folder {source} holds no {', '.join(ENDINGS)} file")
        return [
            (f"{place} of {printable(file.name)}" if len(files) > 1 else place, row)
            for file in files
            for place, row in _read_file(file, split)
        ]
    if path.is_file():
        return _read_file(path, split)
    if path.suffix.lower() in ENDINGS or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?(:[^:/]+){0,2}", source):
        raise ConfigError(f"{split}: there is no file or folder {source}")
    return _read_hub(source, split)


def _read_file(path: Path, split: Split) -> Rows:
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        raise ConfigError(f"{split}: {path} must end in one of {', '.join(ENDINGS)}")
    read = {".parquet": _parquet_rows, ".jsonl": _json_lines, ".json": _json_rows, ".csv": _csv_rows}[ending]
    try:
        return [(place, row if isinstance(row, (dict, BadRow)) else _not_an_object(row)) for place, row in read(path)]
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{split}: cannot read {path}: line {line} is not UTF-8: {error.reason}") from None
    except Exception as error:  # pyarrow raises arbitrary errors for files with a wrong extension
        raise ConfigError(f"{split}: cannot read {path}: {_line(error)}") from None


def _not_an_object(row: Any) -> BadRow:
    return BadRow(f"not an object but {type(row).__name__}", excerpt(row))


# -- kinds of files ----------------------------------------------------------------------------------------------------


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow.parquet

    with path.open("rb") as file:  # given a path, pyarrow would read columns from folder names
        table = pyarrow.parquet.read_table(file)
    if (repeated := first_repeated(table.column_names)) is not None:
        raise ValueError(f"it has several columns named {printable(repeated)}")
    for i, column in enumerate(table.schema):
        if column.type in (pyarrow.float16(), pyarrow.float32()):  # a float32 0.1 stays 0.1, not 0.10000000149011612
            table = table.set_column(i, column.name, table[i].cast(pyarrow.string()).cast(pyarrow.float64()))
    rows: Iterable[Any]
    try:
        rows = table.to_pylist()
    except Exception:  # some value cannot be converted; go row by row to find it
        rows = (_parquet_row(table, i) for i in range(table.num_rows))
    return ((f"row {number}", row) for number, row in enumerate(rows, 1))


def _parquet_row(table: Any, i: int) -> Row | BadRow:
    try:
        return table.slice(i, 1).to_pylist()[0]
    except UnicodeDecodeError as error:
        return BadRow("text that is not UTF-8", excerpt(error.object[max(error.start - 10, 0) : error.start + 10]))
    except Exception as error:
        return BadRow("a value that cannot be converted to Python", _line(error))


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Reads a list of rows, a single row, or lines as in .jsonl."""
    text = path.read_bytes().decode("utf-8-sig")
    try:
        whole = loads(text)
    except (ValueError, RecursionError) as error:
        if isinstance(error, RepeatedKey) or text.lstrip().startswith("["):
            raise
        return _json_lines(path)
    return ((f"row {number}", row) for number, row in enumerate(whole if isinstance(whole, list) else [whole], 1))


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    number = 0
    with path.open("rb") as file:
        for line_number, line in enumerate(file, 1):  # bytes, since text mode splits at characters allowed inside JSON
            line = line.strip()
            if not line:
                continue
            number += 1
            place = f"row {number}" if number == line_number else f"row {number} (line {line_number})"
            try:
                yield place, loads(line.decode("utf-8-sig" if line_number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                near = line[max(error.start - 10, 0) : error.start + 10]
                yield place, BadRow("text that is not UTF-8", excerpt(near))
            except RepeatedKey as error:
                yield place, BadRow(str(error), excerpt(line.decode(errors="replace")))
            except json.JSONDecodeError as error:
                yield place, BadRow("not JSON", f"{error.msg} at column {error.colno}")
            except (ValueError, RecursionError) as error:  # a number of 5,000 digits; deeply nested lists
                yield place, BadRow("not JSON", _line(error))


def _csv_rows(path: Path) -> Iterator[tuple[str, Any]]:
    # Bytes that are not UTF-8 become surrogates here, and their rows are rejected later.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file, _unlimited_csv_cells():
        reader = csv.DictReader(file)
        if repeated := first_repeated(name for name in reader.fieldnames or () if name):  # unnamed columns may repeat
            raise ValueError(f"its first line names the column {printable(repeated)!r} twice")
        number = 0
        while True:
            number += 1
            row: Any
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                row = BadRow("not CSV", f"line {reader.line_num}: {_line(error)}")
            if isinstance(row, dict) and None in row:
                row = BadRow("more cells than the first line names", excerpt(row[None]))
            yield f"row {number}", row


@contextmanager
def _unlimited_csv_cells() -> Iterator[None]:
    before = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _read_hub(source: str, split: Split) -> Rows:
    import datasets

    from rlrt_lightning.runtime.hub import check_reachable  # torch is not imported in the verifier's processes
    from rlrt_lightning.runtime.terminal import waiting_for

    name, *rest = source.split(":")
    check_reachable(split, name, "dataset")
    part = rest[-1] if rest else {"train": "train", "heldout": "test"}[split]
    config = rest[0] if len(rest) == 2 else None
    try:
        with waiting_for(f"the dataset {source}"):
            rows: list[Any] = list(datasets.load_dataset(name, config, split=part))
    except Exception as error:
        raise ConfigError(
            f"{split}: {source} is neither a local file or folder nor a dataset that can be loaded: {_line(error)}"
        ) from None
    return [(f"row {number}", row) for number, row in enumerate(rows, 1)]


def _line(error: BaseException) -> str:
    return printable(first_line(error)) or type(error).__name__
