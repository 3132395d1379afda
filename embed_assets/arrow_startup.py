"""Makes pyarrow's first conversion fast where pandas is installed."""

from __future__ import annotations

import importlib.abc
import sys

import pyarrow as pa


class _NoPandas(importlib.abc.MetaPathFinder):
    """Finds no pandas."""

    def find_spec(self, name: str, path: object, target: object = None) -> None:
        """Nothing, so that other finders go on. Raises ``ModuleNotFoundError`` for pandas."""
        if name == "pandas":
            raise ModuleNotFoundError("pandas is not needed here", name=name)


def skip_pandas() -> None:
    """Let pyarrow find no pandas when it looks for one, which it does once, with its first conversion.

    Importing pandas takes 0.4 s. Whoever needs it in this process can still import it, and pyarrow's conversions to and
    from pandas work as ever. For processes of our own: `skip_pandas` has no effect after the first conversion.
    """
    if "pandas" in sys.modules:
        return
    finder = _NoPandas()
    sys.meta_path.insert(0, finder)
    try:
        pa.array([0])
    finally:
        sys.meta_path.remove(finder)
