"""Folders with tiny models, tokenizers and text."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from m2rnn.data.tokenizers import byte_tokenizer, train_bpe
from tests.models.small import make

TEXTS = [
    "one two three, one two three",
    "",
    "ünï cødé 漢字 🎉 and 漢字",
    "x",
    "a document with <|eos|> in it",
    "yx" * 20,
]


def save(
    folder: Path, model: str | PreTrainedModel = "hybrid", tokenizer: str | None = "bytes", **overrides: Any
) -> Path:
    """A model of ``tests.models.small`` for bytes, or another one, with a tokenizer."""
    if isinstance(model, str):
        special = {"pad_token_id": 0xFD, "bos_token_id": 0xFE, "eos_token_id": 0xFF}
        model = make(model, **{"vocab_size": 300} | special | overrides)
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer_of(tokenizer).save_pretrained(folder)
    return folder


def tokenizer_of(name: str) -> PreTrainedTokenizerBase:
    return byte_tokenizer() if name == "bytes" else train_bpe(TEXTS, 290)


def write_texts(path: Path, texts: Sequence[str] = TEXTS) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def byte_documents(texts: Sequence[str] = TEXTS) -> list[list[int]]:
    """The ids of each document under the byte tokenizer, written down from its definition."""
    return [[*text.encode(), 0xFF] for text in texts if text]


@torch.no_grad()
def naive_loss(model: PreTrainedModel, ids: Sequence[int]) -> float:
    """-log p(last id | the others), by the definition in float64, one forward pass for one number."""
    logits = model(input_ids=torch.tensor([ids[:-1]]), use_cache=False).logits[0, -1].double().numpy()
    return float(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[ids[-1]])
