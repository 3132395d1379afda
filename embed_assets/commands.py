"""What all commands share. Results go to stdout, progress and errors to stderr."""

from __future__ import annotations

import atexit
import gc
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING

import click

from embed_assets.console import WarningLines, stderr, visible
from embed_assets.errors import UserError
from embed_assets.settings import load_settings

if TYPE_CHECKING:
    from embed_assets.stages.pipeline import Pipeline

_COLLECT_EVERY = 200_000
"""New objects between two collections of garbage. More take more memory until then."""


class HomePath(click.Path):
    """A path that may begin with ``~``, which shells do not expand in quotes."""

    def convert(self, value: str | os.PathLike[str], param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = super().convert(os.path.expanduser(value), param, ctx)  # noqa: PTH111 (pathlib's raises for unknown users)
        return Path(os.fsdecode(path))


@dataclass(frozen=True, slots=True)
class CommandResult:
    """The result of a command."""

    json: dict[str, object]
    """The document that --json prints."""
    exit_code: int = 0


def command(function: Callable[..., CommandResult]) -> click.Command:
    """Decorator: a sub-command with --json and --debug, which prints user errors as one line and exits with code 1.

    The decorated function prints tables itself if `as_json` is False.
    """

    @wraps(function)
    def wrapper(as_json: bool, debug: bool, **arguments: object) -> None:
        warnings.filterwarnings("default" if debug else "ignore")
        for name in ("dagster", "embed_assets"):
            logging.getLogger(name).setLevel(logging.DEBUG if debug else logging.CRITICAL)
        # Always show warnings about rejected texts, retries and smaller batches, and what a sync waits for.
        for name in ("embed_assets.engine", "embed_assets.lake", "embed_assets.defs.sync"):
            logger = logging.getLogger(name)
            logger.setLevel(logging.DEBUG if debug else logging.WARNING)
            logger.handlers = [WarningLines()]
        try:
            load_settings()  # also for commands without settings, to report misspelt ones
            result = function(as_json=as_json, **arguments)
        except UserError as error:
            if debug:
                raise
            stderr.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
            if as_json:
                click.echo(json.dumps({"error": str(error)}))
            sys.exit(1)
        except KeyboardInterrupt:
            stderr.print("stopped; finished windows are kept and will be reused")
            sys.exit(130)
        if as_json:
            click.echo(visible(json.dumps(result.json, ensure_ascii=False, indent=2)))
        sys.exit(result.exit_code)

    wrapper = click.option(
        "--json", "as_json", is_flag=True, help="Print one JSON document and nothing else to stdout."
    )(wrapper)
    wrapper = click.option("--debug", is_flag=True, help="Show tracebacks, warnings and Dagster's own log.")(wrapper)
    return main.command(function.__name__)(wrapper)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="embed-assets")
def main() -> None:
    """Keep a Delta table of embeddings in sync with a corpus.

    Settings are environment variables (EMBED_SOURCE, EMBED_LAKE, EMBED_MODEL, ...), described in the README.
    """
    # Imports make a million objects that live on. Looking through them for garbage again and again, and once more at
    # the end, took 1.1 of the 2.5 seconds of a sync without work, and 3 of the 9.3 of one that loads the model.
    gc.set_threshold(_COLLECT_EVERY)
    atexit.register(gc.freeze)


def open_pipeline() -> Pipeline:
    """The pipeline of the settings. Raises ``UserError``."""
    from embed_assets.arrow_startup import skip_pandas

    skip_pandas()
    from embed_assets.stages.pipeline import Pipeline

    return Pipeline.from_settings(load_settings())
