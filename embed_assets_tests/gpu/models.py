"""Models with random weights in the shapes of well-known ones, and texts of known length, made on the spot."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's architecture and size."""

    architecture: str
    """Prefix of transformers' classes, as in "Bert"."""
    hidden: int
    layers: int
    heads: int
    intermediate: int
    pooling: str
    key_value_heads: int = 0
    """0: as many as heads."""
    max_length: int = 512


SHAPES = {
    "minilm": Shape("Bert", 384, 6, 12, 1536, "mean"),
    "bge-base": Shape("Bert", 768, 12, 12, 3072, "cls"),
    "bge-large": Shape("Bert", 1024, 24, 16, 4096, "cls"),
    "xlmr": Shape("XLMRoberta", 768, 12, 12, 3072, "mean"),
    "mpnet": Shape("MPNet", 768, 12, 12, 3072, "mean"),
    "modernbert": Shape("ModernBert", 768, 22, 12, 1152, "cls"),
    "qwen3": Shape("Qwen3", 1024, 28, 16, 3072, "lasttoken", key_value_heads=8),
}
_SMALL = {
    name: Shape(s.architecture, 64, 2, 4, 128, s.pooling, 2 * (s.key_value_heads > 0), 64) for name, s in SHAPES.items()
}
_VOCABULARY = 4000


def shape_of(name: str, is_small: bool) -> Shape:
    """The shape of a model; a tiny one of the same architecture if `is_small`."""
    return (_SMALL if is_small else SHAPES)[name]


def build_model(name: str, folder: Path, is_small: bool) -> Path:
    """A folder with the model, in the format of sentence-transformers."""
    import torch
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    target = folder / name
    if target.exists():
        return target
    shape = shape_of(name, is_small)
    torch.manual_seed(0)
    config = getattr(transformers, f"{shape.architecture}Config")(**_config(shape))
    getattr(transformers, f"{shape.architecture}Model")(config).save_pretrained(target)
    inputs = ["input_ids", "attention_mask"]
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=_tokenizer(), pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        model_max_length=shape.max_length, model_input_names=inputs,
        padding_side="left" if name == "qwen3" else "right",
    ).save_pretrained(target)  # fmt: skip
    modules = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(modules)
    ]
    pooling = {"word_embedding_dimension": shape.hidden, "pooling_mode_cls_token": shape.pooling == "cls"}
    pooling |= {
        "pooling_mode_mean_tokens": shape.pooling == "mean",
        "pooling_mode_lasttoken": shape.pooling == "lasttoken",
    }
    (target / "modules.json").write_text(json.dumps(listed))
    (target / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": shape.max_length}))
    (target / "1_Pooling").mkdir()
    (target / "1_Pooling/config.json").write_text(json.dumps(pooling))
    return target


def _config(shape: Shape) -> dict[str, Any]:
    common = {
        "vocab_size": _VOCABULARY,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.intermediate,
        "initializer_range": 0.04,  # twice the usual: vectors of random weights then differ more
        "pad_token_id": 1,
        "max_position_embeddings": shape.max_length + 2,
    }
    more: dict[str, dict[str, Any]] = {
        "XLMRoberta": {"type_vocab_size": 1},
        "ModernBert": {"bos_token_id": 0, "eos_token_id": 2, "cls_token_id": 0, "sep_token_id": 2},
        "Qwen3": {
            "num_key_value_heads": shape.key_value_heads,
            "head_dim": shape.hidden // shape.heads,
            "eos_token_id": 2,
        },
    }
    return common | more.get(shape.architecture, {})


@cache
def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.train_from_iterator(
        list(topics.values()),
        trainers.BpeTrainer(
            vocab_size=_VOCABULARY,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
            show_progress=False,
        ),
    )
    raw.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    return raw


def texts_of(kind: str, count: int, max_length: int, seed: int = 0) -> list[str]:
    """Real texts of so many tokens ("512", "128"), or of lengths as chunks have them ("mixed"; mean about 180)."""
    text = "\n\n".join(topics.values())
    offsets = _tokenizer().encode(text, add_special_tokens=False).offsets
    random = np.random.default_rng(seed)
    most = max_length - 2
    if kind == "mixed":
        lengths = np.clip(np.exp(random.normal(5.0, 0.7, count)), 8, most).astype(int)
    else:
        lengths = np.full(count, min(int(kind) - 2, most))
    first = random.integers(0, len(offsets) - most - 1, count)
    return [text[offsets[i][0] : offsets[i + n - 1][1]] for i, n in zip(first.tolist(), lengths.tolist(), strict=True)]
