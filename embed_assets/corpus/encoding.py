"""Bytes to text without mojibake: byte order mark, strict UTF-8, then a detector that may say no."""

from __future__ import annotations

import codecs
import re

from charset_normalizer import from_bytes

_BYTE_ORDER_MARKS = (
    # UTF-32's little-endian mark begins with UTF-16's, so it comes first.
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_HTML_CHARSET = re.compile(rb"<meta[^>]+charset=[\"']?\s*([\w-]+)", re.IGNORECASE)
_DETECTOR_SAMPLE_BYTES = 256 << 10


class Undecodable(Exception):
    """The bytes are no text in any encoding that could be told with confidence."""


def decode(data: bytes, html: bool = False) -> tuple[str, str]:
    """The text, with line ends as ``\\n``, and the name of its encoding ("utf-8" with or without a mark).

    Tried in this order: a byte order mark, strict UTF-8, an HTML page's own charset, and a detector.
    Raises ``Undecodable`` rather than return a guess.
    """
    text, encoding = _decode(data, html)
    return text.replace("\r\n", "\n").replace("\r", "\n"), encoding


def _decode(data: bytes, html: bool) -> tuple[str, str]:
    for mark, encoding in _BYTE_ORDER_MARKS:
        if data.startswith(mark):
            try:
                return data.decode(encoding), encoding.removesuffix("-sig")
            except UnicodeDecodeError as error:
                raise Undecodable(
                    f"it begins with the byte order mark of {encoding} but {error.reason} at byte {error.start}"
                ) from None
    try:
        return data.decode("utf-8"), "utf-8"
    except UnicodeDecodeError as error:
        not_utf8 = f"no UTF-8 ({error.reason} at byte {error.start})"
    declared = _HTML_CHARSET.search(data[:4096]) if html else None
    for encoding in [declared[1].decode("ascii")] if declared else []:
        try:
            return data.decode(encoding), encoding.lower()
        except (LookupError, UnicodeDecodeError):
            break
    if b"\0" in data:
        raise Undecodable(f"{not_utf8} and it holds NUL bytes, so it is no text; save it as UTF-8")
    return _detect(data, not_utf8)


def _detect(data: bytes, not_utf8: str) -> tuple[str, str]:
    """The detector's answer, if it is sure of it and the whole of the bytes decode without control characters."""
    best = from_bytes(data[:_DETECTOR_SAMPLE_BYTES]).best()
    if best is None or best.percent_chaos > 10:
        raise Undecodable(f"{not_utf8}, and no other encoding fits; save it as UTF-8")
    try:
        text = data.decode(best.encoding)
    except (LookupError, UnicodeDecodeError):
        raise Undecodable(f"{not_utf8}, looks like {best.encoding} but is not throughout; save it as UTF-8") from None
    if sum(1 for c in text[:100_000] if ord(c) < 32 and c not in "\t\n\r\f") or "\x7f" in text[:100_000]:
        raise Undecodable(f"{not_utf8}, and as {best.encoding} it has control characters; save it as UTF-8")
    return text, best.encoding
