"""Imports OpenVINO and NNCF, which come with the extra `cpu`, without their telemetry."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

from embed_assets.errors import SettingsError


def has_openvino() -> bool:
    """Whether the extra `cpu` is installed."""
    return all(importlib.util.find_spec(name) is not None for name in ("openvino", "nncf"))


def import_openvino() -> Any:
    """The module ``openvino``. Raises ``SettingsError`` when the extra `cpu` is not installed."""
    if not has_openvino():
        raise SettingsError(
            "EMBED_PRECISION=int8 needs OpenVINO and NNCF, which are not installed; pip install 'embed-assets[cpu]'"
        )
    with without_telemetry():
        import openvino
        import openvino.tools.ovc
    return openvino


@contextlib.contextmanager
def without_telemetry() -> Iterator[None]:
    """Context in which OpenVINO and NNCF send no telemetry, although they do by default.

    Besides a file in the user's home, only CI turns it off (https://github.com/openvinotoolkit/nncf/pull/2329), so the
    variable ``CI`` is set meanwhile.
    """
    before = os.environ.get("CI")
    os.environ["CI"] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ["CI"]
        else:
            os.environ["CI"] = before
