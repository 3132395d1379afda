"""Documents for benchmarks: the Markdown files of a folder, or else the Python language reference."""

from __future__ import annotations

import random
import re
from pathlib import Path
from pydoc_data.topics import topics


def load(folder: Path | None, limit: int | None = None) -> tuple[list[str], str]:
    """(texts, media type); with `limit` a fixed random choice of that many."""
    if folder is None:
        texts, media_type = [str(text) for _, text in sorted(topics.items())], "text/x-rst"
    else:
        files = sorted(folder.rglob("*.md"))
        texts, media_type = [f.read_text("utf-8", "replace") for f in files], "text/markdown"
    if limit is not None and len(texts) > limit:
        texts = random.Random(24).sample(texts, limit)
    return texts, media_type


def without_headings(text: str) -> str:
    """The text without its heading lines."""
    text = re.sub(r"(?m)^ {0,3}#{1,6} .*\n", "", text)
    return re.sub(r"(?m)^\S.*\n([=\-*~^])\1{2,}[ \t]*\n", "", text)
