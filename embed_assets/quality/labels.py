"""Labelled queries: reads which documents are relevant to which query, and finds these documents in the corpus."""

from __future__ import annotations

import json
import re
import reprlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, NoReturn, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from embed_assets.errors import SettingsError

_MAX_GRADE = 1000
"""trec_eval keeps a counter per possible grade: 7 MB at a grade of a million, 760 MB at a hundred million. The
grades of published sets go to 4."""
_BEIR_HEADER = ["query-id", "corpus-id", "score"]
_BEIR_SPLITS = ("test.tsv", "dev.tsv", "train.tsv")
_QRELS_NAME = re.compile(r"qrels([._-].*)?|.+\.qrels", re.I)
_QRELS_FORM = (
    f"write 'query_id 0 document_id grade', or these columns of a TSV file, as its header: {' '.join(_BEIR_HEADER)}"
)
_EXAMPLES = 3
"""Ids that a note names: enough to recognise a pattern such as a missing prefix."""


@dataclass(frozen=True, slots=True)
class LabelledQuery:
    """A query and the documents that answer it."""

    query_id: str
    text: str
    relevant: Mapping[str, int]
    """Grade, from 1, of each relevant document, by its id as labelled; after `match_documents` by its name."""


@dataclass(frozen=True, slots=True)
class LabelledSet:
    """Queries with at least one relevant document each, in the order in which they were read."""

    queries: Sequence[LabelledQuery]
    path: str
    """The file or folder that they are from."""
    notes: Sequence[str] = ()
    """What was left out or not found, one line each."""


@dataclass(frozen=True, slots=True)
class Unmatched:
    """Ids of labels that stand for no document, or for more than one."""

    count: int
    examples: Sequence[str]
    """The first few; of ambiguous ones with two documents that they may stand for."""


@dataclass(frozen=True, slots=True)
class MatchedSet:
    """A labelled set whose relevant documents go by their names in the corpus."""

    labelled: LabelledSet
    """Unmatched ids are as they were: no document has one as its name, so that they count as missed."""
    found: int
    """Ids of labels that stand for one document of the corpus."""
    unknown: Unmatched
    ambiguous: Unmatched


def document_name(partition_key: str, document_id: str) -> str:
    """How labels and rankings call a document: 'PARTITION_KEY/DOCUMENT_ID'."""
    return f"{partition_key}/{document_id}"


def read_labels(path: str | Path) -> LabelledSet:
    """The labelled queries of a JSONL file, or of a folder with queries.jsonl and judgements in TREC's or BEIR's form.

    Documents with a grade below 1 are not relevant; queries without relevant documents are left out and noted.
    All queries and grades are held in memory, nothing else. Raises ``SettingsError`` for what can't be read, is
    malformed, or has no query with a relevant document.
    """
    place = Path(path)
    try:
        queries, notes = _read_folder(place) if place.is_dir() else _read_file(place)
    except OSError as error:
        raise SettingsError(
            f"EMBED_EVALUATION must be a JSONL file or folder that can be read, got {str(error.filename or path)!r}: "
            f"{error.strerror}; correct the path or create that"
        ) from error
    relevant = [replace(query, relevant={d: g for d, g in query.relevant.items() if g > 0}) for query in queries]
    kept = [query for query in relevant if query.relevant]
    left_out = [query.query_id for query in relevant if not query.relevant]
    if not kept:
        raise SettingsError(
            f"EMBED_EVALUATION: {str(path)!r} must have a query with a relevant document, got none among "
            f"{len(left_out)} queries{''.join(f', {note}' for note in notes)}; grade relevant documents 1 or higher"
        )
    if left_out:
        notes.append(_note("queries without a relevant document, left out", left_out))
    return LabelledSet(kept, str(path), notes)


