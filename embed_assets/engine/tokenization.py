"""Runs the embedding model's tokenizer without the model: token counts, token positions, and flat arrays of ids."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
from tokenizers import Encoding, Tokenizer, models, pre_tokenizers, processors

from embed_assets.engine.words import PlacedTokens, splits_at_whitespace, word_cache
from embed_assets.errors import ModelError

_SPACES = np.array([code for code in range(0x3001) if chr(code).isspace()], dtype=np.uint32)
"""Code points of whitespace, up to the ideographic space (U+3000)."""
_CHARACTERS_PER_TOKEN = 20
"""More than texts have on average, so that a prefix of this many characters per token fills the model."""
_WORD_END = re.compile(r"(?<=[A-Za-z0-9]) (?=[A-Za-z0-9])")
"""The space between two plain words: no normalizer or pattern looks across it."""
_LEAST_VOCABULARY = 32
"""Fewer entries are special tokens: `word_tokenizer_json`, which counts words, has three."""
_BLOCK_TEXTS = 2048
"""Texts encoded at a time: the library's encodings take about 100 bytes per token, so few are kept alive."""


@dataclass(frozen=True, slots=True)
class TokenizedTexts:
    """Token ids of several texts, end to end."""

    ids: np.ndarray
    """int32, shape (sum of lengths,): token ids."""
    offsets: np.ndarray
    """int64, shape (texts + 1,): text i has ``ids[offsets[i]:offsets[i + 1]]``."""
    is_truncated: np.ndarray
    """bool, shape (texts,): whether tokens beyond the model's maximum were dropped."""

    @classmethod
    def from_lists(cls, ids: pa.ListArray) -> TokenizedTexts | None:
        """The tokens of texts of which none was truncated, given as lists of int32; None if any list is null."""
        if ids.null_count:
            return None
        offsets = ids.offsets.to_numpy().astype(np.int64)
        flat = ids.values.to_numpy()[offsets[0] : offsets[-1]]
        return cls(flat, offsets - offsets[0], np.zeros(len(ids), dtype=bool))

    @property
    def lengths(self) -> np.ndarray:
        """int64, tokens per text."""
        return np.diff(self.offsets)


def token_lists(tokens: TokenizedTexts | None, texts: int) -> pa.ListArray:
    """list<int32>: the token ids of each text, as `TokenizedTexts.from_lists` reads them; null if they are unknown."""
    if tokens is None:
        return pa.nulls(texts, pa.list_(pa.int32()))
    return pa.ListArray.from_arrays(pa.array(tokens.offsets.astype(np.int32)), pa.array(tokens.ids, pa.int32()))


