"""Keep a Delta table of text embeddings in step with a corpus; read and search it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from embed_assets.lake.search import SearchResult
    from embed_assets.reading import Embeddings, Searcher, Vectors, read_embeddings, search
    from embed_assets.stages.search import SearchOptions

__all__ = ["Embeddings", "SearchOptions", "SearchResult", "Searcher", "Vectors", "read_embeddings", "search"]
_HOMES = {"SearchOptions": "embed_assets.stages.search", "SearchResult": "embed_assets.lake.search"}


def __getattr__(name: str) -> object:
    # Imported when it is used: whoever imports a module of the package would pay for all of this otherwise.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, "embed_assets.reading")), name)
