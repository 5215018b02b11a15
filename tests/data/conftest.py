"""Fixtures of the data tests."""

import pytest

from tests.data.world import TinyEncoder, rows, write_parquet


@pytest.fixture
def encoder():
    return TinyEncoder()


@pytest.fixture
def parquet(tmp_path):
    """Return a parquet file of 8 rows: 6 pairs and 2 ties."""
    data = rows(8)
    data[2] |= {"label_0": 0.5, "label_1": 0.5}
    data[5] |= {"label_0": 0.5, "label_1": 0.5}
    return write_parquet(tmp_path / "pairs" / "pairs.parquet", data)