class ModelTokenizer:
    """The model's tokenizer, as a private instance whose truncation and padding no other code changes.

    The library runs on all cores and releases the GIL.
    """

    def __init__(self, description: str) -> None:
        """`description` is the contents of a ``tokenizer.json``."""
        self._description = description
        parsed = json.loads(description)
        self.splits_at_whitespace = splits_at_whitespace(parsed)
        self._may_cut_at_whitespace = _splits_words(parsed.get("pre_tokenizer") or {})
        self._whole = Tokenizer.from_str(description)
        self._whole.no_truncation()
        self._whole.no_padding()
        self._cut = Tokenizer.from_str(description)
        self._cut.no_padding()
        self._max_length = 0
        # Some tokenizers count the space before a word as part of its token, others do not.
        probe = self._whole.encode("a b  c", add_special_tokens=False).offsets
        self._counts_spaces = any("a b  c"[start : start + 1] == " " for start, _ in probe)
        self.special_tokens = int(self._whole.num_special_tokens_to_add(is_pair=False))
        self._words = word_cache(parsed, lambda text: self._placed([text])[0])

    @classmethod
    def from_description(cls, description: str, model: str) -> ModelTokenizer:
        """The tokenizer of `model`. Raises ``ModelError`` when `description` is not a valid tokenizer."""
        try:
            return cls(description)
        except Exception as error:  # the library raises plain Exception
            raise ModelError(
                f"the tokenizer.json of {model!r} is not a valid tokenizer: {error}; save the model again"
            ) from error

    def copy(self) -> ModelTokenizer:
        """A copy for another thread.

        A tokenizer of the library fails with "Already borrowed" when it is configured in one thread while it is in use
        in another: https://github.com/huggingface/transformers/issues/47085.
        """
        return ModelTokenizer(self._description)

    def __reduce__(self) -> tuple[type[ModelTokenizer], tuple[str]]:
        """Pickle the description alone, for worker processes."""
        return ModelTokenizer, (self._description,)

    @cached_property
    def added_ids(self) -> tuple[np.ndarray, np.ndarray]:
        """int32 ids of the special tokens that the model's input has before and after a text's own."""
        probe = self._whole.encode("a")
        own = np.flatnonzero(np.array(probe.special_tokens_mask) == 0)
        first, last = (int(own[0]), int(own[-1]) + 1) if len(own) else (len(probe), len(probe))
        ids = np.array(probe.ids, dtype=np.int32)
        return ids[:first], ids[last:]

    @cached_property
    def unknown_id(self) -> int | None:
        """Id of the token that stands for words that the tokenizer does not know.

        None if it can write every text, or knows no words at all and only counts them.
        """
        if self._whole.get_vocab_size() < _LEAST_VOCABULARY:
            return None
        model = json.loads(self._description).get("model") or {}
        if isinstance(model.get("unk_id"), int):  # a Unigram model
            return int(model["unk_id"])
        token = model.get("unk_token")
        return self._whole.token_to_id(token) if isinstance(token, str) else None

    def tokens(self, texts: Sequence[str]) -> list[PlacedTokens]:
        """The tokens of each text with their places, without special tokens and truncation."""
        if self._words is not None:
            return self._words.tokens(texts)
        return self._placed(texts)

    def _placed(self, texts: Sequence[str]) -> list[PlacedTokens]:
        found = [
            PlacedTokens(
                np.array(e.ids, dtype=np.int32),
                np.fromiter(chain.from_iterable(e.offsets), dtype=np.int32, count=2 * len(e)).reshape(-1, 2),
            )
            for e in self._whole.encode_batch(texts, add_special_tokens=False)
        ]
        if not self._counts_spaces:
            return found
        return [
            PlacedTokens(f.ids, _without_leading_space(text, f.spans)) for text, f in zip(texts, found, strict=True)
        ]

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """int32 ids of each text, without special tokens and truncation."""
        encodings = self._whole.encode_batch_fast(texts, add_special_tokens=False) if texts else []
        return [np.array(e.ids, dtype=np.int32) for e in encodings]

    def count(self, texts: Sequence[str]) -> list[int]:
        """Number of tokens per text, including special tokens, without truncation."""
        return [len(e) for e in self._whole.encode_batch_fast(texts)] if texts else []

    def tokenize(self, texts: Sequence[str], max_length: int) -> TokenizedTexts:
        """Token ids of each text, including special tokens, truncated to `max_length` tokens as the model does it."""
        if max_length != self._max_length:
            self._cut.enable_truncation(max_length)
            self._max_length = max_length
        ids: list[np.ndarray] = []
        lengths: list[int] = []
        is_truncated: list[bool] = []
        for start in range(0, len(texts), _BLOCK_TEXTS):
            encodings = self._encode(texts[start : start + _BLOCK_TEXTS])
            lengths += (len(e) for e in encodings)
            is_truncated += (bool(e.overflowing) for e in encodings)
            ids.append(np.fromiter(chain.from_iterable(e.ids for e in encodings), dtype=np.int32))
        offsets = np.zeros(len(texts) + 1, dtype=np.int64)
        np.cumsum(lengths, out=offsets[1:])
        flat = np.concatenate(ids) if ids else np.empty(0, dtype=np.int32)
        return TokenizedTexts(flat, offsets, np.array(is_truncated, dtype=bool))

    def _encode(self, texts: Sequence[str]) -> list[Encoding]:
        """Encodings of the texts, each truncated to the model's length.

        The library tokenizes a whole text before it truncates (https://github.com/huggingface/tokenizers/issues/1573).
        So it gets only a prefix of a very long text, and all of it if the prefix was not enough to fill the model.
        """
        beginnings = [self._beginning(text) for text in texts]
        encodings = self._cut.encode_batch_fast(beginnings)
        again = [
            i for i, (text, beginning) in enumerate(zip(texts, beginnings, strict=True))
            if len(beginning) < len(text) and not encodings[i].overflowing
        ]  # fmt: skip
        for i, encoding in zip(again, self._cut.encode_batch_fast([texts[i] for i in again]), strict=True):
            encodings[i] = encoding
        return encodings

    def _beginning(self, text: str) -> str:
        """A prefix, cut at a space, that surely fills the model; the whole text where tokens can span spaces."""
        enough = _CHARACTERS_PER_TOKEN * self._max_length
        if len(text) <= enough or not self._may_cut_at_whitespace:
            return text
        found = _WORD_END.search(text, enough)
        return text if found is None else text[: found.start()]


def _splits_words(pre_tokenizer: dict[str, Any]) -> bool:
    """Whether no token spans the space between two words, judged by the kind of pre-tokenizer."""
    kind = pre_tokenizer.get("type")
    if kind == "Sequence":
        return any(_splits_words(part) for part in pre_tokenizer.get("pretokenizers", ()))
    if kind == "Metaspace":
        return bool(pre_tokenizer.get("split", True))
    if kind == "ByteLevel":
        return bool(pre_tokenizer.get("use_regex", True))
    return kind in ("BertPreTokenizer", "Whitespace", "WhitespaceSplit")


def _without_leading_space(text: str, spans: np.ndarray) -> np.ndarray:
    """The spans without leading whitespace, same shape. A token of nothing but whitespace becomes empty, at its end."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    places = np.where(np.isin(codes, _SPACES), len(codes), np.arange(len(codes)))
    following = np.append(np.minimum.accumulate(places[::-1])[::-1], len(codes))
    starts = np.minimum(following[spans[:, 0]], spans[:, 1])
    return np.stack([starts, spans[:, 1]], axis=1).astype(np.int32)


def word_tokenizer_json() -> str:
    """``tokenizer.json`` of a stand-in for models whose tokenizer is not on this machine.

    It makes one token per word or punctuation mark, and adds two special tokens per text.
    """
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "[CLS]": 1, "[SEP]": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return str(tokenizer.to_str())
