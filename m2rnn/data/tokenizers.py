"""Tokenizers: bytes, byte-level BPE trained here, or any of Hugging Face; as transformers saves and loads them.

Only what makes or loads one imports transformers; the processes that encode text need its ``tokenizer.json`` alone.
"""

import hashlib
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from m2rnn.data.sources import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILE = "tokenizer.json"
# UTF-8 never contains these three bytes, so that all ids fit into one byte.
PAD, BOS, EOS = 0xFD, 0xFE, 0xFF
SPECIAL = {"pad_token": "<|pad|>", "bos_token": "<|bos|>", "eos_token": "<|eos|>"}
MAX_LENGTH = 10**9  # transformers warns of longer texts, and a recurrent model has no limit


def byte_tokenizer() -> "PreTrainedTokenizerBase":
    """A tokenizer whose 256 ids are the bytes of UTF-8; the bytes 253, 254 and 255, which UTF-8 never uses, are
    pad, bos and eos."""
    from tokenizers import Tokenizer, models

    vocabulary = {character: byte for byte, character in _byte_characters().items() if byte not in (PAD, BOS, EOS)}
    vocabulary |= {SPECIAL["pad_token"]: PAD, SPECIAL["bos_token"]: BOS, SPECIAL["eos_token"]: EOS}
    return _finished(Tokenizer(models.BPE(vocabulary, [])), use_regex=False)


def train_bpe(texts: Iterable[str], vocab_size: int) -> "PreTrainedTokenizerBase":
    """A byte-level BPE of ``vocab_size`` ids, trained on ``texts``: 0, 1 and 2 are pad, bos and eos.

    Raises:
        DataError: if ``vocab_size`` cannot hold the 256 bytes and the special ids.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    smallest = 256 + len(SPECIAL)
    if vocab_size < smallest:
        raise DataError(f"vocab_size {vocab_size}: expected at least {smallest}, the bytes and {len(SPECIAL)} more")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=list(_byte_characters().values()),
        show_progress=False,
    )
    _interruptible(lambda texts: bpe.train_from_iterator(texts, trainer), texts)
    return _finished(bpe, use_regex=True)


def _interruptible(work: Callable[[Iterator[str]], None], texts: Iterable[str]) -> None:
    """``work(texts)`` in another thread: `tokenizers` blocks its own, and Ctrl-C would wait until it is done."""
    failures: list[BaseException] = []
    stopped, was_read, ended = threading.Event(), threading.Event(), threading.Event()

    def until_stopped() -> Iterator[str]:
        for text in texts:
            if stopped.is_set():
                break
            yield text
        was_read.set()

    def run() -> None:
        try:
            work(until_stopped())
        except BaseException as error:
            failures.append(error)
        ended.set()

    try:
        threading.Thread(target=run, daemon=True).start()
        while not ended.wait(0.1):  # not for good: a signal just before the wait does not end it
            pass
    except KeyboardInterrupt:
        # A thread that calls Python at exit is ended inside of Rust, which aborts the process: let it read no more,
        # and wait a little for the end of a short training. A long one is in Rust alone.
        stopped.set()
        while not was_read.is_set() and not ended.wait(0.01):
            pass
        ended.wait(0.5)
        raise
    if failures:
        raise failures[0]


def _finished(model: "Tokenizer", use_regex: bool) -> "PreTrainedTokenizerBase":
    """Bytes in, bytes out and the special tokens, around the model; as transformers wants it."""
    from tokenizers import decoders, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    model.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=model, model_max_length=MAX_LENGTH, clean_up_tokenization_spaces=False, **SPECIAL
    )


def _byte_characters() -> dict[int, str]:
    """The character that byte-level tokenizers write for each byte: itself if printable, else one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def load_tokenizer(name: str | Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a folder, of a ``tokenizer.json``, or of a name on the Hugging Face Hub.

    Raises:
        DataError: if there is none, or none that the `tokenizers` library can run.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = Path(name)
    tokenizer: PreTrainedTokenizerBase
    try:
        if path.is_file():
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path))
        else:
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # each kind of tokenizer has its own
        reason = str(error).strip().partition("\n")[0]
        raise DataError(
            f"tokenizer {str(name)!r}: {reason or type(error).__name__}. Expected 'bytes', 'train-bpe', a folder "
            "with a tokenizer, a tokenizer.json, or a name on the Hugging Face Hub that is downloaded or reachable"
        ) from error
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"tokenizer {str(name)!r} is a {type(tokenizer).__name__}, which has no tokenizer.json; convert it to one"
        )
    return tokenizer


