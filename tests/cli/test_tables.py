"""Tables as text: aligned whatever is in the cells."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tvm_ternary.analysis.report import Table
from tvm_ternary.cli.tables import print_tables
from tvm_ternary.cli.text import printable


def test_columns_are_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    headed = Table(("name", "n"), (("a", "1"), ("long name", "200"), ("日本", "33")), frozenset({1}))
    facts = Table(("", ""), (("x", "1"), ("yy", "")))
    print_tables([headed, facts])
    assert capsys.readouterr().out == (
        "name          n\n"
        "---------   ---\n"
        "a             1\n"
        "long name   200\n"
        "日本         33\n"
        "\n"
        "x    1\n"
        "yy\n"
    )  # fmt: skip


def test_table_without_rows(capsys: pytest.CaptureFixture[str]) -> None:
    print_tables([Table(("a", "b"), ())])
    assert capsys.readouterr().out == "a   b\n-   -\n"


@given(st.text())
def test_printable_keeps_what_is_visible_and_nothing_else(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert (shown == text) == text.isprintable()


def test_printable_keeps_lone_surrogates_apart() -> None:
    # How Python holds bytes of a file name that are not UTF-8.
    assert printable("\udcff.so") == "\\udcff.so"
