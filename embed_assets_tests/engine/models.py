"""Small models with random weights, saved by sentence-transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from embed_assets_tests.conftest import topic


def small_model(folder: Path, kind: str) -> Path:
    """A model of another architecture with random weights, saved by sentence-transformers."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import (
        BertConfig,
        BertModel,
        ModernBertConfig,
        ModernBertModel,
        MPNetConfig,
        MPNetModel,
        PreTrainedTokenizerFast,
        Qwen3Config,
        Qwen3Model,
        XLMRobertaConfig,
        XLMRobertaModel,
    )

    torch.manual_seed(0)
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        [topic("types")], trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, special_tokens=special)
    )
    raw.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    side = "left" if kind == "qwen3" else "right"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        model_max_length=64, padding_side=side,
    )  # fmt: skip
    sizes: dict[str, Any] = {
        "vocab_size": 600,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    if kind == "qwen3":
        model: Any = Qwen3Model(Qwen3Config(**sizes, num_key_value_heads=2, head_dim=8, max_position_embeddings=128))
    elif kind == "xlmr":
        model = XLMRobertaModel(
            XLMRobertaConfig(**sizes, max_position_embeddings=70, pad_token_id=1, type_vocab_size=1)
        )
    elif kind == "modernbert":
        # The attention window of 8 tokens is far shorter than the texts; every second layer attends to everything.
        model = ModernBertModel(
            ModernBertConfig(
                **sizes,
                max_position_embeddings=64,
                local_attention=8,
                global_attn_every_n_layers=2,
                pad_token_id=1,
                bos_token_id=0,
                eos_token_id=2,
                cls_token_id=0,
                sep_token_id=2,
            )
        )
    elif kind == "mpnet":
        model = MPNetModel(MPNetConfig(**sizes, max_position_embeddings=70, pad_token_id=1))
    else:
        model = BertModel(BertConfig(**sizes, max_position_embeddings=64, pad_token_id=1))
    base = folder / "base"
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    transformer = Transformer(str(base), max_seq_length=48)
    mode = {"qwen3": "lasttoken", "xlmr": "cls"}.get(kind, "mean")
    modules: list[Any] = [transformer, Pooling(32, pooling_mode=mode)]
    if kind == "bert":
        modules += [Dense(32, 24), Normalize()]
    made = SentenceTransformer(modules=modules, prompts={"document": "passage: ", "query": "query: "}, device="cpu")
    made.save(str(folder / "model"))
    return folder / "model"
