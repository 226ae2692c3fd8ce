"""The tables of docs/optimizers.md say what the experiments say."""

import re

import pytest
import torch

from feature_table import CHECKED, PAGE, ROWS, SLOW, TABLES, YES, arguments, cell, written

if not PAGE.exists():
    pytest.skip("there are no pages here", allow_module_level=True)

TEXT = PAGE.read_text(encoding="utf-8")
CELLS = {table: written(TEXT, table) for table in TABLES}
VERSION = re.search("<!-- version: begin -->(.*?)<!-- version: end -->", TEXT).group(1)


@pytest.mark.parametrize("table", TABLES)
def test_every_optimizer_and_property_is_there(table):
    assert list(CELLS[table]) == [(row, column) for row in ROWS for column in TABLES[table]]


@pytest.mark.parametrize("table", ["diffopt", "diffopt, kernels"])
@pytest.mark.parametrize("row", ROWS)
def test_what_the_page_says_of_diffopt_is_generated(row, table):
    columns = [column for column in TABLES[table] if column not in CHECKED + SLOW]
    found = {column: cell(table, row, column) for column in columns}
    assert found == {column: CELLS[table][row, column] for column in columns}


@pytest.mark.parametrize("row", ROWS)
def test_what_the_page_says_of_diffopt_is_what_is_checked_elsewhere(row):
    found = {CELLS["diffopt"][row, column] for column in CHECKED}
    assert found == {YES, f"all {len(arguments(row))}"}


@pytest.mark.skipif(
    not torch.__version__.startswith(f"{VERSION}."), reason=f"the page is about torch {VERSION}"
)
@pytest.mark.parametrize("table", ["torch.optim", "torch.optim, kernels"])
@pytest.mark.parametrize("row", ROWS)
def test_what_the_page_says_of_torch_is_generated(row, table):
    columns = [column for column in TABLES[table] if column != "compile"]
    found = {column: cell(table, row, column) for column in columns}
    assert found == {column: CELLS[table][row, column] for column in columns}
