"""Labelled sets: what is read, what is refused and how, and which documents of the corpus labels stand for."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embed_assets.errors import SettingsError
from embed_assets.quality.labels import LabelledQuery, LabelledSet, document_name, match_documents, read_labels

IDS = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)
GRADES = st.dictionaries(IDS, st.integers(1, 1000), min_size=1, max_size=4)
COLUMN_IDS = st.text(st.characters(codec="ascii", categories=("L", "N", "P", "S")), min_size=1)
"""Ids that a line of columns can hold."""


def line(query_id: str, relevant: Mapping[str, object], text: str = "how to") -> str:
    return json.dumps({"query_id": query_id, "query": text, "relevant": relevant})


def write(folder: Path, **files: str) -> Path:
    """Write files, by their names with '__' for '.' and 'qrels/'; returns the folder."""
    for name, text in files.items():
        file = folder / name.replace("__in__", "/").replace("__", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text.encode())
    return folder


def relevant(found: LabelledSet) -> dict[str, Mapping[str, int]]:
    return {query.query_id: query.relevant for query in found.queries}


QUERIES = '{"_id": "q1", "text": "one", "metadata": {}}\n{"_id": 2, "text": "two"}\n'


def test_a_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "labels.jsonl"
    lines = [
        line(
            "q1", {"a/x.md": 2, "a/y.md": True, "a/z.md": 3.0, "a/no.md": 0, "a/never.md": -1, "a/not.md": False}, "é"
        ),
        "",
        line("q2", {"a/x.md": 0}),
        '{"query_id": 3, "query": "separator \u2028 in it", "relevant": {"b/x.md": 1}, "more": [1]}',
    ]
    file.write_bytes("\ufeff".encode() + "\r\n".join(lines).encode() + b"\r\n  \r\n")
    assert read_labels(file) == LabelledSet(
        [
            LabelledQuery("q1", "é", {"a/x.md": 2, "a/y.md": 1, "a/z.md": 3}),
            LabelledQuery("3", "separator \u2028 in it", {"b/x.md": 1}),
        ],
        str(file),
        ["queries without a relevant document, left out: 1 (q2)"],
    )
    assert read_labels(str(file)) == read_labels(file)


@pytest.mark.parametrize("name", ["qrels", "qrels__txt", "qrels__tsv", "qrels__dev__tsv", "mine__qrels"])
@pytest.mark.parametrize(
    "text",
    [
        "q1 0 a/x.md 1\n2 0 b 3\n2 0 c -1\n",
        "\ufeffq1\t0\ta/x.md\t1\r\n\r\n2\tQ0\tb\t+3\r\n2\t0\tc\t0",
        "query-id\tcorpus-id\tscore\nq1\ta/x.md\t1\n2\tb\t3\n2\tb\t3\n2\tc\t0\n",
    ],
)
def test_judgements_are_in_columns(tmp_path: Path, name: str, text: str) -> None:
    found = read_labels(write(tmp_path, queries__jsonl=QUERIES, **{name: text}))
    assert relevant(found) == {"q1": {"a/x.md": 1}, "2": {"b": 3}}
    assert [query.text for query in found.queries] == ["one", "two"]
    assert found.notes == []


def test_tabs_allow_spaces_in_ids(tmp_path: Path) -> None:
    found = read_labels(write(tmp_path, queries__jsonl=QUERIES, qrels="q1\t0\tmy notes/to do.md\t1\n"))
    assert relevant(found) == {"q1": {"my notes/to do.md": 1}}


def test_beirs_splits_are_read_in_order(tmp_path: Path) -> None:
    def split(document: str) -> str:
        return f"query-id\tcorpus-id\tscore\nq1\t{document}\t1\n"

    write(tmp_path, queries__jsonl=QUERIES, qrels__in__train__tsv=split("train"))
    assert relevant(read_labels(tmp_path)) == {"q1": {"train": 1}}
    write(tmp_path, qrels__in__dev__tsv=split("dev"))
    assert relevant(read_labels(tmp_path)) == {"q1": {"dev": 1}}
    write(tmp_path, qrels__in__test__tsv=split("test"))
    found = read_labels(tmp_path)
    assert relevant(found) == {"q1": {"test": 1}}
    assert found.notes[0] == "of qrels/ only test.tsv was read, not dev.tsv and train.tsv"


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    judged = "".join(f"q{number} 0 d 1\n" for number in range(1, 7)) + "q9 0 d 0\n"
    found = read_labels(write(tmp_path, queries__jsonl=QUERIES, qrels=judged))
    assert found.notes == [
        "judged queries that are not in queries.jsonl: 6 (q2, q3, q4, ...)",
        "queries without a relevant document, left out: 1 (2)",
    ]


GOOD = line("q1", {"a/x.md": 1})


@pytest.mark.parametrize(
    ("bad", "found"),
    [
        ('{"query_id": ', "a line must be a JSON object, got '{\"query_id\":': Expecting value; write lines such as"),
        ("[" * 100_000, r"a line must be a JSON object, got '\[\[\["),
        ("[]", r"a line: .*dictionary.*, got \[\]"),
        ('{"query": "x", "relevant": {}}', "'query_id': Field required, got {'query': 'x', 'relevant': {}}"),
        ('{"query_id": "x", "relevant": {}}', "'query': Field required"),
        ('{"query_id": "x", "query": "x"}', "'relevant': Field required"),
        ('{"query_id": "x", "query": "x", "relevant": ["a"]}', r"'relevant': .*dictionary, got \['a'\]"),
        ('{"query_id": " ", "query": "x", "relevant": {}}', "'query_id': must not be blank, got ' '"),
        ('{"query_id": null, "query": "x", "relevant": {}}', "'query_id': .*string, got None"),
        ('{"query_id": "x", "query": "", "relevant": {}}', "'query': must not be blank, got ''"),
        ('{"query_id": "x", "query": "\\ud800", "relevant": {}}', r"'query': .*surrogates not allowed, got '\\ud800'"),
        (line("x", {"": 1}), "'' of 'relevant': must not be blank"),
        (line("x", {"d": 1.5}), "'d' of 'relevant': .*integer.*, got 1.5"),
        (line("x", {"d": float("nan")}), "'d' of 'relevant': .*finite number, got nan"),
        (line("x", {"d": "1"}), "'d' of 'relevant': must be a whole number, got '1'"),
        (line("x", {"d": None}), "'d' of 'relevant': .*integer, got None"),
        (line("x", {"d": 1001}), "'d' of 'relevant': .*less than or equal to 1000, got 1001"),
        (line("x", {"d": 10**30}), "'d' of 'relevant': .*1000, got 10000000"),
        ('{"query_id": "x", "query": "x", "relevant": {"d": 1, "e": 1, "d": 0}}', "the key 'd' occurs twice"),
        (GOOD, "a query id must occur once, got 'q1' also on line 1"),
        (line("x", {"d": 1}, "\u00e9").replace("\\u00e9", "\udce9"), "must be UTF-8, got byte 0xe9; save it as UTF-8"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, bad: str, found: str) -> None:
    file = tmp_path / "labels.jsonl"
    file.write_bytes(f"{GOOD}\n\n{bad}\n".encode("utf-8", "surrogateescape"))
    with pytest.raises(SettingsError, match=f"^EMBED_EVALUATION: '{file}', line 3: .*{found}") as error:
        read_labels(file)
    assert re.search(r"; (write|save|rename) ", str(error.value))


@pytest.mark.parametrize(
    ("queries", "qrels", "found"),
    [
        (QUERIES + "{}", "", "queries.jsonl', line 3: '_id': Field required"),
        (QUERIES + '{"_id": "q1", "text": "one"}', "", "'q1' also on line 1"),
        (QUERIES, "q1 0 a\n", "qrels', line 1: a line must have 4 columns, got 'q1 0 a'; write 'query_id 0"),
        (QUERIES, "q1\t0\t\t1\n", "must have 4 columns"),
        (QUERIES, "q1 0 my notes.md 1\n", "must have 4 columns"),
        (QUERIES, "query-id\tcorpus-id\tscore\nq1\t0\ta\t1\n", "line 2: a line must have 3 columns"),
        (QUERIES, "q1 0 a 1\nquery-id\tcorpus-id\tscore\n", "line 2: a line must have 4 columns"),
        (QUERIES, "q1 0 a 1.0\n", "a grade must be a whole number of at most 1000, got '1.0'"),
        (QUERIES, "q1 0 a high\n", "got 'high'"),
        (QUERIES, "q1 0 a 1001\n", "got '1001'"),
        (
            QUERIES,
            "q1 0 a 1\nq1 0 b 1\nq1 0 a 0\n",
            "line 3: query 'q1' must give document 'a' one grade, got 0 after 1",
        ),
        (QUERIES, "q3 0 a 1\n", "got none among 2 queries, judged queries .*: 1 .q3.; grade"),
        (QUERIES, "", "must have a query with a relevant document, got none among 2 queries; grade"),
        ("", "", "got none among 0 queries; grade"),
    ],
)
def test_a_malformed_folder_is_explained(tmp_path: Path, queries: str, qrels: str, found: str) -> None:
    write(tmp_path, queries__jsonl=queries, qrels=qrels)
    with pytest.raises(SettingsError, match=f"^EMBED_EVALUATION: .*{found}"):
        read_labels(tmp_path)


def test_missing_and_doubtful_files_are_explained(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"got '.*nowhere.jsonl': No such file or directory; correct the path"):
        read_labels(tmp_path / "nowhere.jsonl")
    with pytest.raises(SettingsError, match=r"must contain queries.jsonl, got .* without; add it"):
        read_labels(tmp_path)
    write(tmp_path, queries__jsonl=QUERIES, qrels__in__other__tsv="")
    with pytest.raises(SettingsError, match=r"one file of judgements: .*; got none in .*; leave exactly one"):
        read_labels(tmp_path)
    write(tmp_path, qrels__in__test__tsv="", dev__qrels="")
    with pytest.raises(SettingsError, match=r"got dev.qrels, qrels/test.tsv in "):
        read_labels(tmp_path)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(
        SettingsError, match=r"empty.jsonl' must have a query with a relevant document, got none among 0"
    ):
        read_labels(tmp_path / "empty.jsonl")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(queries=st.dictionaries(IDS, st.tuples(IDS, GRADES), min_size=1, max_size=5), is_ascii=st.booleans())
def test_what_is_written_is_read(
    tmp_path: Path, queries: dict[str, tuple[str, dict[str, int]]], is_ascii: bool
) -> None:
    file = tmp_path / "labels.jsonl"
    rows = [{"query_id": key, "query": text, "relevant": grades} for key, (text, grades) in queries.items()]
    file.write_text("\n".join(json.dumps(row, ensure_ascii=is_ascii) for row in rows), "utf-8")
    expected = [LabelledQuery(key, text, grades) for key, (text, grades) in queries.items()]
    assert read_labels(file) == LabelledSet(expected, str(file), [])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    grades=st.dictionaries(
        COLUMN_IDS, st.dictionaries(COLUMN_IDS, st.integers(-2, 4), min_size=1, max_size=3), min_size=1, max_size=3
    ),
    is_beir=st.booleans(),
    separator=st.sampled_from(["\t", " ", "  \t "]),
)
def test_what_is_written_in_columns_is_read(
    tmp_path: Path, grades: dict[str, dict[str, int]], is_beir: bool, separator: str
) -> None:
    judged = [(query, doc, grade) for query, docs in grades.items() for doc, grade in docs.items()]
    columns = [[q, d, str(g)] if is_beir else [q, "0", d, str(g)] for q, d, g in judged]
    header = ["query-id\tcorpus-id\tscore"] if is_beir else []
    queries = "\n".join(json.dumps({"_id": query, "text": "how to"}) for query in grades)
    write(tmp_path, queries__jsonl=queries, qrels="\n".join(header + [separator.join(row) for row in columns]))
    positive = {query: {doc: grade for doc, grade in docs.items() if grade > 0} for query, docs in grades.items()}
    expected = {query: docs for query, docs in positive.items() if docs}
    if expected:
        assert relevant(read_labels(tmp_path)) == expected
    else:
        with pytest.raises(SettingsError, match=f"got none among {len(grades)} queries"):
            read_labels(tmp_path)


def labelled(*relevant: Mapping[str, int]) -> LabelledSet:
    return LabelledSet([LabelledQuery(f"q{i}", "how to", grades) for i, grades in enumerate(relevant)], "labels.jsonl")


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("a/x.md", "a/x.md"),  # its name
        ("deep/y.md", "a/deep/y.md"),  # its document id
        ("rows.jsonl#k1", "a/rows.jsonl#k1"),
        ("k1", "a/rows.jsonl#k1"),  # its row's key
        ("doc#7", "a/rows.jsonl#doc#7"),
        ("7", "a/rows.jsonl#doc#7"),
        ("b/same.md", "b/same.md"),  # the name goes before the document id 'b/same.md'
        ("k2", "b/k2"),  # the document id goes before the key of a row
    ],
)
def test_labels_stand_for_documents(label: str, name: str) -> None:
    documents = [("a", "x.md"), ("a", "deep/y.md"), ("a", "rows.jsonl#k1"), ("a", "rows.jsonl#doc#7"), ("a", "x.md")]
    documents += [("c", "b/same.md"), ("b", "same.md"), ("a", "rows.jsonl#k2"), ("b", "k2")]
    for corpus in (documents, documents[::-1]):
        found = match_documents(labelled({label: 2}), iter(corpus))
        assert relevant(found.labelled) == {"q0": {name: 2}}
        assert (found.found, found.unknown.count, found.ambiguous.count, found.labelled.notes) == (1, 0, 0, [])


def test_unmatched_labels_are_counted_and_stay_judged() -> None:
    documents = [("a", "x.md"), ("b", "x.md"), ("a", "1.csv#k"), ("a", "2.csv#k"), ("a", "y.md")]
    labels = labelled({"x.md": 1, "y.md": 2, "gone": 1}, {"k": 1, "gone": 3, "lost": 1, "away": 1, "off": 1})
    found = match_documents(labels, documents)
    assert relevant(found.labelled) == {
        "q0": {"x.md": 1, "a/y.md": 2, "gone": 1},
        "q1": {"k": 1, "gone": 3, "lost": 1, "away": 1, "off": 1},
    }
    assert found.found == 1
    assert (found.unknown.count, found.unknown.examples) == (4, ["away", "gone", "lost"])
    assert (found.ambiguous.count, found.ambiguous.examples) == (
        2,
        ["k (a/1.csv#k or a/2.csv#k)", "x.md (a/x.md or b/x.md)"],
    )
    assert found.labelled.notes == [
        "relevant documents that are not in the corpus, counted as missed: 4 (away, gone, lost, ...)",
        "ids that fit several documents, counted as missed, to be labelled as PARTITION_KEY/DOCUMENT_ID: 2 "
        "(k (a/1.csv#k or a/2.csv#k), x.md (a/x.md or b/x.md))",
    ]


def test_a_document_labelled_by_two_ids_counts_once() -> None:
    found = match_documents(labelled({"x.md": 1, "a/x.md": 3}, {"a/x.md": 2, "x.md": 1}), [("a", "x.md")])
    assert relevant(found.labelled) == {"q0": {"a/x.md": 3}, "q1": {"a/x.md": 2}}


NAMES = st.text(st.sampled_from("ab#/"), min_size=1, max_size=4)
"""Short ones, so that many are equal, or are the end of another one."""


def meant(label: str, documents: list[tuple[str, str]]) -> set[str]:
    """Names of the documents that a label may stand for."""
    names = {document_name(*document): document[1] for document in documents}
    if label in names:
        return {label}
    of_documents = {name for name, document_id in names.items() if document_id == label}
    return of_documents or {name for name, document_id in names.items() if document_id.endswith(f"#{label}")}


@given(st.lists(st.tuples(st.just("a"), NAMES)), st.lists(st.dictionaries(NAMES, st.integers(1, 3), min_size=1)))
def test_a_label_stands_for_what_it_can_mean_only(
    documents: list[tuple[str, str]], grades: list[dict[str, int]]
) -> None:
    found = match_documents(labelled(*grades), documents + documents[::-1])
    meanings = {label: meant(label, documents) for label in set().union(*grades)}
    sizes = [len(names) for names in meanings.values()]
    assert found.found == sizes.count(1)
    assert found.unknown.count == sizes.count(0)
    assert found.ambiguous.count == len(sizes) - found.found - found.unknown.count
    for before, after in zip(grades, found.labelled.queries, strict=True):
        named = [(next(iter(meanings[i])) if len(meanings[i]) == 1 else i, grade) for i, grade in before.items()]
        assert after.relevant == dict(sorted(named, key=lambda pair: pair[1]))
