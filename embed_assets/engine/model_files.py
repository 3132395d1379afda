"""What a model's files say of it, without loading it: hashes, prompts, maximum length."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from embed_assets.engine import remembered
from embed_assets.errors import ModelError
from embed_assets.records import hash_parts

WEIGHT_PATTERNS = ("*.safetensors", "*/*.safetensors")
_PICKLED = tuple(f"{folder}*.{ending}" for folder in ("", "*/") for ending in ("bin", "pt", "pth", "ckpt", "pkl"))
_NO_WEIGHTS = frozenset({"training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"})
"""What training leaves behind; nothing loads it."""
_CONFIGS = (
    "modules.json",
    "config.json",
    "sentence_*_config.json",
    "*_Pooling/*.json",
    "*_*/config.json",
    "[0-9]*/*.json",
)
_IRRELEVANT_CONFIG = frozenset(
    {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "__version__", "use_cache"}
)


def weight_files(directory: Path, allow_pickled: bool = False) -> list[Path]:
    """All files of weights, sorted: safetensors, and pickled ones where a module has no others and they are allowed.

    Raises ``ModelError`` when there are none, or pickled ones that are not allowed: loading them can run code.
    """
    files = {file for pattern in WEIGHT_PATTERNS for file in directory.glob(pattern)}
    safe = {file.parent for file in files}
    modules = {directory, *(directory / str(m.get("path", "")) for m in _read_json_list(directory / "modules.json"))}
    found = (f for pattern in _PICKLED for f in directory.glob(pattern) if f.parent in modules - safe)
    pickled = sorted(f for f in found if f.name not in _NO_WEIGHTS)
    if pickled and not allow_pickled:
        raise ModelError(
            f"a model needs weights as .safetensors, {str(pickled[0].relative_to(directory))!r} in {directory.name!r} "
            "could run code when loaded; convert it, choose another EMBED_MODEL, or, if you trust who made it, set "
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
    """sha256 hex of a file, remembered between processes by its path, size, times and inode."""
    stat = path.stat()
    key = hash_parts(
        (str(path.resolve()), *(str(v) for v in (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)))
    )
    if cached and (known := remembered.recall("sha256", key)) is not None:
        return known
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    remembered.keep("sha256", key, digest)
    return digest


def tokenizer_file(directory: Path) -> Path:
    """The ``tokenizer.json`` of the model's first module. Raises ``ModelError`` when it has none."""
    modules = _read_json_list(directory / "modules.json")
    first = directory / str(modules[0].get("path", "")) if modules else directory
    for path in (first / "tokenizer.json", directory / "tokenizer.json"):
        if path.is_file():
            return path
    raise ModelError(f"the model in {directory.name!r} has no tokenizer.json; save it with a fast tokenizer")


def hash_tokenizer(directory: Path) -> str:
    """Hash of what the tokenizer does; its truncation and padding are set by the engine."""
    try:
        description = json.loads(tokenizer_file(directory).read_text("utf-8"))
    except ValueError as error:
        raise ModelError(
            f"the tokenizer.json in {directory.name!r} is no JSON: {error}; save the model again"
        ) from error
    description.pop("truncation", None)
    description.pop("padding", None)
    return hash_parts((json.dumps(description, sort_keys=True),))


def hash_modules(directory: Path, with_code: bool) -> str:
    """Hash of the modules and their configurations, without fields that name versions and places."""
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
    """What SentenceTransformer will report once loaded: base/modules/transformer.py of sentence-transformers 6."""
    root = tokenizer_file(directory).parent
    for file in sorted(root.glob("sentence_*_config.json")):
        if (stated := read_json(file).get("max_seq_length")) is not None:
            return int(stated)
    limits = [
        read_json(root / "tokenizer_config.json").get("model_max_length"),
        read_json(root / "config.json").get("max_position_embeddings"),
    ]
    known = [int(limit) for limit in limits if limit is not None and 0 < float(limit) < 1e9]
    if not known:
        raise ModelError(
            f"the model in {directory.name!r} states no maximum length; "
            "put max_seq_length into its sentence_bert_config.json"
        )
    return min(known)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty when there is no file. Raises ``ModelError`` for broken JSON."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ModelError(f"{path.name!r} of the model is no JSON: {error}; save the model again") from error
    return value if isinstance(value, dict) else {}


def _read_json_list(path: Path) -> list[dict[str, Any]]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return []
    return [v for v in value if isinstance(v, dict)] if isinstance(value, list) else []
