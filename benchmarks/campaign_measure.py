"""What a run of a campaign is measured by, once it is trained."""

import base64
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from m2rnn.evaluation import windows as layout
from m2rnn.evaluation.language_model import LanguageModel, load_model
from m2rnn.evaluation.losses import losses_and_states, losses_of
from m2rnn.evaluation.recall import attention_off, copying, is_hybrid, repeated, split_losses, text_ids
from m2rnn.evaluation.spectra import recurrent_layers, spectra
from m2rnn.evaluation.text import Text, from_token_folder
from m2rnn.layers import M2RNN, Attention
from m2rnn.layers.state_weight import bound_state_weights
from m2rnn.training.train_settings import TrainSettings

READ_AT_ONCE = 2**17  # tokens
BUCKETS = 4  # of a training length
NGRAM = 3


def evaluate(
    folder: Path, tokens: Path, settings: TrainSettings, options: Mapping[str, Any], device: str
) -> dict[str, Any]:
    """All measurements of the model in ``folder``, for JSON.

    Args:
        options: ``beyond``, how many training lengths; ``cuts`` and ``windows``: what else the loss by position is
            measured with, W's singular values cut after training, and attention that sees so many tokens.
    """
    context, beyond = settings.context, options.get("beyond", 16)
    # As in training: weights, decays among them, stay float32.
    precision = torch.autocast("cuda", torch.bfloat16) if device == "cuda" else nullcontext()
    text = from_token_folder(tokens, "valid")
    long = layout.whole(text.ends, context * beyond)
    short = layout.sliding(text.ends, context, context // 2)
    with precision, torch.inference_mode():
        model = load_model(folder, device)
        losses = losses_of(model, text, short, batch=max(1, READ_AT_ONCE // context), segment=None)
        again = repeated(text.tokens, text.ends, NGRAM)
        found: dict[str, Any] = {
            "valid": whole(losses, text) | split_losses(losses, again),
            "positions": by_position(model, text, long, context, beyond),
            "spectra": spectra(model.model),
            "copying": copies(model, text, context),
            "attention_off": None,
            "variants": {},
        }
        if is_hybrid(model.model):
            with attention_off(model.model):
                off = losses_of(model, text, short, batch=max(1, READ_AT_ONCE // context), segment=None)
            found["attention_off"] = whole(off, text)["loss"]
        for name, changed in variants(model.model, options):
            with changed:
                at_1x = losses_of(model, text, short, batch=max(1, READ_AT_ONCE // context), segment=None)
                found["variants"][name] = {
                    "loss": whole(at_1x, text)["loss"],
                    "positions": by_position(model, text, long, context, beyond, states=False),
                }
    return found


def whole(losses: np.ndarray, text: Text) -> dict[str, Any]:
    """The loss over all tokens, in bits per byte, and the sum of each document."""
    scored = np.where(losses >= 0, losses, 0).astype(np.float64)
    counts = np.add.reduceat(losses >= 0, text.starts)
    sums = np.add.reduceat(scored, text.starts)
    of_text = text.is_text(text.tokens) & (losses >= 0)
    return {
        "loss": float(sums.sum() / counts.sum()),
        "bits_per_byte": float(scored[of_text].sum() / np.log(2) / text.bytes_after_first()),
        "documents": {"tokens": pack(counts), "loss": pack(sums / np.maximum(counts, 1))},
    }


def by_position(
    model: LanguageModel, text: Text, windows: layout.Windows, context: int, beyond: int, states: bool = True
) -> dict[str, Any]:
    """Mean loss by training lengths seen, over the same documents; with the RMS of each layer's state after them."""
    length, batch = context * beyond, max(1, READ_AT_ONCE // (context * beyond))
    layers = recurrent_layers(model.model) if states else {}
    found: dict[str, Any] = {}
    if layers:
        ends = [context * n for n in range(1, beyond + 1)]
        losses, rms = losses_and_states(model, text, windows, ends, batch=batch, segment=None)
        found["state_rms"] = {"layers": list(layers), "rms": pack(rms.mean(0).flatten())}
    else:
        losses = losses_of(model, text, windows, batch=batch, segment=None)
    table = np.stack([losses[first : first + length] for first in windows.first]).astype(np.float64)
    parts = table.reshape(len(table), beyond, context).mean(2)
    buckets = table.mean(0).reshape(beyond * BUCKETS, -1).mean(1)
    return {
        "windows": len(table),
        "multiples": parts.mean(0).tolist(),
        "documents": pack(parts.flatten()),
        "buckets": pack(buckets),
        **found,
    }


def copies(model: LanguageModel, text: Text, context: int) -> dict[str, float]:
    """Loss and accuracy on the second copy of half a context of random tokens."""
    found = copying(model, text_ids(text), context // 2)
    return {"loss": float(found.losses.mean()), "accuracy": float(found.right.mean())}


def variants(model: nn.Module, options: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Changes of the trained model that need no training, each a context in which it holds."""
    largest = max((row["largest_singular_value"] for row in spectra(model)), default=0.0)
    for cut in options.get("cuts", ()):
        if cut < largest:
            yield f"cut {cut:g}", cut_weights(model, cut)
    if any(isinstance(module, Attention) for module in model.modules()):
        for window in options.get("windows", ()):
            yield f"window {window}", attention_window(model, window)


@contextmanager
def cut_weights(model: nn.Module, bound: float) -> Iterator[None]:
    layers = [module for module in model.modules() if isinstance(module, M2RNN)]
    kept = [layer.state_weight.detach().clone() for layer in layers]
    bound_state_weights(model, bound)
    yield
    for layer, weight in zip(layers, kept, strict=True):
        layer.state_weight.copy_(weight)


@contextmanager
def attention_window(model: nn.Module, window: int) -> Iterator[None]:
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    kept = [layer.window for layer in layers]
    for layer in layers:
        layer.window = window
    yield
    for layer, before in zip(layers, kept, strict=True):
        layer.window = before


def pack(values: Sequence[float] | np.ndarray) -> str:
    """Numbers as text, float32: zlib and base 64."""
    return base64.b64encode(zlib.compress(np.asarray(values, "<f4").tobytes(), 9)).decode()


def unpack(text: str) -> np.ndarray:
    """The numbers of ``pack``, float64."""
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), "<f4").astype(np.float64)
