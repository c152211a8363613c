from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from beluga_airflow.errors import InvalidInput
from orders.source import COLUMNS, OrderFileError, data_file, orders_of

HEADER = ",".join(COLUMNS)
GOOD = "700001,10021,Mug,2,2025-12-01 09:00,6.50,20100,United Kingdom"
OTHER = "700002,10022,Jug,1,2025-12-01 09:30,14.50,,Ireland"

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(*rows: str, header: str = HEADER) -> Path:
        path = tmp_path / "orders.csv"
        path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
        return path

    return write


def read(path: Path, day: str | None = None) -> list[dict[str, Any]]:
    return list(orders_of(path, day))


def numbers(path: Path, day: str | None = None) -> list[str]:
    return [order["InvoiceNo"] for order in orders_of(path, day)]


def test_an_order_is_one_invoice_in_json(write: Write) -> None:
    orders = read(write(GOOD, OTHER))

    assert orders == [
        {
            "InvoiceNo": "700001",
            "InvoiceDate": "2025-12-01 09:00",
            "CustomerID": "20100",
            "Country": "United Kingdom",
            "lines": [{"StockCode": "10021", "Description": "Mug", "Quantity": 2, "UnitPrice": "6.50"}],
        },
        {
            "InvoiceNo": "700002",
            "InvoiceDate": "2025-12-01 09:30",
            "CustomerID": None,
            "Country": "Ireland",
            "lines": [{"StockCode": "10022", "Description": "Jug", "Quantity": 1, "UnitPrice": "14.50"}],
        },
    ]
    assert json.loads(json.dumps(orders)) == orders


def test_rows_of_an_invoice_may_be_anywhere(write: Write) -> None:
    orders = read(write(GOOD, OTHER, GOOD.replace("10021", "10034")))

    assert [order["InvoiceNo"] for order in orders] == ["700001", "700002"]
    assert [line["StockCode"] for line in orders[0]["lines"]] == ["10021", "10034"]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (GOOD.replace(",2,", ",two,"), "Quantity is 'two'"),
        (GOOD.replace(",2,", ",,"), "Quantity is ''"),
        (GOOD.replace(",2,", ",2.5,"), "Quantity is '2.5'"),
        (GOOD.replace(",2,", ",1_000,"), "Quantity is '1_000'"),
        (GOOD.replace(",2,", ",٣,"), "Quantity is '٣'"),
        (GOOD.replace(",2,", f",{'9' * 5000},"), "longer than 4000 characters"),
        (GOOD.replace(",2,", f",{'9' * 500},"), "... (500 characters), not a whole number"),
        (GOOD.replace("6.50", "NaN"), "UnitPrice is 'NaN'"),
        (GOOD.replace("6.50", "inf"), "UnitPrice is 'inf'"),
        (GOOD.replace("6.50", "1e5"), "UnitPrice is '1e5'"),
        (GOOD.replace("6.50", "£6.50"), "UnitPrice is '£6.50'"),
        (GOOD.replace("2025-12-01 09:00", "01/12/2025 09:00"), "InvoiceDate is '01/12/2025 09:00'"),
        (GOOD.replace("2025-12-01", "2025-02-30"), "InvoiceDate is '2025-02-30 09:00'"),
        (GOOD.replace("20100", "'; DROP TABLE"), 'CustomerID is "\'; DROP TABLE"'),
        (GOOD.replace("United Kingdom", ""), "Country is ''"),
        (GOOD.replace("10021", ""), "StockCode is ''"),
        (GOOD.replace("Mug", "M" * 201), "not at most 200 characters"),
        (GOOD.replace("20100", "\x1b[31m\u202e"), r"CustomerID is '\x1b[31m\u202e'"),
        (GOOD.replace(",United Kingdom", ""), "it has 7 columns where the header has 8"),
        (GOOD.replace("Mug", "Mug, blue"), "it has 9 columns where the header has 8"),
        (GOOD.replace("Mug", '"Mug'), "it is not CSV (unexpected end of data)"),
    ],
)
def test_a_malformed_row_makes_its_invoice_a_problem(write: Write, row: str, says: str) -> None:
    first, second, third = read(write(OTHER, GOOD, row, GOOD.replace("700001", "700003")))

    assert first["InvoiceNo"] == "700002"
    assert "problem" not in first
    assert second["InvoiceNo"] == "700001"
    assert second["problem"].startswith("line 4 of the file: ")
    assert says in second["problem"]
    assert len(second["problem"]) < 300
    assert third["InvoiceNo"] == "700003"
    assert "problem" not in third