def match_documents(labelled: LabelledSet, documents: Iterable[tuple[str, str]]) -> MatchedSet:
    """The labelled set with the names of the documents that its ids stand for.

    An id is a document's name 'PARTITION_KEY/DOCUMENT_ID', else its document id, else the key of a row, which is what
    follows a '#' in its document id. An id that several documents share in that sense is ambiguous. `documents` are
    the (partition key, document id) of the corpus, in any order, repeated or not; only what labels name is held.
    A document that a query labels by two ids has the higher grade.
    """
    index = _DocumentIndex({label for query in labelled.queries for label in query.relevant})
    for partition_key, document_id in documents:
        index.add(partition_key, document_id)
    names = {label: index.find(label) for label in sorted(index.wanted)}
    queries = []
    for query in labelled.queries:
        relevant: dict[str, int] = {}
        for label, grade in query.relevant.items():
            name = names[label][0] if len(names[label]) == 1 else label
            relevant[name] = max(grade, relevant.get(name, 0))
        queries.append(replace(query, relevant=relevant))
    unknown = [label for label, found in names.items() if not found]
    several = [f"{label} ({' or '.join(found)})" for label, found in names.items() if len(found) > 1]
    notes = list(labelled.notes)
    if unknown:
        notes.append(_note("relevant documents that are not in the corpus, counted as missed", unknown))
    if several:
        kind = "ids that fit several documents, counted as missed, to be labelled as PARTITION_KEY/DOCUMENT_ID"
        notes.append(_note(kind, several))
    return MatchedSet(
        replace(labelled, queries=queries, notes=notes),
        len(names) - len(unknown) - len(several),
        Unmatched(len(unknown), unknown[:_EXAMPLES]),
        Unmatched(len(several), several[:_EXAMPLES]),
    )


class _DocumentIndex:
    """Finds the documents that wanted ids stand for. Holds at most two documents per id and kind of match."""

    def __init__(self, wanted: set[str]) -> None:
        self.wanted = wanted
        self._names: set[str] = set()
        self._by_document: dict[str, list[str]] = {}
        self._by_row: dict[str, list[str]] = {}

    def add(self, partition_key: str, document_id: str) -> None:
        name = document_name(partition_key, document_id)
        if name in self.wanted:
            self._names.add(name)
        self._note(self._by_document, document_id, name)
        # Keys of rows may contain '#' themselves, as MS MARCO's passage ids do, and so may names of files.
        rest = document_id
        while "#" in rest:
            rest = rest.partition("#")[2]
            self._note(self._by_row, rest, name)

    def _note(self, found: dict[str, list[str]], label: str, name: str) -> None:
        if label in self.wanted:
            names = found.setdefault(label, [])
            if len(names) < 2 and name not in names:
                names.append(name)

    def find(self, label: str) -> list[str]:
        """Names of documents: none if the id is unknown, two if it is ambiguous."""
        if label in self._names:
            return [label]
        return self._by_document.get(label) or self._by_row.get(label, [])


def _note(kind: str, items: Sequence[str]) -> str:
    """How many items of a kind there are, and the first few."""
    return f"{kind}: {len(items):,} ({', '.join(items[:_EXAMPLES])}{', ...' if len(items) > _EXAMPLES else ''})"


