"""The command that searches."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from embed_assets.commands import CommandResult, HomePath, command, open_pipeline
from embed_assets.console import escape, stderr, stdout
from embed_assets.errors import SettingsError
from embed_assets.records import COPY_KINDS, CopyKind

if TYPE_CHECKING:
    from embed_assets.lake.search import SearchResult
    from embed_assets.lake.widening import Width

_SHOWN = 160
"""Characters of a text that are shown."""


class _Context(click.ParamType["Width"]):
    """A number of chunks, or "section"."""

    name = "N|section"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Width:
        if value == "section":
            return "section"
        if not str(value).isdigit():
            self.fail(f"it must be a number of chunks or 'section', got {value!r}", param, ctx)
        return int(value)


@command
@click.argument("query", required=False)
@click.option("-k", default=10, show_default=True, type=click.IntRange(min=1), help="Number of results.")
@click.option("--where", metavar="EXPR", default="", help="Search only rows like \"partition_key = 'a'\".")
@click.option("--as", "groups", metavar="GROUP", multiple=True, help="Search only what this group may see; repeatable.")
@click.option("--space", metavar="NAME", help="The space to search; default: the active one.")
@click.option("--using", type=click.Choice(COPY_KINDS), help="Find candidates in this copy, and score them exactly.")
@click.option("--distinct", is_flag=True, help="Leave out chunks that repeat a better one, or nearly so.")
@click.option("--context", type=_Context(), help="Widen results by so many chunks before and after, or to the section.")
@click.option("--queries", type=HomePath(exists=True, dir_okay=False), help="A file with a query per line, or JSONL.")
def search(
    as_json: bool,
    query: str | None,
    k: int,
    where: str,
    groups: tuple[str, ...],
    space: str | None,
    using: CopyKind | None,
    distinct: bool,
    context: Width | None,
    queries: Path | None,
) -> CommandResult:
    """Find the chunks nearest to QUERY by cosine similarity, with an exact search unless --using names a copy."""
    from embed_assets.stages.generations import active_pipeline, pipeline_of
    from embed_assets.stages.search import SearchOptions
    from embed_assets.stages.search import search as search_space

    if (query is None) == (queries is None):
        raise click.UsageError("search needs either a QUERY or --queries FILE")
    asked = [("", query)] if query is not None else list(_queries(queries)) if queries is not None else []
    configured = open_pipeline()
    pipeline = active_pipeline(configured) if space is None else pipeline_of(configured, space)
    pipeline.require_embeddings()
    options = SearchOptions(k, where, groups or None, using, distinct, context)
    with stderr.status("searching"):
        found = search_space(pipeline, [text for _, text in asked], options)
    if not as_json:
        for (_, text), results in zip(asked, found, strict=True):
            if queries is not None:
                stdout.print(f"\n{text}", markup=False, soft_wrap=True)
            for result in results:
                _show(result)
    answers = [[_as_json(result) for result in results] for results in found]
    if queries is None:
        return CommandResult({"results": answers[0]})
    named = [
        {"query_id": name, "query": text, "results": results}
        for (name, text), results in zip(asked, answers, strict=True)
    ]
    return CommandResult({"queries": named})


def _as_json(result: SearchResult) -> dict[str, Any]:
    metadata = {k: v.isoformat() if isinstance(v, datetime) else v for k, v in result.metadata.items()}
    return asdict(result) | {"metadata": metadata}


def _show(result: SearchResult) -> None:
    place = f"{result.partition_key}/{result.document_id}"
    stdout.print(
        f"[bold]{result.score:.3f}[/bold]  {escape(place)}  [dim]{escape(result.heading_path)}[/dim]", soft_wrap=True
    )
    shown = " ".join(result.text.split())[:_SHOWN] if result.context is None else " ".join(result.context.split())
    stdout.print("       " + shown, markup=False, soft_wrap=True)


def _queries(file: Path) -> Iterator[tuple[str, str]]:
    """Id and text of each query of a file: a line is a text, or a JSON object with `query` and perhaps `query_id`."""
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"the queries must be a UTF-8 file, got {str(file)!r}: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if not line.lstrip().startswith("{"):
            yield str(number), line.strip()
            continue
        try:
            row = json.loads(line)
            yield str(row.get("query_id", row.get("_id", number))), str(row["query"] if "query" in row else row["text"])
        except (ValueError, KeyError) as error:
            raise SettingsError(
                f"a line of queries must be a text or a JSON object with 'query', got line {number} of {str(file)!r}: "
                f"{error!r}; correct it"
            ) from error