def test_the_first_of_several_problems_is_told(write: Write) -> None:
    (order,) = read(write(GOOD.replace("6.50", "x"), GOOD, GOOD.replace(",2,", ",y,")))

    assert order["problem"].startswith("line 2 of the file: UnitPrice is 'x'")
    assert len(order["lines"]) == 1


@pytest.mark.parametrize("number", ["", "row-3", "7 00", "../../etc", "7" * 41, "<script>"])
def test_a_row_without_a_usable_number_is_an_order_of_its_own(write: Write, number: str) -> None:
    orders = read(write(GOOD, GOOD.replace("700001", number), OTHER, GOOD.replace("700001", number)))

    assert [order["InvoiceNo"] for order in orders] == ["700001", "row-3", "700002", "row-5"]
    assert "InvoiceNo is" in orders[1]["problem"]


def test_an_unclosed_quote_swallows_no_other_order(write: Write) -> None:
    orders = read(write(GOOD.replace("Mug", '"Mug'), OTHER, OTHER.replace("700002", "700003")))

    assert [("problem" in order) for order in orders] == [True, False, False]


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (GOOD.replace("20100", "20101"), "CustomerID is '20101', but '20100' in the rows above"),
        (GOOD.replace("20100", ""), "CustomerID is '', but '20100' in the rows above"),
        (
            GOOD.replace("United Kingdom", "France"),
            "Country is 'France', but 'United Kingdom' in the rows above",
        ),
    ],
)
def test_rows_that_disagree_about_whose_order_it_is_are_malformed(write: Write, changed: str, says: str) -> None:
    (order,) = read(write(GOOD, changed))

    assert says in order["problem"]


def test_an_invoice_may_have_only_so_many_rows(write: Write) -> None:
    (order,) = read(write(*[GOOD] * 2_500))

    assert order["problem"] == "line 2002 of the file: the invoice has more than 2000 rows"
    assert len(order["lines"]) == 2_000


def test_a_day_is_picked_by_the_first_readable_date(write: Write) -> None:
    late = GOOD.replace("2025-12-01 09:00", "2025-12-02 00:01")
    path = write(GOOD, OTHER.replace("2025-12-01", "2025-12-02"), late)

    assert numbers(path, "2025-12-01") == ["700001"]
    assert len(read(path, "2025-12-01")[0]["lines"]) == 2
    assert numbers(path, "2025-12-02") == ["700002"]
    assert numbers(path, "2025-12-03") == []


def test_an_order_without_a_date_belongs_to_the_day_above_it(write: Write) -> None:
    undated = "{},10021,Mug,2,soon,6.50,20100,United Kingdom"
    path = write(
        undated.format("700100"),
        undated.format("700101"),
        GOOD,
        undated.format(""),
        OTHER.replace("2025-12-01", "2025-12-02"),
        undated.format("700102"),
        OTHER.replace("700002", "700101").replace("2025-12-01", "2025-12-03"),
    )

    assert numbers(path, "2025-12-01") == ["700100", "700001", "row-5"]
    assert numbers(path, "2025-12-02") == ["700002", "700102"]
    assert numbers(path, "2025-12-03") == ["700101"]


def test_a_file_without_any_date_has_no_days(write: Write) -> None:
    path = write(GOOD.replace("2025-12-01 09:00", "soon"))

    assert numbers(path) == ["700001"]
    with pytest.raises(OrderFileError, match="so none belongs to 2025-12-01"):
        orders_of(path, "2025-12-01")


def test_the_days_share_the_orders_out(demo_file: Path) -> None:
    whole = numbers(demo_file)
    days = [numbers(demo_file, day) for day in ("2025-11-30", "2025-12-01", "2025-12-02")]

    assert sorted(whole) == sorted(number for day in days for number in day)
    assert len(whole) == len(set(whole))


def test_other_columns_and_another_order_of_columns_do(write: Write) -> None:
    header = "Country,CustomerID,Shop,InvoiceNo,StockCode,Description,Quantity,InvoiceDate,UnitPrice"
    (order,) = read(write("France,20100,3,700001,10021,Mug,2,2025-12-01 09:00,6.50", header=header))

    assert order["Country"] == "France"
    assert order["lines"] == [{"StockCode": "10021", "Description": "Mug", "Quantity": 2, "UnitPrice": "6.50"}]


