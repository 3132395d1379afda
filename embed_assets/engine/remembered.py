"""Small facts about models and this machine, kept between processes in the user's cache."""

from __future__ import annotations

import os
from pathlib import Path


def recall(kind: str, name: str) -> str | None:
    """What was kept under that kind and name, or None."""
    try:
        return _file(kind, name).read_text("utf-8")
    except (OSError, ValueError):
        return None


def keep(kind: str, name: str, text: str) -> None:
    """Keep a fact for later processes, whole or not at all. A read-only home only costs finding it again."""
    file = _file(kind, name)
    partial = file.with_name(f"{name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, "utf-8")
        partial.replace(file)
    except OSError:
        pass


def _file(kind: str, name: str) -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "embed_assets" / kind / name
