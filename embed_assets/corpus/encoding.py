"""Decodes bytes to text without mojibake: by byte order mark, strict UTF-8, then a detector that may decline."""

from __future__ import annotations

import codecs
import re

import webencodings
from charset_normalizer import CharsetMatch, from_bytes

_BYTE_ORDER_MARKS = (
    # UTF-32 goes first: its little-endian mark starts with that of UTF-16.
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_HTML_CHARSET = re.compile(rb"<meta[^>]+charset=[\"']?\s*([\w:.-]+)", re.IGNORECASE)
_HTML_HEAD_BYTES = 4096
"""Where a page may declare its charset. The HTML standard says the first 1,024 bytes; this tolerates longer heads."""
_CANDIDATES = (
    *("cp1252", "cp1250", "cp1251", "cp1253", "cp1254", "cp1255", "cp1256", "cp1257", "cp1258", "koi8_r", "koi8_u"),
    *("iso8859_2", "cp437", "cp850", "cp866", "cp932", "euc_jp", "gb18030", "big5", "cp949"),
)
"""Encodings that real documents use. Rarer ones are left out: some of them fit almost any bytes."""
_DETECTOR_SAMPLE_BYTES = 256 << 10
"""Bytes from the start of a file that the detector sees: more would make it surer, and slower in proportion."""
_MAX_CHAOS_PERCENT = 10
"""Largest share of implausible sequences; charset-normalizer itself allows 20. Higher lets mojibake through."""
_TIED_COHERENCE_PERCENT = 5
"""Encodings whose language scores differ by no more than this are tied. Higher declines more files as ambiguous, lower
picks between sister encodings by chance."""
_TIED_CHAOS_PERCENT = 1
"""Encodings are tied only if their chaos differs by no more than this, too."""
_MAX_CONTROL_SHARE = 0.02
"""Largest share of control characters in UTF-8. Higher lets binary data through, lower rejects logs with strays."""
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0e-\x1a\x1c-\x1f\x7f]")
"""Control characters that text never has. Tab, line ends, form feed and escape are not among them: real files do."""
_C1_CONTROL = re.compile(r"[\x80-\x9f]")


class Undecodable(Exception):
    """The bytes are not text in any encoding that could be determined with confidence."""


def byte_order_mark(data: bytes) -> str | None:
    """The encoding that the data's byte order mark stands for; None when there is no mark."""
    return next((encoding for mark, encoding in _BYTE_ORDER_MARKS if data.startswith(mark)), None)


def decode(data: bytes, html: bool = False) -> tuple[str, str]:
    """(text, encoding) of the data: line ends become ``\\n``; UTF-8 is "utf-8", with or without a byte order mark.

    Tries a byte order mark, strict UTF-8, the charset that an HTML page declares, and a detector, in this order.
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
                f"it begins with the byte order mark of {marked} but has {error.reason} at byte {error.start}; "
                "save it as UTF-8"
            ) from None
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        not_utf8 = f"not UTF-8 ({error.reason} at byte {error.start})"
    else:
        return _accept_utf8(text, data)
    if b"\0" in data:
        raise Undecodable(f"{not_utf8} and with NUL bytes, so it is not text; save it as UTF-8")
    declared = _HTML_CHARSET.search(data[:_HTML_HEAD_BYTES]) if html else None
    label = webencodings.lookup(declared[1].decode("ascii", "replace")) if declared else None
    if label is not None and not label.name.startswith("utf-"):
        try:
            # Through the codec itself: Python knows some of these encodings by no name.
            return label.codec_info.decode(data, "strict")[0], label.name
        except UnicodeDecodeError as error:
            raise Undecodable(
                f"the page declares {label.name} but has {error.reason} at byte {error.start}; save it as UTF-8"
            ) from None
    _reject_damaged_utf8(data, not_utf8)
    return _detect(data, not_utf8)


def _accept_utf8(text: str, data: bytes) -> tuple[str, str]:
    """(text, encoding) of data that is valid UTF-8, as ISO-2022-JP and other 7-bit encodings are too.

    Raises ``Undecodable`` when it has too many control characters to be text.
    """
    if b"\x1b$" in data or b"\x1b(J" in data:
        try:
            return data.decode("iso2022_jp"), "iso2022_jp"
        except UnicodeDecodeError:
            pass
    controls = len(_CONTROL.findall(text))
    if "\0" in text or controls > _MAX_CONTROL_SHARE * len(text):
        raise Undecodable(
            f"it is not text: {controls} of its {len(text)} characters are control characters; save it as UTF-8"
        )
    return text, "utf-8"


def _reject_damaged_utf8(data: bytes, not_utf8: str) -> None:
    """Raise ``Undecodable`` if the data is UTF-8 with a few bad bytes: a detector would see another encoding in it."""
    text = data.decode("utf-8", "replace")
    bad = text.count("\ufffd")
    if sum(1 for c in text if c > "\x7f" and c != "\ufffd") > bad:
        raise Undecodable(f"{not_utf8}, although most of it is: {bad} invalid sequences; fix them")


def _detect(data: bytes, not_utf8: str) -> tuple[str, str]:
    """(text, encoding) by the detector. Raises ``Undecodable`` when it is unsure, or the whole data does not fit.

    Encodings of one family share most letters. When several are tied but give different texts, Western (windows-1252,
    the web's default in the WHATWG Encoding Standard, 4.2) wins if it is among them; otherwise none does.
    """
    matches = from_bytes(data[:_DETECTOR_SAMPLE_BYTES], cp_isolation=list(_CANDIDATES), enable_fallback=False)
    found = [match for match in matches if match.percent_coherence > 0]
    if not found or found[0].percent_chaos > _MAX_CHAOS_PERCENT:
        raise Undecodable(f"{not_utf8}, and no other encoding clearly fits; save it as UTF-8")
    best = found[0].encoding
    tied = [match for match in found if _is_tied(match, found[0])]
    if len({str(match) for match in tied}) > 1:
        names = {name for match in tied for name in (match.encoding, *match.could_be_from_charset)}
        if "cp1252" not in names:
            raise Undecodable(f"{not_utf8}, and it could be {' or '.join(sorted(names)[:3])}; save it as UTF-8")
        best = "cp1252"
    try:
        text = data.decode(best)
    except (LookupError, UnicodeDecodeError):
        raise Undecodable(f"{not_utf8}, and only partly {best}; save it as UTF-8") from None
    if _CONTROL.search(text) or _C1_CONTROL.search(text):
        raise Undecodable(f"{not_utf8}, and as {best} it would have control characters; save it as UTF-8")
    return text, best


def _is_tied(match: CharsetMatch, best: CharsetMatch) -> bool:
    """Whether a match explains the data about as well as the best one."""
    return bool(
        match.percent_chaos <= best.percent_chaos + _TIED_CHAOS_PERCENT
        and match.percent_coherence >= best.percent_coherence - _TIED_COHERENCE_PERCENT
    )
