"""A report in which every section has something to show, and reports made from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from embed_assets.report import data as d

NOW = datetime(2026, 3, 1, 12, 30, tzinfo=UTC)
PASSAGE = ("manuals", "pumps/p1.md", "Pumps", "Pumps > Care", "Oil the bearings twice a year.")
OTHER = ("letters", "2026/a.md", "A letter", "", "Dear colleagues, the pumps are oiled.")
SPACES = ("minilm-aaaa", "e5-bbbb")
GATES = (
    d.Gate("coverage", False, 0.9, 1.0, "10 chunks have no vector"),
    d.Gate("norms", True, None, None, "all are 1"),
)

REPORT = d.Report(
    title="The pumps of plant 7",
    lake="s3://lakes/pumps",
    source="s3://documents/pumps",
    space=SPACES[0],
    model="package:minilm",
    created_at=NOW,
    dimension=384,
    partitions=(d.Partition("manuals", 10, 90, 90, 0), d.Partition("letters", 5, 10, 7, 2)),
    map=d.VectorMap(
        (
            d.MapPoint(*PASSAGE, x=0.0, y=0.0),
            d.MapPoint(*PASSAGE[:4], "Close the valve first.", x=1.0, y=8.0),
            d.MapPoint(*OTHER, x=10.0, y=10.0),
        ),
        100,
        "t-SNE",
    ),
    tokens=d.Histogram(0, 256, (1, 5, 9, 2), 4, 120, 250, (d.Limit(256, "the model reads 256"),)),
    norms=d.Histogram(0.998, 1.002, (0, 17, 0), 0.9999, 1, 1.0001, (d.Limit(0.999, "least"), d.Limit(1.001, "most"))),
    runs=tuple(
        d.Run(NOW + timedelta(days=i), 100 - 40 * i, 40 * i, 9000, 8000.5, 12.5, "cpu", "float32") for i in range(3)
    ),
    rejections=d.Rejections(
        15, (d.RejectionReason("empty", 2, (d.RejectedDocument("letters", "b.md", "0 bytes"),), "Remove them."),), 20.0
    ),
    generations=(
        d.Generation(SPACES[0], "active", "package:minilm", 100, 1.0, 170_000, GATES[1:]),
        d.Generation(SPACES[1], "building", "e5", 90, 0.9, 150_000, GATES),
        d.Generation("old-cccc", "retired", "old", 0, 0.0, 0, ()),
    ),
    evaluation=d.Evaluation(
        50,
        (d.SpaceScores(SPACES[0], 0.7, 0.8, 0.6), d.SpaceScores(SPACES[1], 0.6, 0.7, 0.5)),
        (d.Difference(SPACES[1], SPACES[0], "nDCG@10", -0.1, -0.15, -0.05),),
    ),
    duplicates=d.Duplicates(
        (d.PartitionDuplicates("letters", 10, 4, 1, (d.RepeatedText("Yours sincerely", 5, ("a.md", "b.md")),)),),
        (d.NearPair(0.998, d.Passage(*PASSAGE), d.Passage(*OTHER)),),
        cosine=0.95,
        limit_percent=25.0,
    ),
    outliers=d.Outliers(10, 100, 0.6, (d.Outlier(*OTHER, score=0.2),)),
    copies=(d.DerivedCopy("int8", 388, 0.98, "lake/derived/int8"), d.DerivedCopy("binary", 48, None)),
)
FACTS_ONLY = d.Report("Empty", "lake", "landing", "none", "none", NOW)
"""A report of which no section was measured."""
NOTHING_FOUND = replace(
    FACTS_ONLY,
    partitions=(),
    map=d.VectorMap((), 0, "t-SNE"),
    tokens=d.Histogram(0, 256, (0, 0), 0, 0, 0),
    norms=d.Histogram(0, 2, (), 0, 0, 0),
    runs=(),
    rejections=d.Rejections(0, ()),
    generations=(),
    evaluation=d.Evaluation(0, (), ()),
    duplicates=d.Duplicates((), ()),
    outliers=d.Outliers(10, 0, 0.0, ()),
    copies=(),
)
"""A report of which every section was measured, and is empty."""
SECTIONS = {
    "map": "map",
    "tokens": "distributions",
    "norms": "distributions",
    **{name: name for name in ("partitions", "rejections", "duplicates", "outliers")},
    **{name: name for name in ("runs", "generations", "evaluation", "copies")},
}
"""By field of a report, the id of the section that shows it."""


def with_texts(record: Any, change: Callable[[str], str]) -> Any:
    """The record with every text in it changed; states are no texts."""
    if isinstance(record, str):
        return change(record)
    if isinstance(record, tuple):
        return tuple(with_texts(item, change) for item in record)
    if not is_dataclass(record) or isinstance(record, type):
        return record
    names = [field.name for field in fields(record) if field.name != "state"]
    return replace(record, **{name: with_texts(getattr(record, name), change) for name in names})


def with_points(text: str, count: int = d.MAX_POINTS) -> d.Report:
    """A report with so many points, of which every text is this one."""
    point = d.MapPoint(text, text, text, text, text, x=0.0, y=0.0)
    points = tuple(replace(point, x=float(i % 71), y=float(i // 71)) for i in range(count))
    return replace(REPORT, map=d.VectorMap(points, count, "t-SNE"))
