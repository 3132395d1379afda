"""pyarrow does not import pandas by itself, and works with it as ever."""

from __future__ import annotations

import subprocess
import sys

import pytest

from embed_assets_tests.conftest import REPOSITORY

CODE = """
import sys
from embed_assets.arrow_startup import skip_pandas
{first}
skip_pandas()
import numpy as np, pyarrow as pa
table = pa.table({{"n": np.arange(3), "text": ["a", "b", None]}})
table.column("n").to_numpy()
print("pandas" in sys.modules)
import pandas
frame = table.to_pandas()
assert pa.Table.from_pandas(frame)["n"].to_pylist() == [0, 1, 2]
assert pa.array(pandas.Series([1, 2])).to_pylist() == [1, 2]
assert not [finder for finder in sys.meta_path if type(finder).__module__ == "embed_assets.arrow_startup"]
"""


@pytest.mark.parametrize(("first", "is_imported"), [("", "False"), ("import pandas", "True")])
def test_pandas_is_imported_by_whoever_needs_it(first: str, is_imported: str) -> None:
    pytest.importorskip("pandas")
    command = [sys.executable, "-c", CODE.format(first=first)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert done.stdout.strip() == is_imported
