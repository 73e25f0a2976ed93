"""``m2rnn eval text``: how well language models predict text, by context length and by position.

Every loss of a token is kept in a file of its own place, so that an interrupted run goes on where it stopped and the
results are sums in a fixed order, whatever the batches were.
"""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from m2rnn.data.sources import Files, Reading, find_source
from m2rnn.data.token_files import TokenDataset, read_manifest
from m2rnn.evaluation import text as texts
from m2rnn.evaluation import windows as layout
from m2rnn.evaluation.language_model import (
    LanguageModel,
    check_segments,
    fingerprint,
    load_model,
    load_model_tokenizer,
)
from m2rnn.evaluation.losses import PENDING, fill_in, losses_by_window
from m2rnn.evaluation.perplexity_report import PLOTS, write_plots
from m2rnn.evaluation.recall import attention_off, copying, is_hybrid, repeated, split_losses, text_ids
from m2rnn.evaluation.spectra import recurrent_layers, spectra, summary_of_states
from m2rnn.evaluation.text import Text
from m2rnn.evaluation.windows import Windows
from m2rnn.runs.display import Display
from m2rnn.runs.errors import check_sizes
from m2rnn.runs.folder import RESULTS, run_folder, to_json, write_whole_file
from m2rnn.runs.machine import check_device, hardware, versions
from m2rnn.runs.models import check_model_folders, results_file, short_names

LOSSES, STATES = "losses", "states"
POSITION_BUCKETS = 8  # of one training length

Results = dict[str, Any]
Kept: TypeAlias = np.memmap[Any, np.dtype[np.float32]]  # numbers that a file keeps


@dataclass(frozen=True)
class PerplexitySettings:
    """What decides the results, besides the models and the text.

    Attributes:
        contexts: tokens that a prediction may see at most; None for the whole document.
        windows: ``"sliding"``, one every ``stride`` tokens of a document, or ``"packed"``, all documents end to end
            and cut, as in training.
        stride: of sliding windows; default half the context. a whole document is one window.
        train_length: longest sequence in training; with ``beyond``, the loss by position up to their product.
        beyond: how many times the training length.
        split: of a folder of token files; default validation, else test, else training text.
        documents: only the first so many.
        joined: take all documents as one.
        reading: how to find documents in files.
        dtype: of the weights, or ``"auto"``.
        device: ``"cpu"`` or ``"cuda"``.
        batch: windows at a time; None for as many as `TOKENS_PER_BATCH` tokens make.
        segment: longer windows are read so many tokens at a time, carrying the state; None for none.
        recall: split the losses into tokens that repeat an earlier n-gram of their document and others, and measure
            copying and, in hybrids, what attention adds; see `m2rnn.evaluation.recall`.
        recall_ngram: n, the tokens before a repeated one.

    Raises:
        ValueError: for a value that cannot be.
    """

    contexts: tuple[int | None, ...] = (1024,)
    windows: Literal["sliding", "packed"] = "sliding"
    stride: int | None = None
    train_length: int | None = None
    beyond: int = 8
    split: str | None = None
    documents: int | None = None
    joined: bool = False
    reading: Reading = field(default_factory=Reading)
    dtype: str = "auto"
    device: str = "cpu"
    batch: int | None = None
    segment: int | None = 8192
    recall: bool = False
    recall_ngram: int = 3

    def __post_init__(self) -> None:
        check_sizes(vars(self))
        given = [context for context in self.contexts if context is not None]
        if not self.contexts or len(set(self.contexts)) < len(self.contexts) or min(given, default=2) < 2:
            raise ValueError(f"context {_listed(self.contexts)}: expected different numbers from 2 on, or full")
        if self.windows not in ("sliding", "packed"):
            raise ValueError(f"windows {self.windows!r}: expected sliding or packed")
        if self.windows == "packed" and (self.stride is not None or None in self.contexts):
            raise ValueError("packed windows have neither a stride nor the context full: use sliding windows")
        if self.stride is not None and not 1 <= self.stride <= min(given, default=self.stride):
            raise ValueError(f"stride {self.stride}: expected 1 to the shortest context, {min(given, default=1)}")
        for name in ("train_length", "documents", "batch", "beyond", "segment", "recall_ngram"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} {value}: expected at least 1")

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def identity(self) -> dict[str, Any]:
        """What an interrupted run must go on with: memory may be saved differently."""
        return {name: value for name, value in self.as_json().items() if name not in ("batch", "segment")}


