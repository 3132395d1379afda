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
_MAX_CHAOS_PERCENT = 10
_EQUAL_COHERENCE_PERCENT = 5
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f]")


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
    """The detector's answer, if it is sure of it and the whole of the bytes decode without control characters.

    Encodings of one family share most letters. Where several explain the bytes about equally well but read them
    differently, Western (the web's own default, WHATWG Encoding 4.2) is taken if it is among them, else none.
    """
    found = [match for match in from_bytes(data[:_DETECTOR_SAMPLE_BYTES]) if match.percent_coherence > 0]
    if not found or found[0].percent_chaos > _MAX_CHAOS_PERCENT:
        raise Undecodable(f"{not_utf8}, and no other encoding is plain enough; save it as UTF-8")
    best = found[0]
    equal = [
        match
        for match in found
        if match.percent_chaos <= best.percent_chaos + 1
        and match.percent_coherence >= best.percent_coherence - _EQUAL_COHERENCE_PERCENT
    ]
    if len({str(match) for match in equal}) > 1:
        names = [match.encoding for match in equal]
        if "cp1252" not in names:
            raise Undecodable(f"{not_utf8}, and it could be {' or '.join(names[:3])}; save it as UTF-8")
        best = equal[names.index("cp1252")]
    try:
        text = data.decode(best.encoding)
    except (LookupError, UnicodeDecodeError):
        raise Undecodable(f"{not_utf8}, looks like {best.encoding} but is not throughout; save it as UTF-8") from None
    if _CONTROL.search(text):
        raise Undecodable(f"{not_utf8}, and as {best.encoding} it has control characters; save it as UTF-8")
    return text, best.encoding