def save_tokenizer(tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """``save_pretrained``, whose errors of the disk are OSError: those of `tokenizers` are bare Exceptions."""
    try:
        tokenizer.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"cannot write the tokenizer to {folder}: {error}") from error


def adds_bos(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the tokenizer itself begins a text with bos."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def set_bos(tokenizer: "PreTrainedTokenizerBase", wanted: bool) -> None:
    """Let the tokenizer itself begin texts with bos, or not, as the text was prepared that a model learns from.

    Raises:
        DataError: if it has no bos, or adds it in a way that cannot be changed.
    """
    from tokenizers import Tokenizer, processors

    if adds_bos(tokenizer) == wanted:
        return
    backend, bos = tokenizer.backend_tokenizer, tokenizer.bos_token
    if wanted:
        if bos is None:
            raise DataError("the tokenizer has no bos token to begin documents with")
        template = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", "$B:1"], special_tokens=[(bos, tokenizer.bos_token_id)]
        )
        before = backend.post_processor
        backend.post_processor = template if before is None else processors.Sequence([before, template])
    else:
        content = json.loads(backend.to_str())
        for part in (content["post_processor"], *content["post_processor"].get("processors", ())):
            for name in {"single", "pair"} & part.keys() if part["type"] == "TemplateProcessing" else ():
                part[name] = [piece for piece in part[name] if piece.get("SpecialToken", {}).get("id") != bos]
        backend.post_processor = Tokenizer.from_str(json.dumps(content)).post_processor
    if getattr(tokenizer, "_add_bos_token", wanted) != wanted:  # transformers makes its template of this when it loads
        tokenizer._add_bos_token = wanted
    if "add_bos_token" in tokenizer.init_kwargs:
        tokenizer.init_kwargs["add_bos_token"] = wanted
    if adds_bos(tokenizer) != wanted:
        raise DataError(f"the tokenizer {'adds no' if wanted else 'always adds'} bos: expected the other way round")


def tokenizer_hash(tokenizer: "PreTrainedTokenizerBase | Path | str", with_template: bool = False) -> str:
    """SHA-256 of what decides the ids of a text: ``tokenizer.json`` less its padding, truncation and template.

    ``tokenizer`` may also be the folder that holds the file. Two tokenizers with the same hash give the same ids, but
    for those that a template puts around a text. Manifests of earlier versions have the hash ``with_template``.

    Raises:
        DataError: if the file is no JSON.
    """
    if isinstance(tokenizer, (str, Path)):
        path = Path(tokenizer) / TOKENIZER_FILE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{path} is damaged ({error})") from None
    else:
        content = json.loads(tokenizer.backend_tokenizer.to_str())
    content = {key: value for key, value in content.items() if key not in ("padding", "truncation")}
    if not with_template:
        content["post_processor"] = None
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def vocab_size_of(tokenizer: "PreTrainedTokenizerBase") -> int:
    """All ids are below it: more than there are if numbers are left out."""
    return max(tokenizer.get_vocab().values()) + 1


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest unsigned type for ids below ``vocab_size``, little-endian."""
    return np.dtype("u1" if vocab_size <= 2**8 else "<u2" if vocab_size <= 2**16 else "<u4")


Encode = Callable[[Sequence[str]], Iterator[NDArray[Any]]]


def encoder(folder: Path, is_bytes: bool, dtype: np.dtype[Any]) -> Encode:
    """A function from texts to the ids of each, by the tokenizer in ``folder``.

    Text that looks like a special token is text: ``<|eos|>`` in a document does not end it.
    """
    if is_bytes:
        return lambda texts: (np.frombuffer(text.encode(), dtype) for text in texts)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return lambda texts: (
        np.array(encoding.ids, dtype) for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    )
