"""Takes the fields that a Markdown file begins with, in YAML or TOML, from its text."""

from __future__ import annotations

import re
import tomllib
from typing import Any

import yaml

_MAX_CHARACTERS = 16 << 10
"""Longer front matter is text: it takes a second to parse four times as much."""
_BLOCK = re.compile(r"\A(---|\+\+\+)[ \t]*\n(.*?)(?<=\n)(?:\1|\.\.\.)[ \t]*(?:\n|\Z)\n*", re.DOTALL)


def split_front_matter(text: str) -> tuple[dict[str, Any], str]:
    """(fields, rest) of a Markdown text. What is no mapping, or can't be parsed, stays text.

    YAML with aliases is not parsed: a few lines of them can stand for gigabytes.
    """
    found = _BLOCK.match(text[:_MAX_CHARACTERS])
    if found is None:
        return {}, text
    try:
        fields = tomllib.loads(found[2]) if found[1] == "+++" else _from_yaml(found[2])
    except (yaml.YAMLError, tomllib.TOMLDecodeError, ValueError, RecursionError):
        return {}, text
    return (fields, text[found.end() :]) if fields else ({}, text)


def _from_yaml(text: str) -> dict[str, Any]:
    if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
        return {}
    fields = yaml.safe_load(text)
    return {str(name): value for name, value in fields.items()} if isinstance(fields, dict) else {}