def test_bytes_line_ends_and_blank_lines_spoil_nothing(tmp_path: Path) -> None:
    path = tmp_path / "orders.csv"
    rows = [HEADER, "", GOOD.replace("Mug", "Crème"), ",,,,,,,", "   ", OTHER]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(rows).encode("latin-1"))

    first, second = read(path)

    assert first["lines"][0]["Description"] == "Cr�me"
    assert "problem" not in first
    assert "problem" not in second


def test_a_compressed_file_reads_alike(tmp_path: Path, write: Write) -> None:
    plain = write(GOOD, OTHER)
    packed = tmp_path / "orders.csv.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))

    assert read(packed) == read(plain)


def test_a_damaged_file_gives_no_order_at_all(tmp_path: Path, write: Write) -> None:
    whole = gzip.compress(write(*[GOOD, OTHER] * 200).read_bytes())
    damaged = tmp_path / "orders.csv.gz"
    for content in (whole[: len(whole) // 2], whole[:20] + b"\xff" * 40 + whole[60:], b"no gzip"):
        damaged.write_bytes(content)
        with pytest.raises(OrderFileError, match="cannot be read to its end"):
            orders_of(damaged)


@pytest.mark.parametrize("path", ["nowhere.csv", "/nowhere/orders.csv", ".", "nul\0.csv", "long" * 200])
def test_a_file_that_is_not_there_is_named(path: str) -> None:
    with pytest.raises(OrderFileError) as caught:
        orders_of(path)

    assert "orders" in str(caught.value)
    assert repr(path)[1:-1][:20] in str(caught.value)
    assert len(str(caught.value)) < 1_000


@pytest.mark.parametrize(
    ("header", "missing"),
    [
        ("", ", ".join(COLUMNS)),
        (HEADER.replace(",", ";"), ", ".join(COLUMNS)),
        (HEADER.replace("UnitPrice", "Price").replace("Country", "Land"), "UnitPrice, Country"),
        (HEADER + ",Country", "Country"),
    ],
)
def test_a_file_without_the_columns_is_refused(write: Write, header: str, missing: str) -> None:
    with pytest.raises(OrderFileError, match=f"missing or double: {missing}$"):
        orders_of(write(GOOD, header=header))


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "orders.csv"
    path.touch()

    with pytest.raises(OrderFileError, match="must name each of the columns"):
        orders_of(path)


def test_a_file_with_only_a_header_has_no_orders(write: Write) -> None:
    assert read(write()) == []
    assert read(write(), "2025-12-01") == []


@pytest.mark.parametrize("day", ["", "today", "2025-13-01", "20251201", "2025-12-01 ", "2025-12-01T00:00"])
def test_what_is_no_day_is_refused(write: Write, day: str) -> None:
    with pytest.raises(InvalidInput, match="is not a day; write it as YYYY-MM-DD"):
        orders_of(write(GOOD), day)


def test_relative_paths_start_at_the_data_folder(demo_file: Path, tmp_path: Path) -> None:
    assert data_file("orders.csv") == demo_file
    assert data_file(tmp_path / "orders.csv") == tmp_path / "orders.csv"


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    deadline=None,
    derandomize=True,
    database=None,
)
@given(
    rows=st.lists(
        st.one_of(
            st.binary(max_size=60).filter(lambda row: b"-" not in row),
            st.lists(
                st.sampled_from(["700001", "", '"', "2025-12-01 09:00", "2025-12-02 10:00", "1", "x", "\0"]),
                min_size=6,
                max_size=9,
            ).map(lambda cells: ",".join(cells).encode()),
            st.sampled_from([GOOD.encode(), OTHER.encode()]),
        ),
        max_size=12,
    )
)
def test_no_row_stops_the_reading_and_none_is_lost(tmp_path: Path, rows: list[bytes]) -> None:
    path = tmp_path / "orders.csv"
    path.write_bytes(b"\n".join([HEADER.encode(), *rows, GOOD.encode()]))

    whole = read(path)
    by_day = [*read(path, "2025-12-01"), *read(path, "2025-12-02")]

    assert "700001" in [order["InvoiceNo"] for order in whole]
    assert json.loads(json.dumps(whole)) == whole
    assert sorted(by_day, key=by_number) == sorted(whole, key=by_number)


def by_number(order: dict[str, Any]) -> str:
    return str(order["InvoiceNo"])
