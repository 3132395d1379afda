"""Exceptions for errors that a user can fix, and hiding of secrets in their messages.

UserError                 base class; the command line prints it as one line without a traceback
├── SettingsError         a setting is missing, malformed or contradicts another one
├── SourceError           the corpus can't be listed
├── ModelError            the model can't be found, is not what it claims to be, or may not be loaded
├── EmbeddingError        the model gave no usable vector for a text
├── LakeError             the tables can't be read or written, or hold unexpected data
│   └── SupersededError   another run wrote newer rows of the same partition in the meantime
└── PartitionError        a partition that does not exist, or could not be materialized

Every message states, on one line, the rule, the actual value, the item it concerns and the next step.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator

_SECRET_NAME = re.compile(r"secret|passw|token|access_?key|account_?key|api_?key|sas|credential|connection", re.I)
_LOGIN_IN_URL = re.compile(r"(://)[^/\s@'\"]*:[^/\s@'\"]*@")
_SHORTEST_SECRET = 6
"""Characters: hiding shorter values would garble unrelated words of a message."""


def hide_secrets(text: str) -> str:
    """Replace credentials of the environment, and logins in URLs, by ``***``.

    Libraries may include them in error messages, which end up in logs that many people can read.
    """
    for secret in _secrets():
        text = text.replace(secret, "***")
    return _LOGIN_IN_URL.sub(r"\1***@", text)


def _secrets() -> list[str]:
    found = {value for name, value in os.environ.items() if _SECRET_NAME.search(name) and not name.startswith("EMBED_")}
    for name in ("EMBED_LAKE_OPTIONS", "EMBED_SOURCE_OPTIONS"):
        with contextlib.suppress(ValueError):
            found.update(_secrets_in(json.loads(os.environ.get(name, "{}"))))
    # Longest first, because one secret may be part of another.
    return sorted((secret for secret in found if len(secret) >= _SHORTEST_SECRET), key=len, reverse=True)


def _secrets_in(options: object, is_secret: bool = False) -> Iterator[str]:
    """Yield all values, at any depth, below keys that look like names of credentials."""
    if isinstance(options, dict):
        for key, value in options.items():
            yield from _secrets_in(value, is_secret or bool(_SECRET_NAME.search(key)))
    elif isinstance(options, list):
        for value in options:
            yield from _secrets_in(value, is_secret)
    elif is_secret:
        yield str(options)


class UserError(Exception):
    """Base of all errors whose message is meant for the user."""

    def __init__(self, message: str, is_retryable: bool = False) -> None:
        super().__init__(hide_secrets(message))
        self.is_retryable = is_retryable
        """Whether the error is transient, so that trying again later may help."""

    def __str__(self) -> str:
        return " ".join(super().__str__().split())


class SettingsError(UserError):
    """A setting is missing, malformed or contradicts another one."""


class SourceError(UserError):
    """The corpus can't be listed."""


class ModelError(UserError):
    """The model can't be found, is not what it claims to be, or may not be loaded."""


class EmbeddingError(UserError):
    """The model gave no usable vector for a text."""


class LakeError(UserError):
    """The tables can't be read or written, or hold unexpected data."""


class SupersededError(LakeError):
    """Another run replaced the rows that this run had read, or wrote newer ones; this run's rows were not written."""


class PartitionError(UserError):
    """A partition does not exist or could not be materialized."""


def is_retryable(error: Exception) -> bool:
    """Whether an error is transient, such as an unavailable store or a lost device, as opposed to a wrong value."""
    if isinstance(error, UserError):
        return error.is_retryable
    return isinstance(error, OSError | RuntimeError | MemoryError)
