"""Reads a model's files without loading it: hashes of its parts, tokenizer, maximum length."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from embed_assets.engine import user_cache
from embed_assets.errors import ModelError
from embed_assets.records import hash_parts

WEIGHT_PATTERNS = ("*.safetensors", "*/*.safetensors")
"""Weights of all modules, in the one format that can't run code."""
_PICKLED = tuple(f"{folder}*.{ending}" for folder in ("", "*/") for ending in ("bin", "pt", "pth", "ckpt", "pkl"))
_NOT_WEIGHTS = frozenset({"training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"})
"""Files left behind by training, which nothing loads."""
_CONFIGS = (
    "modules.json",
    "config.json",
    "sentence_*_config.json",
    "*_Pooling/*.json",
    "*_*/config.json",
    "[0-9]*/*.json",
)
"""Configurations of the modules, whatever sentence-transformers named their folders."""
_IRRELEVANT_CONFIG = frozenset(
    {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "__version__", "use_cache"}
)
"""Keys of the configurations that change no vector."""


def weight_files(directory: Path, allow_pickled: bool = False) -> list[Path]:
    """All files of weights, sorted: safetensors, and pickled ones for modules that have nothing else.

    Raises ``ModelError`` when there are none, or when pickled ones are needed but not allowed: loading them can run
    code.
    """
    files = {file for pattern in WEIGHT_PATTERNS for file in directory.glob(pattern)}
    safe = {file.parent for file in files}
    modules = {directory, *(directory / str(m.get("path", "")) for m in _read_json_list(directory / "modules.json"))}
    found = (f for pattern in _PICKLED for f in directory.glob(pattern) if f.parent in modules - safe)
    pickled = sorted(f for f in found if f.name not in _NOT_WEIGHTS)
    if pickled and not allow_pickled:
        raise ModelError(
            f"a model needs weights as .safetensors, {str(pickled[0].relative_to(directory))!r} in {directory.name!r} "
            "could run code when loaded; convert it, choose another EMBED_MODEL, or, if you trust its source, set "
            "EMBED_ALLOW_PICKLED_WEIGHTS=true"
        )
    if not files and not pickled:
        raise ModelError(
            f"a model needs weights as .safetensors, found none in {directory.name!r}; choose another EMBED_MODEL"
        )
    return sorted([*files, *pickled])


def hash_weights(directory: Path, allow_pickled: bool = False) -> str:
    """Hash over the names and contents of all weights."""
    return hash_parts(
        part
        for file in weight_files(directory, allow_pickled)
        for part in (str(file.relative_to(directory)), file_sha256(file))
    )


def file_sha256(path: Path, cached: bool = True) -> str:
    """sha256 hex of a file. With `cached`, a known hash is reused while path, size, times and inode are the same."""
    stat = path.stat()
    key = hash_parts(
        (str(path.resolve()), *(str(v) for v in (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)))
    )
    if cached and (known := user_cache.read("sha256", key)) is not None:
        return known
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    user_cache.write("sha256", key, digest)
    return digest


def tokenizer_file(directory: Path) -> Path:
    """Path of the ``tokenizer.json`` of the model's first module. Raises ``ModelError`` when it has none."""
    modules = _read_json_list(directory / "modules.json")
    first = directory / str(modules[0].get("path", "")) if modules else directory
    for path in (first / "tokenizer.json", directory / "tokenizer.json"):
        if path.is_file():
            return path
    raise ModelError(f"the model in {directory.name!r} has no tokenizer.json; save it with a fast tokenizer")


def hash_tokenizer(directory: Path) -> str:
    """Hash of the tokenizer, except for truncation and padding, which the engine sets.

    Raises ``ModelError`` when there is no valid ``tokenizer.json``.
    """
    try:
        description = json.loads(tokenizer_file(directory).read_text("utf-8"))
    except ValueError as error:
        raise ModelError(
            f"the tokenizer.json in {directory.name!r} is not valid JSON: {error}; save the model again"
        ) from error
    description.pop("truncation", None)
    description.pop("padding", None)
    return hash_parts((json.dumps(description, sort_keys=True),))


def hash_modules(directory: Path, with_code: bool) -> str:
    """Hash over the modules' configurations, without keys that change no vector, and with code if `with_code`."""
    files = sorted({file for pattern in _CONFIGS for file in directory.glob(pattern)})
    parts: list[str] = []
    for file in files:
        value = json.loads(file.read_text("utf-8"))
        if isinstance(value, dict):
            value = {k: v for k, v in value.items() if k not in _IRRELEVANT_CONFIG}
        parts += [str(file.relative_to(directory)), json.dumps(value, sort_keys=True)]
    for file in sorted(directory.rglob("*.py")) if with_code else []:
        parts += [str(file.relative_to(directory)), file.read_text("utf-8")]
    return hash_parts(parts)


def max_seq_length_of(directory: Path) -> int:
    """The maximum length in tokens that SentenceTransformer will report once the model is loaded.

    Follows base/modules/transformer.py of sentence-transformers 6. Raises ``ModelError`` when no file states one.
    """
    root = tokenizer_file(directory).parent
    for file in sorted(root.glob("sentence_*_config.json")):
        if (stated := read_json(file).get("max_seq_length")) is not None:
            return int(stated)
    limits = [
        read_json(root / "tokenizer_config.json").get("model_max_length"),
        read_json(root / "config.json").get("max_position_embeddings"),
    ]
    # transformers writes 1e30 where a tokenizer has no limit.
    known = [int(limit) for limit in limits if limit is not None and 0 < float(limit) < 1e9]
    if not known:
        raise ModelError(
            f"the model in {directory.name!r} states no maximum length; "
            "set max_seq_length in its sentence_bert_config.json"
        )
    return min(known)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty when there is no file or no object. Raises ``ModelError`` for invalid JSON."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ModelError(f"{path.name!r} of the model is not valid JSON: {error}; save the model again") from error
    return value if isinstance(value, dict) else {}


def _read_json_list(path: Path) -> list[dict[str, Any]]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return []
    return [v for v in value if isinstance(v, dict)] if isinstance(value, list) else []
