"""A per-user file cache for small facts about models and this machine, shared between processes.

Everything in it can be worked out again: hashes of files, tunings, measured ceilings, revisions of served models.
"""

from __future__ import annotations

import os
from pathlib import Path


def read(kind: str, name: str) -> str | None:
    """The text cached under `kind` and `name`; None when there is none or it can't be read."""
    try:
        return _file(kind, name).read_text("utf-8")
    except (OSError, ValueError):
        return None


def write(kind: str, name: str, text: str) -> None:
    """Cache `text` for later processes, atomically.

    Errors of the file system are ignored: with a read-only home, the fact is worked out again next time.
    """
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