def _filled(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be blank")
    text.encode()  # raises a ValueError for half a surrogate pair, which JSON can hold and UTF-8 can't
    return text


def _number(value: Any) -> Any:
    if isinstance(value, str):
        raise ValueError("must be a whole number")
    return value


_Text = Annotated[str, AfterValidator(_filled)]
_Grade = Annotated[int, BeforeValidator(_number), Field(le=_MAX_GRADE)]


class _Query(BaseModel):
    """A line of queries.jsonl."""

    model_config = ConfigDict(coerce_numbers_to_str=True)
    form: ClassVar[str] = '{"_id": "q1", "text": "how to"}'
    query_id: _Text = Field(alias="_id")
    text: _Text


class _LabelledLine(BaseModel):
    """A line of a labelled set in one file."""

    model_config = ConfigDict(coerce_numbers_to_str=True)
    form: ClassVar[str] = '{"query_id": "q1", "query": "how to", "relevant": {"PARTITION_KEY/DOCUMENT_ID": 1}}'
    query_id: _Text
    text: _Text = Field(alias="query")
    relevant: dict[_Text, _Grade]


_Line = TypeVar("_Line", _Query, _LabelledLine)


def _read_file(file: Path) -> tuple[list[LabelledQuery], list[str]]:
    """The queries of a file with all grades, and no notes."""
    return [LabelledQuery(line.query_id, line.text, line.relevant) for line in _json_lines(file, _LabelledLine)], []


def _read_folder(folder: Path) -> tuple[list[LabelledQuery], list[str]]:
    """The queries of a folder with all grades, and notes."""
    if not (folder / "queries.jsonl").is_file():
        raise SettingsError(
            f"EMBED_EVALUATION: a folder must contain queries.jsonl, got {str(folder)!r} without; add it, with lines "
            f"such as {_Query.form}, or name a JSONL file instead of the folder"
        )
    texts = {line.query_id: line.text for line in _json_lines(folder / "queries.jsonl", _Query)}
    qrels, notes = _qrels_file(folder)
    grades: dict[str, dict[str, int]] = {query_id: {} for query_id in texts}
    strangers: dict[str, None] = {}
    for number, query_id, document, grade in _judgements(qrels):
        if query_id not in grades:
            strangers[query_id] = None
        elif (first := grades[query_id].setdefault(document, grade)) != grade:
            rule = f"query {query_id!r} must give document {document!r} one grade, got {grade} after {first}"
            _reject(qrels, number, rule, "remove one of the lines")
    if strangers:
        notes.append(_note("judged queries that are not in queries.jsonl", list(strangers)))
    return [LabelledQuery(query_id, text, grades[query_id]) for query_id, text in texts.items()], notes


def _qrels_file(folder: Path) -> tuple[Path, list[str]]:
    """The file of judgements in the folder, and a note if there are other splits of them."""
    splits = [file for name in _BEIR_SPLITS if (file := folder / "qrels" / name).is_file()]
    files = sorted(file for file in folder.iterdir() if _QRELS_NAME.fullmatch(file.name) and file.is_file())
    files += splits[:1]
    if len(files) != 1:
        found = ", ".join(str(file.relative_to(folder)) for file in files) or "none"
        raise SettingsError(
            "EMBED_EVALUATION: a folder must contain one file of judgements: qrels, qrels.txt, qrels.tsv, NAME.qrels, "
            f"or one of qrels/ {', '.join(_BEIR_SPLITS)}; got {found} in {str(folder)!r}; leave exactly one"
        )
    unread = " and ".join(file.name for file in splits[1:])
    return files[0], [f"of qrels/ only {splits[0].name} was read, not {unread}"] if unread else []


def _judgements(file: Path) -> Iterator[tuple[int, str, str, int]]:
    """Line number, query id, document id and grade of each judgement."""
    columns = 0
    for number, line in _lines(file):
        if not columns:
            columns = 3 if line.split() == _BEIR_HEADER else 4
            if columns == 3:
                continue
        # Ids may contain spaces where tabs separate the columns.
        fields = [field.strip() for field in line.split("\t")]
        if len(fields) != columns or not all(fields):
            fields = line.split()
        if len(fields) != columns:
            _reject(file, number, f"a line must have {columns} columns, got {reprlib.repr(line)}", _QRELS_FORM)
        if not re.fullmatch(r"[+-]?[0-9]{1,9}", fields[-1]) or int(fields[-1]) > _MAX_GRADE:
            rule = f"a grade must be a whole number of at most {_MAX_GRADE}, got {reprlib.repr(fields[-1])}"
            _reject(file, number, rule, _QRELS_FORM)
        yield number, fields[0], fields[-2], int(fields[-1])


def _json_lines(file: Path, kind: type[_Line]) -> Iterator[_Line]:
    """The file's lines, validated, each with a query id of its own."""
    known: dict[str, int] = {}
    form = f"write lines such as {kind.form}"
    for number, text in _lines(file):
        try:
            line = kind.model_validate(json.loads(text, object_pairs_hook=_object))
        except ValidationError as error:
            _reject(file, number, _shown(error), form)
        except (ValueError, RecursionError) as error:
            _reject(
                file,
                number,
                f"a line must be a JSON object, got {reprlib.repr(text)}: {getattr(error, 'msg', error)}",
                form,
            )
        first = known.setdefault(line.query_id, number)
        if first != number:
            rule = f"a query id must occur once, got {line.query_id!r} also on line {first}"
            _reject(file, number, rule, "rename or remove one of them")
        yield line


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ``ValueError`` if a key occurs twice: `json` would keep the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"the key {Counter(key for key, _ in pairs).most_common(1)[0][0]!r} occurs twice")
    return found


def _shown(error: ValidationError) -> str:
    """The first thing that is wrong with a line, with the value found."""
    first = error.errors(include_url=False)[0]
    place = " of ".join(repr(part) for part in reversed(first["loc"]) if part != "[key]") or "a line"
    return f"{place}: {first['msg'].removeprefix('Value error, ')}, got {reprlib.repr(first['input'])}"


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Number, from 1, and text of each line that is not blank, without a byte order mark. May raise ``OSError``."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                found = f"byte 0x{line[error.start]:02x}"
                _reject(file, number, f"the file must be UTF-8, got {found}", "save it as UTF-8")
            if text:
                yield number, text


def _reject(file: Path, number: int, rule: str, next_step: str) -> NoReturn:
    raise SettingsError(f"EMBED_EVALUATION: {str(file)!r}, line {number}: {rule}; {next_step}")
