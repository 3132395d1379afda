"""Tokens per second and vectors of the engine against ``SentenceTransformer.encode``: ``embed-assets benchmark``."""

from __future__ import annotations

from pathlib import Path

from embed_assets.cli import main


def run(folder: Path | None) -> None:
    """Print the tables."""
    main(["benchmark", *([] if folder is None else [str(folder)])], standalone_mode=False)


if __name__ == "__main__":
    run(None)
