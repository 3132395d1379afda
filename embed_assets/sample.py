"""A small real corpus for first tries: the Python language reference as it ships with every Python."""

from __future__ import annotations

from pathlib import Path

from embed_assets.errors import SourceError

_PARTITIONS = {
    "statements": "assert assignment augassign async atom-identifiers break class compound continue del else exprlists "
    "for function global if import integers nonlocal pass raise return try while with yield await",
    "expressions": "binary bitwise booleans calls comparisons conversions lambda lists numbers operator-summary power "
    "shifting slicings subscriptions unary in exceptions atom-literals string-concatenation bltin-null-object",
    "types": "types typesfunctions typesmapping typesmethods typesmodules typesseq typesseq-mutable bltin-code-objects "
    "bltin-ellipsis-object bltin-type-objects string-methods specialnames customization numeric-types sequence-types "
    "callable-types attribute-access context-managers objects naming dynamic-features execmodel",
}
_OTHERS = "lexis_and_tools"


def write_sample(folder: Path) -> dict[str, int]:
    """Write one reStructuredText file per topic, in folders by subject; returns the files per folder.

    Files that are there already are written only where their text differs, so that their times stay.
    Raises ``SourceError`` when the folder can't be written.
    """
    from pydoc_data.topics import topics

    subjects = {topic: subject for subject, names in _PARTITIONS.items() for topic in names.split()}
    counts: dict[str, int] = {}
    try:
        for topic, text in sorted(topics.items()):
            subject = subjects.get(topic, _OTHERS)
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
