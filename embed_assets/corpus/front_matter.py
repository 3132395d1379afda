"""Takes the fields that a Markdown file begins with, in YAML or TOML, from its text."""

from __future__ import annotations

import json
import re
import tomllib
from typing import Any

import yaml

_MAX_CHARACTERS = 16 << 10
"""Longer front matter is text: it takes a second to parse four times as much."""
_MAX_BRACKETS = 300
"""In YAML: a few kilobytes of nested ones take seconds."""
_NESTED = re.compile(r"(?:[-?:][ \t]+){8}")
"""Lists in lists in lists, in one line."""
_BLOCK = re.compile(r"\A(---|\+\+\+)[ \t]*\n(.*?)(?<=\n)(?:\1|\.\.\.)[ \t]*(?:\n|\Z)\n*", re.DOTALL)


def split_front_matter(text: str) -> tuple[dict[str, Any], str]:
    """(fields, rest) of a Markdown text. What is no mapping, or can't be parsed, stays text.

    YAML with aliases, of which a few lines can stand for gigabytes, and deeply nested YAML is not parsed.
    """
    found = _BLOCK.match(text[:_MAX_CHARACTERS])
    if found is None:
        return {}, text
    try:
        fields = tomllib.loads(found[2]) if found[1] == "+++" else _from_yaml(found[2])
        json.dumps(fields, default=str, skipkeys=True)  # a hexadecimal number may have more digits than Python prints
    except (yaml.YAMLError, tomllib.TOMLDecodeError, ValueError, RecursionError):
        return {}, text
    return (fields, text[found.end() :]) if fields else ({}, text)


def _from_yaml(text: str) -> dict[str, Any]:
    if sum(map(text.count, "[{")) > _MAX_BRACKETS or _NESTED.search(text):
        return {}
    if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
        return {}
    fields = yaml.safe_load(text)
    return {str(name): value for name, value in fields.items()} if isinstance(fields, dict) else {}
