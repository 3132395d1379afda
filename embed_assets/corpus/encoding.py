"""Decodes bytes to text without mojibake: by byte order mark, strict UTF-8, then a detector that may decline."""

from __future__ import annotations

import codecs
import re

import chardet
import webencodings

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
_DETECTOR_SAMPLE_BYTES = 256 << 10
"""Bytes from the start of a file that the detector sees: more would make it surer, and slower in proportion."""
_LEAST_CONFIDENCE = 0.14
"""Of the detector. Of 611 texts of 300 to 3,000 characters in 44 languages and their legacy encodings
(`embed_assets_tests/benchmarks/bench_encodings.py`), 597 are read right, 11 refused and 3 wrong: Azerbaijani without
its ə, and Basque with hardly an accent. Without the limit Albanian is taken for Baltic, at 0.13 or less."""
_LEAST_WESTERN_CONFIDENCE = 0.05
"""For the encoding that the web falls back to, and its sister with the euro sign: of those texts, one in another
encoding was taken for them below the other limit."""
_WESTERN = ("cp1252", "iso8859-15")
_MARKUP = re.compile(rb"<[^<>]*>|[!-/:-?]+")
"""What tells the detector nothing: tags and punctuation, without digits and what may be the second byte of a character.
Without them it reads pages as surely as text: of those made of the shortest texts 151 of 196 in place of 62."""
_LEFT_OUT = ("iso8859-3", "iso8859-4", "iso8859-10", "iso8859-14", "iso8859-16", "hp-roman8")
"""Nearly nobody wrote in them, and they are taken for those of short Catalan, Croatian and Italian texts."""
_WIDER = {
    "iso8859-1": "cp1252",
    "iso8859-9": "cp1254",
    "iso8859-11": "cp874",
    "tis-620": "cp874",
    "shift_jis": "cp932",
    "euc_kr": "cp949",
    "gb2312": "gb18030",
    "gbk": "gb18030",
}
"""Encodings that are read as a wider one which has the same letters, as the WHATWG Encoding Standard (4.2) says."""
_MAX_CONTROL_SHARE = 0.02
"""Largest share of control characters in UTF-8. Higher lets binary data through, lower rejects logs with strays."""
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0e-\x1a\x1c-\x1f\x7f]")
"""Control characters that text never has. Tab, line ends, form feed and escape are not among them: real files do."""
_C1_CONTROL = re.compile(r"[\x80-\x9f]")


_LEAST_ZERO_SHARE = 0.3
"""Of the high bytes of UTF-16: text in Latin letters has 0.9 and more, Cyrillic only its spaces, about 0.17."""


class Undecodable(Exception):
    """The bytes are not text in any encoding that could be determined with confidence."""


class DamagedUtf8(Undecodable):
    """Most of the bytes are UTF-8, some are not text in any encoding."""


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
    if (wide := _unmarked_utf16(data)) is not None:
        return wide
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


def _unmarked_utf16(data: bytes) -> tuple[str, str] | None:
    """(text, encoding) of UTF-16 without a byte order mark, if every other byte is mostly zero; else None."""
    if len(data) % 2 or b"\0" not in data:
        return None
    zeros = data[::2].count(0), data[1::2].count(0)
    if min(zeros) or max(zeros) * 2 < len(data) * _LEAST_ZERO_SHARE:
        return None
    encoding = "utf-16-be" if zeros[0] else "utf-16-le"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        return None
    return None if _CONTROL.search(text) else (text, encoding)


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
    """Raise ``DamagedUtf8`` if the data is UTF-8 with a few bad bytes: a detector would see another encoding in it."""
    text = data.decode("utf-8", "replace")
    bad = text.count("\ufffd")
    if sum(1 for c in text if c > "\x7f" and c != "\ufffd") > bad:
        raise DamagedUtf8(f"{not_utf8}, although most of it is: {bad} invalid sequences; fix them")


def _detect(data: bytes, not_utf8: str) -> tuple[str, str]:
    """(text, encoding) by the detector. Raises ``Undecodable`` when it is unsure, or the whole data does not fit."""
    found = chardet.detect(
        _MARKUP.sub(b" ", data[:_DETECTOR_SAMPLE_BYTES]),
        max_bytes=_DETECTOR_SAMPLE_BYTES,
        compat_names=False,
        prefer_superset=False,
        exclude_encodings=_LEFT_OUT,
    )
    name = codecs.lookup(found["encoding"]).name if found["encoding"] else ""
    best = _WIDER.get(name, name)
    least = _LEAST_WESTERN_CONFIDENCE if best in _WESTERN else _LEAST_CONFIDENCE
    if not best or found["confidence"] < least:
        raise Undecodable(f"{not_utf8}, and no other encoding clearly fits; save it as UTF-8")
    try:
        text = data.decode(best)
    except UnicodeDecodeError:
        raise Undecodable(f"{not_utf8}, and only partly {best}; save it as UTF-8") from None
    if _CONTROL.search(text) or _C1_CONTROL.search(text):
        raise Undecodable(f"{not_utf8}, and as {best} it would have control characters; save it as UTF-8")
    return text, best
