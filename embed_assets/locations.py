"""Places of files: local paths, and URLs of other file systems."""

from __future__ import annotations

from pathlib import Path


def local_path(location: str) -> Path | None:
    """The local path of `location`, or None if it is a URL of another file system."""
    if location.startswith("file://"):
        return Path(location.removeprefix("file://"))
    return None if "://" in location else Path(location)


def canonical_location(location: str) -> str:
    """Normalize a location for comparison: an absolute path without symlinks, or a URL without a trailing slash."""
    path = local_path(location)
    return str(path.absolute().resolve()) if path is not None else location.rstrip("/").replace("s3a://", "s3://")
