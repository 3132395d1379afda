"""Bytes to text without mojibake: byte order mark, strict UTF-8, then a detector that may say no."""

from __future__ import annotations

import codecs
import re

import webencodings
from charset_normalizer import CharsetMatch, from_bytes

_BYTE_ORDER_MARKS = (
    # UTF-32's little-endian mark begins with UTF-16's, so it comes first.
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_HTML_CHARSET = re.compile(rb"<meta[^>]+charset=[\"']?\s*([\w:.-]+)", re.IGNORECASE)
_DETECTED = (
    *("cp1252", "cp1250", "cp1251", "cp1253", "cp1254", "cp1255", "cp1256", "cp1257", "cp1258", "koi8_r", "koi8_u"),
    *("iso8859_2", "cp437", "cp850", "cp866", "cp932", "euc_jp", "gb18030", "big5", "cp949"),
)
"""Encodings that documents are really found in. Exotic ones explain anything."""
_DETECTOR_SAMPLE_BYTES = 256 << 10
_MAX_CHAOS_PERCENT = 10
_EQUAL_COHERENCE_PERCENT = 5
_MAX_CONTROL_SHARE = 0.02
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0e-\x1a\x1c-\x1f\x7f]")
"""Control characters that no text has; tab, line ends, form feed and escape are in real ones."""
_C1_CONTROL = re.compile(r"[\x80-\x9f]")


class Undecodable(Exception):
    """The bytes are no text in any encoding that could be told with confidence."""


def byte_order_mark(data: bytes) -> str | None:
    """The encoding that the data's byte order mark names, or None when it has none."""
    return next((encoding for mark, encoding in _BYTE_ORDER_MARKS if data.startswith(mark)), None)


def decode(data: bytes, html: bool = False) -> tuple[str, str]:
    """The text, with line ends as ``\\n``, and the name of its encoding ("utf-8" with or without a mark).

    Tried in this order: a byte order mark, strict UTF-8, an HTML page's own charset, and a detector.
    Raises ``Undecodable`` rather than return a guess.
    """
    text, encoding = _decode(data, html)
    return text.replace("\r\n", "\n").replace("\r", "\n"), encoding


def _decode(data: bytes, html: bool) -> tuple[str, str]:
    if marked := byte_order_mark(data):
        try:
            return data.decode(marked), marked.removesuffix("-sig")
        except UnicodeDecodeError as error:
            raise Undecodable(
                f"it begins with the byte order mark of {marked} but has {error.reason} at byte {error.start}"
            ) from None
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        not_utf8 = f"no UTF-8 ({error.reason} at byte {error.start})"
    else:
        return _checked(text, data)
    if b"\0" in data:
        raise Undecodable(f"{not_utf8} and it holds NUL bytes, so it is no text; save it as UTF-8")
    declared = _HTML_CHARSET.search(data[:4096]) if html else None
    label = webencodings.lookup(declared[1].decode("ascii", "replace")) if declared else None
    if label is not None and not label.name.startswith("utf-"):
        try:
            # Not by the codec's name: some have none of their own in Python.
            return label.codec_info.decode(data, "strict")[0], label.name
        except UnicodeDecodeError as error:
            raise Undecodable(
                f"the page says it is {label.name} but has {error.reason} at byte {error.start}"
            ) from None
    _refuse_damaged_utf8(data, not_utf8)
    return _detect(data, not_utf8)


def _checked(text: str, data: bytes) -> tuple[str, str]:
    """Valid UTF-8 that is also text: most other 7-bit encodings are valid UTF-8 too, and mean something else."""
    if b"\x1b$" in data or b"\x1b(J" in data:
        try:
            return data.decode("iso2022_jp"), "iso2022_jp"
        except UnicodeDecodeError:
            pass
    controls = len(_CONTROL.findall(text))
    if "\0" in text or controls > _MAX_CONTROL_SHARE * len(text):
        raise Undecodable(
            f"it has {controls} control characters among {len(text)}, so it is no UTF-8 text; save it as UTF-8"
        )
    return text, "utf-8"


def _refuse_damaged_utf8(data: bytes, not_utf8: str) -> None:
    """Mostly valid UTF-8 sequences with a few bad bytes are not another encoding."""
    text = data.decode("utf-8", "replace")
    bad = text.count("\ufffd")
    if sum(1 for c in text if c > "\x7f" and c != "\ufffd") > bad:
        raise Undecodable(f"{not_utf8} although most of it is: {bad} bad places; mend them")


def _detect(data: bytes, not_utf8: str) -> tuple[str, str]:
    """The detector's answer, if it is sure of it and the whole of the bytes decode without control characters.

    Encodings of one family share most letters. Where several explain the bytes about equally well but read them
    differently, Western (the web's own default, WHATWG Encoding 4.2) is taken if it is among them, else none.
    """
    matches = from_bytes(data[:_DETECTOR_SAMPLE_BYTES], cp_isolation=list(_DETECTED), enable_fallback=False)
    found = [match for match in matches if match.percent_coherence > 0]
    if not found or found[0].percent_chaos > _MAX_CHAOS_PERCENT:
        raise Undecodable(f"{not_utf8}, and no other encoding is plain enough; save it as UTF-8")
    best = found[0].encoding
    equal = [match for match in found if _is_as_good(match, found[0])]
    if len({str(match) for match in equal}) > 1:
        names = {name for match in equal for name in (match.encoding, *match.could_be_from_charset)}
        if "cp1252" not in names:
            raise Undecodable(f"{not_utf8}, and it could be {' or '.join(sorted(names)[:3])}; save it as UTF-8")
        best = "cp1252"
    try:
        text = data.decode(best)
    except (LookupError, UnicodeDecodeError):
        raise Undecodable(f"{not_utf8}, looks like {best} but is not throughout; save it as UTF-8") from None
    if _CONTROL.search(text) or _C1_CONTROL.search(text):
        raise Undecodable(f"{not_utf8}, and as {best} it has control characters; save it as UTF-8")
    return text, best


def _is_as_good(match: CharsetMatch, best: CharsetMatch) -> bool:
    return bool(
        match.percent_chaos <= best.percent_chaos + 1
        and match.percent_coherence >= best.percent_coherence - _EQUAL_COHERENCE_PERCENT
    )
