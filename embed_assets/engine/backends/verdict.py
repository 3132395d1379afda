"""Remembers what the self-check of a model found, so that not every process has to check it again."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version

from embed_assets.engine import user_cache
from embed_assets.engine.code_version import code_version
from embed_assets.engine.hardware import resolve_device
from embed_assets.engine.space import EmbeddingSpace
from embed_assets.records import hash_parts

_KIND = "self-checks"
_VALID_SECONDS = 7 * 24 * 3600.0
"""Then the model is checked again, whatever has changed. The check takes half a second of a small model's start."""
_LIBRARIES = ("torch", "transformers", "sentence-transformers", "tokenizers", "numpy")


@dataclass(frozen=True, slots=True)
class Verdict:
    """The fastest way to run a model that reproduced SentenceTransformer's vectors."""

    path: str
    """Code path, as in "packed"."""
    with_onednn: bool
    """Whether linear layers are oneDNN's, on CPUs."""
    skipped: Sequence[str] = ()
    """Warnings about faster paths that did not."""
    found_at: float = field(default_factory=time.time)
    """Seconds since 1970."""


def verdict_key(space: EmbeddingSpace, device: str, precision: str, compiles: bool) -> str:
    """Names everything on which the self-check's outcome may depend."""
    libraries = [f"{name} {version(name)}" for name in _LIBRARIES]
    where = resolve_device(device).description
    return hash_parts((space.fingerprint, where, device, precision, str(compiles), code_version(), *libraries))


def recall(key: str) -> Verdict | None:
    """The remembered verdict; None if there is none or it is too old."""
    try:
        values = json.loads(user_cache.read(_KIND, f"{key}.json") or "")
        found = Verdict(str(values["path"]), bool(values["with_onednn"]), values["skipped"], float(values["found_at"]))
    except (ValueError, KeyError, TypeError):
        return None
    return found if 0 <= time.time() - found.found_at < _VALID_SECONDS else None


def remember(key: str, verdict: Verdict) -> None:
    """Remember a verdict for later processes."""
    user_cache.write(_KIND, f"{key}.json", json.dumps(asdict(verdict)))
