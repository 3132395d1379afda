"""Reads e-mail messages as Markdown: the subject as heading, who wrote when to whom, and the text."""

from __future__ import annotations

import codecs
import email
import email.policy
import io
import re
from collections.abc import Iterator
from email.message import EmailMessage

from embed_assets.corpus.encoding import Undecodable, decode
from embed_assets.corpus.formats.html import html_to_markdown
from embed_assets.corpus.formats.parsed import MissingExtra, Parsed
from embed_assets.corpus.items import BadRow

_HEADERS = ("From", "To", "Cc", "Date")
_CODE_PAGE = re.compile(r"windows[-_](\d+)")


def read_eml(data: bytes) -> Parsed:
    """A message in Internet format (RFC 5322), and those that it forwards. Raises ``BadRow.Error``."""
    message = email.message_from_bytes(data, policy=email.policy.default)
    if not message.keys():
        raise BadRow.Error("broken_file", "it has no headers, so it is no e-mail message")
    assert isinstance(message, EmailMessage)
    names = [name for part in message.walk() if (name := _safe(part.get_filename))]
    return _parsed(_header(message, "Subject"), _parts(message), names)


def read_msg(data: bytes) -> Parsed:
    """A message that Outlook saved. Raises ``BadRow.Error`` or ``MissingExtra``."""
    try:
        from oxmsg import Message
    except ImportError:
        raise MissingExtra("an Outlook message") from None
    codecs.register(_code_page)
    try:
        message = Message.load(io.BytesIO(data))
        to = ", ".join(filter(None, (recipient.name or recipient.email_address for recipient in message.recipients)))
        headers = {"From": message.sender or "", "To": to, "Date": str(message.sent_date or "")}
        text = (message.body or "").strip("\0 \r\n")
        if not text and message.html_body:
            text = html_to_markdown(message.html_body).text
        names = [attachment.file_name for attachment in message.attachments if attachment.file_name]
        subject = message.subject
    except BadRow.Error:
        raise
    except Exception as error:  # the library raises all sorts of exceptions on broken files
        detail = f"the Outlook message could not be parsed: {type(error).__name__}: {error}"
        raise BadRow.Error("broken_file", detail) from error
    return _parsed(subject or "", [*_lines(headers), text.replace("\r\n", "\n")], names)


def _parsed(subject: str, parts: list[str], attachments: list[str]) -> Parsed:
    title = " ".join(subject.split())
    text = "\n\n".join(part.strip() for part in [f"# {title}" if title else "", *parts] if part.strip())
    return Parsed(text, title, metadata={"attachments": ", ".join(attachments)} if attachments else {})


def _lines(headers: dict[str, str]) -> list[str]:
    return ["\n".join(f"{name}: {' '.join(value.split())}" for name, value in headers.items() if value.strip())]


def _parts(message: EmailMessage) -> list[str]:
    """Headers and text of a message, and of those inside it."""
    headers = {name: _header(message, name) for name in _HEADERS}
    inside = [text for part in _forwarded(message) for text in (_header(part, "Subject"), *_parts(part))]
    return [*_lines(headers), _body(message), *inside]


def _forwarded(message: EmailMessage) -> Iterator[EmailMessage]:
    """The messages attached to a message, outermost first."""
    for part in message.iter_parts() if message.is_multipart() else ():
        if part.get_content_type() == "message/rfc822":
            for inner in part.get_payload():
                if isinstance(inner, EmailMessage):
                    yield inner
        elif isinstance(part, EmailMessage) and part.is_multipart():
            yield from _forwarded(part)


def _body(message: EmailMessage) -> str:
    """The text of a message, from its HTML if it has no plain one."""
    for kind in ("plain", "html"):
        try:
            part = message.get_body(preferencelist=(kind,))
        except Exception:  # the library raises all sorts of exceptions on broken structures
            part = None
        data = part.get_payload(decode=True) if part is not None else None
        if part is None or not isinstance(data, bytes):
            continue
        text = _decoded(data, part.get_content_charset())
        if kind == "html":
            text = html_to_markdown(text).text
        if text.strip():
            return text
    return ""


def _decoded(data: bytes, charset: str | None) -> str:
    """A part's text, by the charset that it names or, if that is wrong, by what it looks like."""
    try:
        return data.decode(charset or "utf-8").replace("\r\n", "\n")
    except (LookupError, UnicodeDecodeError):
        pass
    try:
        return decode(data)[0]
    except Undecodable as error:
        raise BadRow.Error("undecodable", str(error)) from None


def _header(message: EmailMessage, name: str) -> str:
    return str(_safe(lambda: message.get(name)) or "")


def _safe(get: object) -> str | None:
    """What a function of the library returns; None if a malformed header makes it raise."""
    try:
        found = get()  # type: ignore[operator]
    except Exception:
        return None
    return None if found is None else str(found)


def _code_page(name: str) -> codecs.CodecInfo | None:
    """Windows' code pages by the names that Outlook writes, such as 'windows-950', which Python knows as 'cp950'."""
    match = _CODE_PAGE.fullmatch(name)
    try:
        return codecs.lookup(f"cp{match[1]}") if match else None
    except LookupError:
        return None
