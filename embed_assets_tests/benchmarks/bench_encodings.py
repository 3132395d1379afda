"""How many texts in 45 languages are read right in the legacy encodings of their countries.

`python -m embed_assets_tests.benchmarks.bench_encodings DIR`, where DIR has the message catalogues of a program
(`**/locale/<language>/LC_MESSAGES/*.mo`): those of Django, in its wheel, are texts enough.
"""

from __future__ import annotations

import gettext
import random
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from embed_assets.corpus.encoding import Undecodable, decode

ENCODINGS = {
    **dict.fromkeys(("hu", "pl"), ("cp1250", "iso8859_2", "cp852")),
    **dict.fromkeys(("sk", "hr"), ("cp1250", "iso8859_2")),
    "cs": ("cp1250", "iso8859_2", "cp852", "mac_latin2"),
    **dict.fromkeys(("ro", "sl", "bs"), ("cp1250",)),
    "tr": ("cp1254", "iso8859_9"),
    "az": ("cp1254",),
    "lt": ("cp1257", "iso8859_13"),
    "lv": ("cp1257", "iso8859_13"),
    "et": ("cp1257",),
    **dict.fromkeys(("de", "fr"), ("cp1252", "mac_roman", "cp850")),
    "es": ("cp1252", "iso8859_15"),
    "da": ("cp1252", "cp865"),
    "sv": ("cp1252", "mac_roman"),
    **dict.fromkeys(("it", "pt", "nl", "nb", "nn", "fi", "is", "ca", "gl", "eu", "ga", "af", "sq"), ("cp1252",)),
    "ru": ("cp1251", "koi8_r", "cp866", "iso8859_5", "mac_cyrillic"),
    "uk": ("cp1251", "koi8_u"),
    "bg": ("cp1251",),
    "mk": ("cp1251",),
    "sr": ("cp1251",),
    "be": ("cp1251",),
    "el": ("cp1253", "iso8859_7"),
    "he": ("cp1255",),
    "ar": ("cp1256", "iso8859_6"),
    "fa": ("cp1256",),
    "th": ("cp874",),
    "ja": ("cp932", "euc_jp"),
    "ko": ("cp949",),
    "zh_Hans": ("gb18030", "gbk"),
    "zh_Hant": ("big5",),
}
"""Those of each language that its texts are found in, by its code."""
_TEXTS = 3
_PLAIN = str.maketrans({"\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2026": "...", "\u00a0": " "})


def texts(folder: Path, language: str, size: int) -> Iterator[str]:
    """A few texts of about so many characters, made of messages."""
    messages: list[str] = []
    for file in sorted(folder.glob(f"**/locale/{language}/LC_MESSAGES/*.mo")):
        with file.open("rb") as stream:
            found = gettext.GNUTranslations(stream)._catalog.values()  # type: ignore[attr-defined]
        messages += sorted(m for m in found if isinstance(m, str) and len(m) > 25 and "<" not in m and "%" not in m)
    random.Random(language).shuffle(messages)
    for _ in range(_TEXTS):
        text = ""
        while messages and len(text) < size:
            text += messages.pop().strip().translate(_PLAIN) + "\n"
        if len(text) >= size:
            yield text


def main(folder: Path) -> None:
    for size in (60, 120, 300, 1000, 3000):
        counts: Counter[str] = Counter()
        wrong = []
        for language, encodings in ENCODINGS.items():
            for text in texts(folder, language, size):
                for encoding in encodings:
                    lines = [
                        line for line in text.splitlines() if line.encode(encoding, "ignore").decode(encoding) == line
                    ]
                    expected = "\n".join(lines)
                    data = expected.encode(encoding)
                    if not any(byte > 127 for byte in data):
                        continue
                    try:
                        read, as_encoding = decode(data)
                    except Undecodable:
                        counts["refused"] += 1
                        continue
                    is_right = unicodedata.normalize("NFC", read) == unicodedata.normalize("NFC", expected)
                    counts["right" if is_right else "wrong"] += 1
                    if not is_right:
                        wrong.append(f"{language} in {encoding} as {as_encoding}")
        total = counts.total()
        print(f"{size} characters: {total} texts, {100 * counts['right'] / total:.1f} % right, {dict(counts)} {wrong}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
