"""What goes wrong for reasons a user can mend.

UserError                 anything below; the command line prints its one line, without a traceback
├── SettingsError         a setting is missing, malformed or contradicts another one
├── SourceError           the corpus can't be listed
├── ModelError            the model can't be found, is not what it claims to be, or may not be loaded
├── EmbeddingError        the model gave no usable vector for a text
├── LakeError             the tables can't be read or written, or hold something else than expected
│   └── SupersededError   another run wrote newer rows of the same partition meanwhile
└── PartitionError        a partition that does not exist, or could not be materialized

Every message says the rule, the actual value, the item it is about and the next step, on one line.
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


def hide_secrets(text: str) -> str:
    """The text without what the environment has as credentials, and without logins in URLs.

    No library should put them into its messages; here they end up in logs that many can read.
    """
    for secret in _secrets():
        text = text.replace(secret, "***")
    return _LOGIN_IN_URL.sub(r"\1***@", text)


def _secrets() -> list[str]:
    found = {value for name, value in os.environ.items() if _SECRET_NAME.search(name) and not name.startswith("EMBED_")}
    for name in ("EMBED_LAKE_OPTIONS", "EMBED_SOURCE_OPTIONS"):
        with contextlib.suppress(ValueError):
            found.update(_secrets_in(json.loads(os.environ.get(name, "{}"))))
    # The longest first: one may be part of another.
    return sorted((secret for secret in found if len(secret) >= _SHORTEST_SECRET), key=len, reverse=True)


def _secrets_in(options: object, is_secret: bool = False) -> Iterator[str]:
    """The values, however deep, below keys that sound like a credential's."""
    if isinstance(options, dict):
        for key, value in options.items():
            yield from _secrets_in(value, is_secret or bool(_SECRET_NAME.search(key)))
    elif isinstance(options, list):
        for value in options:
            yield from _secrets_in(value, is_secret)
    elif is_secret:
        yield str(options)


class UserError(Exception):
    """Base of all errors whose message is meant for the person at the keyboard."""

    def __init__(self, message: str, is_retryable: bool = False) -> None:
        super().__init__(hide_secrets(message))
        self.is_retryable = is_retryable
        """Trying again later may help."""

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
    """The tables can't be read or written, or hold something else than expected."""


class SupersededError(LakeError):
    """Another run replaced what this one had read, or wrote newer rows; this run's rows were not written."""


class PartitionError(UserError):
    """A partition does not exist or could not be materialized."""


def is_retryable(error: Exception) -> bool:
    """Whether trying again later may help: a store that hiccups or a device that was lost, not a wrong value."""
    if isinstance(error, UserError):
        return error.is_retryable
    return isinstance(error, OSError | RuntimeError | MemoryError)
