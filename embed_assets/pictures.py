"""Draws small PNG pictures for Markdown: a histogram of chunk lengths and a map of vectors.

Pillow draws one in about 10 ms; a plotting library takes ten times as long, for every partition.
"""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_WIDTH, _HEIGHT = 460, 190
"""Size of a picture, in units of the layout."""
_SCALE = 1.5
"""Pixels per unit of the layout."""
_INK, _FAINT, _BAR, _LIMIT = "#374151", "#9ca3af", "#6366f1", "#dc2626"
_COLORS = ("#4f46e5", "#059669", "#d97706", "#db2777", "#0891b2", "#65a30d", "#7c3aed", "#b91c1c")
_PLOT = (44, 10, 330, 160)
"""Left, top, right and bottom of the plot, in units of the layout; the legend is to the right of it."""
_ITERATIONS = 12
"""Enough for axes that look right; the rest would move dots by less than a pixel."""
_LABEL_CHARACTERS = 19
"""Longest label that fits to the right of the plot."""


def draw_token_lengths(token_counts: np.ndarray, max_tokens: int) -> str:
    """Draw a histogram of chunk lengths in tokens, with a line at `max_tokens`; returns a Markdown image.

    `token_counts` has the number of chunks of each length from 0.
    """
    canvas = _Canvas()
    left, top, right, bottom = _PLOT
    lengths, total = np.arange(len(token_counts)), int(token_counts.sum())
    widest = max(max_tokens, len(token_counts) - 1)
    median = int(np.searchsorted(np.cumsum(token_counts), total / 2))
    counts = np.histogram(lengths, bins=32, range=(0, widest), weights=token_counts)[0].astype(int)
    step = (right - left) / len(counts)
    for i, count in enumerate(counts):
        height = (bottom - top) * count / counts.max()
        canvas.box(left + i * step + 1, bottom - height, left + (i + 1) * step - 1, bottom, _BAR)
    canvas.line(left, bottom, right, bottom, _INK)
    canvas.text(left, bottom + 4, "0")
    canvas.text(right - 2, bottom + 4, f"{widest:,} tokens", anchor="ra")
    canvas.text(left - 4, top, f"{counts.max():,}", anchor="ra")
    canvas.text(left - 4, bottom - 12, "0", anchor="ra")
    limit = left + (right - left) * max_tokens / widest
    canvas.line(limit, top, limit, bottom, _LIMIT)
    legend = f"{total:,} chunks", f"median {median:,}", f"line: {max_tokens:,} fit"
    for i, line in enumerate(legend):
        canvas.text(right + 12, top + 16 * i, line, _LIMIT if i == 2 else _INK)
    return canvas.as_markdown("token lengths of the chunks")


def draw_map(vectors: np.ndarray, documents: Sequence[str]) -> str:
    """Draw vectors on their two principal axes, colored by document; returns a Markdown image.

    `vectors` has shape (n, dimension), and `documents` the document of each vector.
    """
    canvas = _Canvas()
    left, top, right, bottom = _PLOT
    flat = _flatten(vectors)
    low, spread = flat.min(axis=0), np.maximum(np.ptp(flat, axis=0), 1e-9)
    places = (flat - low) / spread
    named = [document for document, _ in Counter(documents).most_common(len(_COLORS))]
    colors = dict(zip(named, _COLORS, strict=False))
    for (x, y), document in sorted(zip(places.tolist(), documents, strict=True), key=lambda p: p[1] in colors):
        canvas.dot(left + x * (right - left), bottom - y * (bottom - top), colors.get(document, _FAINT))
    for i, (document, color) in enumerate(colors.items()):
        canvas.dot(right + 16, top + 6 + 16 * i, color)
        canvas.text(right + 24, top + 16 * i, document)
    if len(set(documents)) > len(named):
        canvas.text(right + 24, top + 16 * len(named), "others", _FAINT)
    canvas.text(left, bottom + 6, f"{len(vectors):,} of the partition's vectors, on two principal axes")
    return canvas.as_markdown("map of the vectors")


def _flatten(vectors: np.ndarray) -> np.ndarray:
    """Project vectors onto their two principal axes: shape (n, 2)."""
    centered = vectors - vectors.mean(axis=0)
    # Subspace iteration: a few products with thin matrices, where a decomposition takes a hundred times as long.
    axes = np.random.default_rng(0).standard_normal((centered.shape[1], 2))
    for _ in range(_ITERATIONS):
        axes = np.linalg.qr(centered.T @ (centered @ axes))[0]
    flat = np.zeros((len(vectors), 2))
    flat[:, : axes.shape[1]] = centered @ axes
    return flat


class _Canvas:
    """A white picture with drawing methods in units of the layout."""

    def __init__(self) -> None:
        self._image = Image.new("RGB", (int(_WIDTH * _SCALE), int(_HEIGHT * _SCALE)), "white")
        self._draw = ImageDraw.Draw(self._image)
        self._font = ImageFont.load_default(size=10 * _SCALE)

    def box(self, left: float, top: float, right: float, bottom: float, color: str) -> None:
        self._draw.rectangle([v * _SCALE for v in (left, top, right, bottom)], fill=color)

    def line(self, x: float, y: float, to_x: float, to_y: float, color: str) -> None:
        self._draw.line([v * _SCALE for v in (x, y, to_x, to_y)], fill=color, width=2)

    def dot(self, x: float, y: float, color: str) -> None:
        self._draw.ellipse([(v + d) * _SCALE for d in (-2.5, 2.5) for v in (x, y)], fill=color)

    def text(self, x: float, y: float, text: str, color: str = _INK, anchor: str = "la") -> None:
        # Only ASCII is certain to be in the built-in font.
        shown = text.encode("ascii", "replace").decode()
        if len(shown) > _LABEL_CHARACTERS and x > _PLOT[2]:
            shown = "..." + shown[3 - _LABEL_CHARACTERS :]
        self._draw.text((x * _SCALE, y * _SCALE), shown, fill=color, font=self._font, anchor=anchor)

    def as_markdown(self, name: str) -> str:
        """Encode the picture as a Markdown image with a data URI, which Dagster's UI displays."""
        buffer = io.BytesIO()
        self._image.convert("P", dither=Image.Dither.NONE, palette=Image.Palette.WEB).save(buffer, "PNG")
        encoded = base64.b64encode(buffer.getvalue()).decode("ascii")
        return f"![{name}](data:image/png;base64,{encoded})"
