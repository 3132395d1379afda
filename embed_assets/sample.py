"""Writes a small real corpus to try things on: the Python language reference, which ships with every Python."""

from __future__ import annotations

from pathlib import Path

from embed_assets.errors import SourceError

_TOPICS_BY_FOLDER = {
    "statements": "assert assignment augassign async atom-identifiers break class compound continue del else exprlists "
    "for function global if import integers nonlocal pass raise return try while with yield await",
    "expressions": "binary bitwise booleans calls comparisons conversions lambda lists numbers operator-summary power "
    "shifting slicings subscriptions unary in exceptions atom-literals string-concatenation bltin-null-object",
    "types": "types typesfunctions typesmapping typesmethods typesmodules typesseq typesseq-mutable bltin-code-objects "
    "bltin-ellipsis-object bltin-type-objects string-methods specialnames customization numeric-types sequence-types "
    "callable-types attribute-access context-managers objects naming dynamic-features execmodel",
}
_OTHER_FOLDER = "lexis_and_tools"
"""Folder of every topic not listed above."""


def write_sample(folder: Path) -> dict[str, int]:
    """Write one reStructuredText file per topic, in a folder per subject; returns the number of files per folder.

    A file that already has the right text is left alone, so its modification time does not change.
    Raises ``SourceError`` when the folder can't be written.
    """
    from pydoc_data.topics import topics

    subjects = {topic: subject for subject, names in _TOPICS_BY_FOLDER.items() for topic in names.split()}
    counts: dict[str, int] = {}
    try:
        for topic, text in sorted(topics.items()):
            subject = subjects.get(topic, _OTHER_FOLDER)
            path = folder / subject / f"{topic}.rst"
            path.parent.mkdir(parents=True, exist_ok=True)
            if not (path.is_file() and path.read_text("utf-8") == text):
                path.write_text(text, "utf-8")
            counts[subject] = counts.get(subject, 0) + 1
    except OSError as error:
        raise SourceError(
            f"the sample can't be written to {str(folder)!r}: {error.strerror}; name another folder"
        ) from error
    return counts
