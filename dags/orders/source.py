"""Orders from a CSV file of invoice lines: one dict of JSON values per invoice, malformed invoices included.

One line of the file is one row. An invoice's rows may be anywhere in the file. A row that cannot be read
makes its invoice one order with a ``problem``; a row that names no invoice becomes an order of its own,
``row-<line number>``. Nothing stops the reading, and nothing is lost.

Days: an invoice belongs to the day of its first row with a readable date. An invoice without any belongs to
the day of the nearest such row above its first row, else of the first one below. So the days share the
invoices out: each is in exactly one.
"""

from __future__ import annotations

import csv
import gzip
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import date, datetime
from pathlib import Path
from typing import Any, TextIO

from beluga_airflow.errors import InvalidInput

__all__ = ["COLUMNS", "OrderFileError", "data_file", "orders_of", "orders_of_run"]

_DATA = Path(__file__).resolve().parent.parent / "data"
_MAX_LINE = 4_000
_MAX_ROWS = 2_000

_FORMS = {
    "InvoiceNo": (re.compile(r"(?!row-)[A-Za-z0-9][A-Za-z0-9_.-]{0,39}"), "1 to 40 letters and digits"),
    "StockCode": (re.compile(r"[A-Za-z0-9][A-Za-z0-9 _.-]{0,39}"), "1 to 40 letters and digits"),
    "Description": (re.compile(r".{0,200}"), "at most 200 characters"),
    "Quantity": (re.compile(r"-?[0-9]{1,7}"), "a whole number of at most 7 digits"),
    "InvoiceDate": (re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2} [0-9]{2}:[0-9]{2}"), "a date and time, YYYY-MM-DD HH:MM"),
    "UnitPrice": (re.compile(r"-?[0-9]{1,7}(\.[0-9]{1,4})?"), "a decimal number with at most 4 places"),
    "CustomerID": (re.compile(r"[0-9]{0,12}"), "at most 12 digits, or empty for a guest"),
    "Country": (re.compile(r".{1,40}"), "1 to 40 characters"),
}
COLUMNS = tuple(_FORMS)
_HEAD = ("InvoiceDate", "CustomerID", "Country")


class OrderFileError(InvalidInput):
    """A file of orders that cannot be read as a whole."""


def data_file(path: str | Path) -> Path:
    """The file at ``path``; a relative path starts at the folder ``data`` beside this package."""
    return _DATA / Path(path).expanduser()


def orders_of(path: str | Path, day: str | None = None) -> Iterator[dict[str, Any]]:
    """The orders in a ``.csv`` or ``.csv.gz`` file, in the order in which their invoices first appear.

    The file is read to its end before the first order is given out, since an invoice's rows may be anywhere;
    of the other days only the invoice numbers are kept.

    Args:
        path: the file; see ``data_file``.
        day: ``YYYY-MM-DD``; None means the whole file.

    Returns:
        dicts with ``InvoiceNo``, ``InvoiceDate``, ``Country`` (None where unreadable), ``CustomerID`` (None
        for a guest), ``lines`` (``StockCode``, ``Description``, ``Quantity``, ``UnitPrice`` as decimal text)
        and, where a row was malformed, ``problem``: which line of the file, and what is wrong with it.

    Raises:
        OrderFileError: the file is not there, is damaged, or has not the columns.
        InvalidInput: ``day`` is no day.
    """
    if day is not None:
        _check_day(day)
    file_path = data_file(path)
    try:
        if not file_path.is_file():
            raise OrderFileError(
                f"there is no file of orders at {_quoted(file_path, 300)}; give the path of a .csv or .csv.gz"
                " file, absolute, or relative to the data folder of the DAGs"
            )
        with _opened(file_path) as file:
            return _orders(_rows(file, file_path), day, file_path)
    except (OSError, EOFError, zlib.error) as error:
        raise OrderFileError(
            f"the file of orders {_quoted(file_path, 300)} cannot be read to its end "
            f"({type(error).__name__}: {_quoted(error, 200)}); no order was taken from it; mend it, run again"
        ) from error


def orders_of_run(source: str, day: str) -> Iterator[dict[str, Any]]:
    """The orders for one run of the DAG ``order_batch``: of a day, or, for the day ``all``, of the whole file."""
    return orders_of(source, None if day == "all" else day)


def _check_day(day: str) -> None:
    try:
        valid = date.fromisoformat(day).isoformat() == day
    except ValueError:
        valid = False
    if not valid:
        raise InvalidInput(f"{_quoted(day)} is not a day; write it as YYYY-MM-DD, or leave it out for the whole file")


def _opened(path: Path) -> TextIO:
    # -sig: spreadsheets write a byte order mark; replace: one bad byte must not lose the file
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", errors="replace")
    return path.open(encoding="utf-8-sig", errors="replace")