def _listed(contexts: Sequence[int | None]) -> str:
    return ",".join("full" if context is None else str(context) for context in contexts) or "''"


@dataclass(frozen=True)
class Measurement:
    """One pass over the text: a name for its file, the context and stride it is to report, and its windows."""

    name: str
    context: int | None
    stride: int | None
    windows: Windows

    @property
    def by_position(self) -> bool:
        return self.name.startswith("positions")


def measurements(text: Text, settings: PerplexitySettings) -> list[Measurement]:
    """Which windows to score.

    Raises:
        ValueError: if no token can be predicted, or no document is long enough for the loss by position.
    """
    found = []
    for context in settings.contexts:
        length = text.longest if context is None else context
        if settings.windows == "packed":
            windows, stride, name = layout.packed(text.ends, length), None, f"packed-{length}"
        else:
            stride = length if context is None else settings.stride or max(1, length // 2)
            windows = layout.sliding(text.ends, length, stride)
            name = f"sliding-{'full' if context is None else context}-{stride}"
        found.append(Measurement(name, context, stride, windows))
    if not len(found[0].windows):
        raise ValueError("every document has one token only: there is nothing to predict")
    if settings.train_length is not None:
        length = settings.train_length * settings.beyond
        windows = layout.whole(text.ends, length)
        if not len(windows):
            raise ValueError(
                f"no document has the {length + 1:,} tokens that the loss by position up to {settings.beyond} × "
                f"{settings.train_length:,} needs (the longest: {text.longest:,}): choose less, or join the documents"
            )
        found.append(Measurement(f"positions-{length}", length, length, windows))
    return found


def evaluate_perplexity(
    folders: Sequence[Path],
    data: str,
    settings: PerplexitySettings,
    out: Path,
    *,
    overwrite: bool = False,
    display: Display | None = None,
) -> Results:
    """Score each model on the text, and write ``results.json``, plots and every token's loss into ``out``.

    Run again, it goes on where it stopped; finished, it only reads the results. In ``losses/`` there is one file a
    model and measurement: little-endian float32, one number a token of the text, in order; -1 where the token is not
    scored. In ``states/`` there is one file a model with recurrent layers, if the loss by position is measured:
    float32 ``[windows, multiples of the training length, recurrent layers]``, see `state_rms`.

    Raises:
        ValueError: for what a user can get wrong: models, tokenizers, text, lengths.
        RunFolderError: if ``out`` belongs to another run.
    """
    display = display or Display()
    check_device(settings.device)
    if find_spec("matplotlib") is None:
        raise ValueError("the plots need matplotlib: pip install 'm2rnn[plot]'")
    check_model_folders(folders)
    names = short_names(folders)
    described = {
        **settings.identity(),
        "data": str(Path(data).resolve()) if Path(data).exists() else data,
        "text": _text_version(data, settings),
        "models": {name: [str(f.resolve()), fingerprint(f)] for name, f in zip(names, folders, strict=True)},
    }
    with run_folder(out, described, overwrite, (LOSSES, STATES, RESULTS, *PLOTS)):
        if (out / RESULTS).exists():
            return _read(out)
        results: Results = {"settings": {**settings.as_json(), **described}, "models": {}}
        for name, folder in zip(names, folders, strict=True):
            display.say(f"{name}: loading")
            results["models"][name] = _evaluate_model(name, folder, data, settings, out, display)
        results["versions"] = versions(("m2rnn", "torch", "transformers", "tokenizers", "numpy"))
        results["hardware"] = hardware(settings.device)
        write_plots(out, results)
        write_whole_file(out / RESULTS, to_json(results))
        return _read(out)


def _read(out: Path) -> Results:
    results: Results = json.loads((out / RESULTS).read_text(encoding="utf-8"))
    return results


def _text_version(data: str, settings: PerplexitySettings) -> Any:
    """What changes when the text does."""
    if texts.is_token_folder(Path(data)):
        return read_manifest(data)["splits"]
    if settings.split is not None:
        raise ValueError(f"split {settings.split!r}: {data} is no folder of token files, which alone have splits")
    found = find_source(data, settings.reading)
    if not isinstance(found, Files):
        raise ValueError(f"{data}: no such file or folder")
    return {str(path): [path.stat().st_size, path.stat().st_mtime_ns] for path in found.paths}


def _evaluate_model(
    name: str, folder: Path, data: str, settings: PerplexitySettings, out: Path, display: Display
) -> Results:
    model = load_model(folder, settings.device, settings.dtype)
    text = load_text(folder, model.vocab_size, data, settings, display)
    planned = measurements(text, settings)
    longest = max(int((each.windows.stop - each.windows.start).max()) for each in planned) - 1
    model.check_length(longest)
    if _segment(settings, longest) is not None:
        check_segments(model)
    found: Results = {
        "folder": str(folder),
        "parameters": model.parameters,
        "dtype": str(next(model.model.parameters()).dtype).removeprefix("torch."),
        "text": {
            "documents": len(text.ends),
            "tokens": len(text.tokens),
            "longest_document": text.longest,
            "bytes": text.num_bytes,
            "bytes_scored": text.bytes_after_first(),
        },
        "contexts": [],
        "positions": None,
        "spectra": [],
        "state_rms": [],
        "recall": None,
    }
    layers = recurrent_layers(model.model)
    again = repeated(text.tokens, text.ends, settings.recall_ngram) if settings.recall else None
    for folder_name in (LOSSES, *([STATES] if layers and settings.train_length is not None else ())):
        (out / folder_name).mkdir(exist_ok=True)

    def measure(
        each: Measurement, suffix: str = "", states: Kept | None = None, positions: Sequence[int] = ()
    ) -> tuple[NDArray[np.float32], float, int]:
        path = results_file(out / LOSSES, name, f".{each.name}{suffix}.f32")
        title = f"{name}, {each.name}{suffix}"
        return score(model, text, each.windows, path, settings, title, display, states, positions)

    for each in planned:
        if each.by_position:
            assert settings.train_length is not None
            multiples = [settings.train_length * (n + 1) for n in range(settings.beyond)]
            states = None
            if layers:
                shape = len(each.windows), len(multiples), len(layers)
                states = _kept(results_file(out / STATES, name, f".{each.name}.f32"), shape)
            losses, _, _ = measure(each, "", states, multiples if layers else ())
            found["positions"] = by_position(losses, each.windows, settings)
            found["spectra"] = spectra(model.model)
            if states is not None:
                found["state_rms"] = summary_of_states(states, layers, multiples)
            continue
        losses, seconds, tokens = measure(each)
        found["contexts"].append(
            {
                "windows": settings.windows,
                "context": each.context,
                "stride": each.stride,
                **summary(losses, text, each.windows),
                **({} if again is None else {"recall": split_losses(losses, again)}),
                "seconds": round(seconds, 2),
                "tokens_per_second": round(tokens / seconds) if tokens else None,
            }
        )
    if again is not None:
        first = planned[0]
        display.say(f"{name}: copying")
        found["recall"] = {
            "ngram": settings.recall_ngram,
            "copying": _copying(model, text, first.windows, settings),
            "attention_off": None,
        }
        if is_hybrid(model.model):
            with attention_off(model.model):
                losses, _, _ = measure(first, "-attention-off")
            of_all = summary(losses, text, first.windows)
            found["recall"]["attention_off"] = {
                **{key: of_all[key] for key in ("loss", "perplexity", "bits_per_byte")},
                **split_losses(losses, again),
            }
    return found


def _copying(model: LanguageModel, text: Text, windows: Windows, settings: PerplexitySettings) -> Results:
    """`copying` with sequences as long as the longest window, by eighths of a half."""
    length = max(1, (int((windows.stop - windows.start).max()) - 1) // 2)
    ids = text_ids(text)
    found = copying(model, ids, length, batch=settings.batch, segment=settings.segment)
    width = max(1, length // POSITION_BUCKETS)
    parts = [slice(start, min(start + width, length)) for start in range(0, length, width)]
    return {
        "length": length,
        "sequences": len(found.losses),
        "ids": len(ids),
        "loss": found.loss,
        "accuracy": found.accuracy,
        "buckets": [
            {
                "start": part.start,
                "stop": part.stop,
                "loss": float(found.losses[:, part].mean()),
                "accuracy": float(found.right[:, part].mean()),
            }
            for part in parts
        ],
    }


def load_text(
    folder: Path, vocab_size: int, data: str, settings: PerplexitySettings, display: Display | None = None
) -> Text:
    """The text as the model in ``folder`` reads it, checked against its tokenizer and vocabulary."""
    tokenizer = load_model_tokenizer(folder)
    if texts.is_token_folder(Path(data)):
        split = texts.choose_split(Path(data), settings.split)
        if tokenizer is not None:
            TokenDataset(data, split).check_tokenizer(tokenizer, f"the tokenizer of {folder}")
        text = texts.from_token_folder(Path(data), split)
    else:
        if tokenizer is None:
            raise ValueError(
                f"{folder} has no tokenizer: save it there (save_pretrained), or evaluate on a folder that m2rnn "
                "prepare made"
            )
        text = texts.from_files(data, settings.reading, tokenizer, (display or Display()).update)
    if text.vocab_size > vocab_size:
        raise ValueError(
            f"{folder} has a vocabulary of {vocab_size:,} ids, the tokenizer of {data} one of {text.vocab_size:,}: "
            "they do not belong together"
        )
    if settings.documents is not None:
        text = text.first(settings.documents)
    return text.joined() if settings.joined else text


def score(
    model: LanguageModel,
    text: Text,
    windows: Windows,
    path: Path,
    settings: PerplexitySettings,
    title: str,
    display: Display,
    states: Kept | None = None,
    positions: Sequence[int] = (),
) -> tuple[NDArray[np.float32], float, int]:
    """The loss of every token that the windows predict, in the file ``path``; tokens already there are not repeated.

    Args:
        states, positions: as of `fill_in`, which fills the former.

    Returns:
        The losses, the seconds it took and the tokens that were scored in them.
    """
    losses = _kept(path, (len(text.tokens),))
    began, scored = time.monotonic(), 0
    options = {"batch": settings.batch, "segment": settings.segment}
    for count, done in fill_in(model, text, windows, losses, states, positions, title=title, **options):
        scored += count
        seconds = time.monotonic() - began
        display.update(
            f"{title}: {done / windows.num_scored:.0%} of {windows.num_scored:,} tokens, {scored / seconds:,.0f}/s"
        )
    for numbers in (losses, states):
        if numbers is not None:
            numbers.flush()
    return losses, time.monotonic() - began, scored


def _kept(path: Path, shape: tuple[int, ...]) -> Kept:
    """The numbers in the file, `PENDING` where there is none yet."""
    if not path.exists() or path.stat().st_size != 4 * math.prod(shape):
        write_whole_file(path, np.full(shape, PENDING, "<f4").tobytes())
    return np.memmap(path, "<f4", mode="r+", shape=shape)


def _segment(settings: PerplexitySettings, length: int) -> int | None:
    return settings.segment if settings.segment is not None and length > settings.segment else None


def summary(losses: NDArray[np.float32], text: Text, windows: Windows) -> Results:
    """Mean loss, perplexity and bits per byte.

    Bits per byte leaves the ends of documents out, which stand for no byte, and the bytes of tokens that are not
    predicted, the first of each document.
    """
    firsts = np.zeros(len(text.tokens), bool)
    firsts[text.starts] = True
    scored = np.array(losses[~firsts], np.float64)
    assert len(scored) == windows.num_scored
    assert not (scored == PENDING).any()
    of_text = text.is_text(text.tokens[~firsts])
    loss, num_bytes = float(scored.mean()), text.bytes_after_first()
    return {
        "count": len(windows),
        "tokens_scored": len(scored),
        "tokens_read": windows.num_read,
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": float(scored[of_text].sum() / math.log(2) / num_bytes) if num_bytes else None,
    }


def by_position(losses: NDArray[np.float32], windows: Windows, settings: PerplexitySettings) -> Results:
    """Mean loss of predictions by how many tokens they saw, in parts of the training length."""
    assert settings.train_length is not None
    train_length, length = settings.train_length, settings.train_length * settings.beyond

    def means(width: int) -> list[Results]:
        table = losses_by_window(losses, windows, width)
        errors = table.std(0, ddof=1) / math.sqrt(len(table)) if len(table) > 1 else [None] * table.shape[1]
        return [
            {
                "start": n * width,
                "stop": min((n + 1) * width, length),
                "loss": float(loss),
                "standard_error": None if error is None else float(error),
            }
            for n, (loss, error) in enumerate(zip(table.mean(0), errors, strict=True))
        ]

    return {
        "train_length": train_length,
        "windows": len(windows),
        "multiples": means(train_length),
        "buckets": means(max(1, train_length // POSITION_BUCKETS)),
    }