@dataclass
class _Row:
    number: int
    """Line of the file; the header is line 1."""
    cells: dict[str, str]
    problem: str | None = None

    def __post_init__(self) -> None:
        self.problem = self.problem or next(filter(None, map(self._fault_in, COLUMNS)), None)

    def usable(self, column: str) -> str | None:
        """The text of a column, where it has the column's form."""
        return None if self._fault_in(column) else self.cells[column]

    def _fault_in(self, column: str) -> str | None:
        pattern, meaning = _FORMS[column]
        text = self.cells.get(column, "")
        fits = pattern.fullmatch(text) and (column != "InvoiceDate" or _is_time(text))
        return None if fits else f"{column} is {_quoted(text)}, not {meaning}"


@dataclass
class _Invoice:
    number: str
    neighbour: str | None
    """Its day if none of its rows has a readable date: that of the nearest row above."""
    day: str | None = None
    head: dict[str, str | None] = field(default_factory=lambda: dict.fromkeys(_HEAD))
    lines: list[dict[str, Any]] = field(default_factory=list)
    problem: str | None = None

    def add(self, row: _Row) -> None:
        problem = row.problem
        for column in ("CustomerID", "Country"):
            before = self.head[column] or ""
            if problem is None and self.lines and row.cells[column] != before:
                problem = f"{column} is {_quoted(row.cells[column])}, but {_quoted(before)} in the rows above"
        if problem is None and len(self.lines) == _MAX_ROWS:
            problem = f"the invoice has more than {_MAX_ROWS} rows"
        if self.day is None and (time := row.usable("InvoiceDate")):
            self.day, self.head["InvoiceDate"] = time[:10], time
        if problem is None:
            self.head |= {column: row.cells[column] or None for column in ("CustomerID", "Country")}
            self.lines.append(
                {
                    "StockCode": row.cells["StockCode"],
                    "Description": row.cells["Description"],
                    "Quantity": int(row.cells["Quantity"]),
                    "UnitPrice": row.cells["UnitPrice"],
                }
            )
        elif self.problem is None:
            self.problem = f"line {row.number} of the file: {problem}"

    def order(self) -> dict[str, Any]:
        order = {"InvoiceNo": self.number, **self.head, "lines": self.lines}
        return order if self.problem is None else {**order, "problem": self.problem}


def _orders(rows: Iterable[_Row], day: str | None, path: Path) -> Iterator[dict[str, Any]]:
    invoices: dict[str, _Invoice] = {}
    elsewhere: set[str] = set()
    first = latest = None
    for row in rows:
        latest = (row.usable("InvoiceDate") or "")[:10] or latest
        first = first or latest
        number = row.usable("InvoiceNo") or f"row-{row.number}"
        if number in elsewhere:
            continue
        invoice = invoices.setdefault(number, _Invoice(number, latest))
        invoice.add(row)
        if day is not None and invoice.day not in (None, day):
            del invoices[number]
            elsewhere.add(number)
    if day is not None and invoices and first is None:
        raise OrderFileError(
            f"no row of {_quoted(path, 300)} has a readable InvoiceDate, so none belongs to {day}; mend the "
            "column (YYYY-MM-DD HH:MM), or take the whole file"
        )
    return (
        invoice.order()
        for invoice in invoices.values()
        if day is None or (invoice.day or invoice.neighbour or first) == day
    )


def _rows(file: TextIO, path: Path) -> Iterator[_Row]:
    header: list[str] | None = None
    for number, line in _lines(file):
        cells, problem = _split(line)
        if header is None:
            header = cells
            _check_header(header, path)
        elif any(cells):
            if problem is None and len(cells) != len(header):
                problem = f"it has {len(cells)} columns where the header has {len(header)}"
            yield _Row(number, dict(zip(header, cells, strict=False)), problem)
    if header is None:
        _check_header([], path)


def _lines(file: TextIO) -> Iterator[tuple[int, str]]:
    number = 0
    while line := file.readline(_MAX_LINE + 1):
        number += 1
        yield number, line
        while len(line) > _MAX_LINE and not line.endswith("\n"):
            line = file.readline(_MAX_LINE + 1)


def _split(line: str) -> tuple[list[str], str | None]:
    # each line by itself: a quote that is never closed must not swallow the orders after it
    problem = None
    try:
        cells = next(csv.reader([line], strict=True), [])
    except csv.Error as error:
        cells, problem = line.split(","), f"it is not CSV ({error})"
    if len(line) > _MAX_LINE:
        problem = f"it is longer than {_MAX_LINE} characters"
    return [cell.strip() for cell in cells], problem


def _check_header(header: list[str], path: Path) -> None:
    missing = [column for column in COLUMNS if header.count(column) != 1]
    if missing:
        raise OrderFileError(
            f"the first line of {_quoted(path, 300)} must name each of the columns {', '.join(COLUMNS)} "
            f"once, separated by commas; missing or double: {', '.join(missing)}"
        )


def _is_time(text: str) -> bool:
    try:
        datetime.fromisoformat(text)
    except ValueError:
        return False
    return True


def _quoted(text: object, most: int = 40) -> str:
    # what is in the file is hostile: repr leaves no control characters, and the bound no essays
    plain = str(text)
    return repr(plain) if len(plain) <= most else f"{plain[:most]!r}... ({len(plain)} characters)"
