"""``m2rnn generate``: completions as text, one as it comes or many in batches, with their speed and memory."""

import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers import GenerationConfig, set_seed
from transformers.generation.streamers import BaseStreamer

from m2rnn.data.streams import why_not_utf8
from m2rnn.evaluation.language_model import LanguageModel
from m2rnn.models.cache import CACHE_NAME
from m2rnn.models.model import M2RNNForCausalLM
from m2rnn.runs.errors import check_sizes
from m2rnn.runs.folder import PARTIAL, force_to_disk

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Write = Callable[[str], object]

WINDOW, OVERLAP = 32, 8  # tokens that a stream decodes at least, and characters that are out already among their text
BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")  # how tokenizers with byte fallback name the token of a byte
UNREADABLE = "\N{REPLACEMENT CHARACTER}"
#: Of what a text ends in where transformers' ``clean_up_tokenization`` may take a space away once more is there
BEFORE_CLEANING = " 'nvr"


@dataclass(frozen=True)
class GenerationSettings:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: most tokens to make; eos ends a completion sooner unless ``ignore_eos``.
        temperature: divides the logits; 0 takes the most probable token always.
        top_k, top_p, min_p, repetition_penalty: as in transformers' ``GenerationConfig``; None for none.
        seed: of the sampling.
        ignore_eos: go on after eos.
        static: keep the state in place and decode in a CUDA graph; default for these models on a GPU.

    Raises:
        ValueError: for a value that cannot be.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int = 0
    ignore_eos: bool = False
    static: bool | None = None

    def __post_init__(self) -> None:
        check_sizes(vars(self))
        for name, fine, expected in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_k", self.top_k is None or self.top_k >= 1, "at least 1"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "more than 0 and at most 1"),
            ("min_p", self.min_p is None or 0 <= self.min_p <= 1, "0 to 1"),
            ("seed", 0 <= self.seed < 2**32, "0 to 2**32 - 1"),
            ("repetition_penalty", self.repetition_penalty is None or self.repetition_penalty > 0, "more than 0"),
        ):
            if not fine:
                raise ValueError(f"{name} {getattr(self, name)}: expected {expected}")

    def arguments(self, model: LanguageModel, tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
        """What ``model.generate`` takes for this."""
        static = self.static
        if static is None:
            static = model.model.device.type == "cuda" and isinstance(model.model, M2RNNForCausalLM)
        sampling = {
            "temperature": self.temperature,
            "top_k": self.top_k or 0,  # transformers' own default would be 50
            "top_p": self.top_p,
            "min_p": self.min_p,
        }
        return {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": self.temperature > 0,
            **(sampling if self.temperature > 0 else {}),
            "repetition_penalty": self.repetition_penalty,
            "eos_token_id": None if self.ignore_eos else tokenizer.eos_token_id,
            "pad_token_id": _padding(tokenizer),
            "cache_implementation": "static" if static else None,
        }


@dataclass(frozen=True)
class Completion:
    """A prompt and what the model made of it; ``new_tokens`` includes the eos that ended it."""

    prompt: str
    completion: str
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True)
class Speed:
    """Seconds until the first token and in all, and tokens made; ``first`` is None where it was not measured."""

    first: float | None
    total: float
    tokens: int

    def line(self) -> str:
        """For a user to read: tokens/s of what came after the first token, which also waits for the prompt."""
        if self.first is None:
            return f"{self.tokens:,} tokens in {self.total:.2f} s, {self.tokens / self.total:,.1f} tokens/s"
        rate = f", then {(self.tokens - 1) / (self.total - self.first):,.1f} tokens/s" if self.tokens > 1 else ""
        return f"{self.tokens:,} tokens in {self.total:.2f} s: the first after {self.first:.3f} s{rate}"


def complete(
    model: LanguageModel,
    tokenizer: "PreTrainedTokenizerBase",
    prompt: str,
    settings: GenerationSettings,
    write: Write = lambda text: None,
) -> tuple[Completion, Speed]:
    """Continue ``prompt``; ``write`` gets the completion in pieces, as they come.

    Raises:
        ValueError: for an empty prompt, if the tokenizer has neither bos nor eos to begin with.
    """
    ids = prompt_ids(tokenizer, prompt)
    _check_ids(model, ids)
    model.check_length(len(ids) + settings.max_new_tokens)
    stream = _Stream(tokenizer, ids, write)
    set_seed(settings.seed)
    began = time.monotonic()
    whole = torch.tensor([ids])
    _run(model, whole, torch.ones_like(whole), settings.arguments(model, tokenizer), stream)
    total = time.monotonic() - began
    assert stream.first is not None
    done = Completion(prompt, stream.text, len(ids), len(stream.ids))
    return done, Speed(stream.first - began, total, len(stream.ids))


def complete_all(
    model: LanguageModel,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str],
    settings: GenerationSettings,
    batch: int,
    out: Path,
    update: Callable[[str], None] = lambda text: None,
) -> tuple[int, Speed]:
    """Continue many prompts and write one JSON object a line to ``out``, in their order; whole or not at all.

    With temperature 0 the batch does not change the completions, but for rounding. Sampled ones depend on it.

    Returns:
        The tokens of the longest sequence, prompt and completion, and the speed.
    """
    if batch < 1:
        raise ValueError(f"batch {batch}: expected at least 1")
    if out.is_dir():
        raise ValueError(f"{out} is a folder: expected a file to write")
    encoded = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    for ids in encoded:
        _check_ids(model, ids)
    model.check_length(max(map(len, encoded)) + settings.max_new_tokens)
    set_seed(settings.seed)
    began, tokens, longest = time.monotonic(), 0, 0
    partial = out.with_name(out.name + PARTIAL)
    out.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("w", encoding="utf-8") as file:
        for start in range(0, len(prompts), batch):
            part = slice(start, start + batch)
            for prompt, ids, made in zip(
                prompts[part], encoded[part], _generate(model, tokenizer, encoded[part], settings), strict=True
            ):
                done = Completion(prompt, _continuation(tokenizer, ids, made), len(ids), len(made))
                file.write(json.dumps(asdict(done), ensure_ascii=False) + "\n")
                tokens += len(made)
                longest = max(longest, len(ids) + len(made))
            seconds = time.monotonic() - began
            update(
                f"{min(start + batch, len(prompts)):,} of {len(prompts):,} prompts, {tokens / seconds:,.0f} tokens/s"
            )
    force_to_disk(partial)
    partial.replace(out)
    return longest, Speed(None, time.monotonic() - began, tokens)


def _generate(
    model: LanguageModel,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[list[int]],
    settings: GenerationSettings,
) -> Iterator[list[int]]:
    """What follows each prompt, its eos included, without what fills up the batch."""
    length = max(map(len, prompts))
    ids = torch.empty(len(prompts), length, dtype=torch.int64)
    mask = torch.zeros(len(prompts), length, dtype=torch.int64)
    for row, prompt in enumerate(prompts):  # on the right, where generate goes on
        # Before it, a token of its own: some versions of transformers penalise the repetition of padding too.
        ids[row, : length - len(prompt)] = prompt[0]
        ids[row, length - len(prompt) :] = torch.tensor(prompt)
        mask[row, length - len(prompt) :] = 1
    arguments = settings.arguments(model, tokenizer)
    for row in _run(model, ids, mask, arguments)[:, length:].tolist():
        eos = arguments["eos_token_id"]
        yield row[: row.index(eos) + 1] if eos in row else row


def _run(
    model: LanguageModel, ids: Tensor, mask: Tensor, arguments: dict[str, Any], streamer: "_Stream | None" = None
) -> Tensor:
    """The prompts and what follows them."""
    model.model.generation_config = GenerationConfig()  # the settings decide, not a file beside the model
    generate: Any = model.model.generate
    device = model.model.device
    made: Tensor = generate(input_ids=ids.to(device), attention_mask=mask.to(device), streamer=streamer, **arguments)
    return made


def _check_ids(model: LanguageModel, ids: Sequence[int]) -> None:
    if max(ids) >= model.vocab_size:
        raise ValueError(
            f"{model.folder} has a vocabulary of {model.vocab_size:,} ids, and its tokenizer makes id {max(ids):,} of "
            "the prompt: they do not belong together"
        )


def _text(tokenizer: "PreTrainedTokenizerBase", ids: list[int]) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert isinstance(text, str)
    return text


def _continuation(tokenizer: "PreTrainedTokenizerBase", prompt: list[int], ids: list[int]) -> str:
    """The text of ``ids`` after the prompt: SentencePiece's decoders take the space before a text's first word away."""
    before, whole = _text(tokenizer, prompt), _text(tokenizer, prompt + ids)
    return whole[len(before) :] if whole.startswith(before) else _text(tokenizer, ids)


def prompt_ids(tokenizer: "PreTrainedTokenizerBase", prompt: str) -> list[int]:
    """The prompt as the tokenizer begins a text; for an empty one, bos or else eos."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # bytes of the command line that are no UTF-8, or JSON's escapes
        raise ValueError(f"prompt {prompt[:40]!r}: not Unicode: half a surrogate pair at {error.start}") from None
    ids: list[int] = tokenizer(prompt)["input_ids"]
    if ids:
        return ids
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if start is None:
        raise ValueError("the prompt is empty, and the tokenizer has neither bos nor eos to begin with: give a prompt")
    return [start]


def read_text(path: Path | None) -> str:
    """The text of a file, or of standard input, without a byte-order mark; ``ValueError`` if it cannot be read."""
    try:
        return sys.stdin.read().removeprefix("\ufeff") if path is None else path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path or 'standard input'}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path or 'standard input'}: {why_not_utf8(error)}") from error


def read_prompts(path: Path) -> list[str]:
    """The prompts in a file: the field ``prompt`` of JSON lines (``.jsonl``), or else one a line."""
    prompts = []
    text = read_text(path)
    # Lines end with "\n" alone: JSON lines and texts may hold what else splitlines() takes for an end.
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else (), 1):
        if path.suffix != ".jsonl":
            prompts.append(line)
        elif line.strip():
            try:
                prompt = json.loads(line)["prompt"]
            except (ValueError, KeyError, TypeError):
                prompt = None
            if not isinstance(prompt, str):
                raise ValueError(f'{path}, line {number}: expected an object with a text "prompt"')
            prompts.append(prompt)
    if not prompts:
        raise ValueError(f"{path} holds no prompt")
    return prompts


@torch.inference_mode()
def memory(model: LanguageModel) -> tuple[int, int]:
    """Bytes that decoding keeps for a sequence: whatever its length, and more for each of its tokens."""
    two, three = (
        _cache_bytes(
            model.model(input_ids=torch.zeros(1, n, dtype=torch.int64, device=model.model.device), use_cache=True)
        )
        for n in (2, 3)
    )
    return two - 2 * (three - two), three - two


def memory_line(model: LanguageModel, tokens: int) -> str:
    """`memory` for a user to read, after so many tokens."""
    constant, each = memory(model)
    if each == 0:
        return f"state: {constant:,} bytes, whatever the length"
    kept = f"state of {constant:,} bytes and a cache" if constant else "cache"
    return f"{kept} of {each:,} bytes a token: {constant + each * tokens:,} bytes after {tokens:,} tokens"


def _cache_bytes(outputs: Any) -> int:
    cache = outputs.get(CACHE_NAME)
    if cache is None:
        cache = outputs.cache_params  # as Mamba called it
    leaves = tree_leaves([vars(layer) for layer in cache.layers])
    return sum(x.numel() * x.element_size() for x in leaves if isinstance(x, Tensor) and x.is_floating_point())


def _padding(tokenizer: "PreTrainedTokenizerBase") -> int:
    found = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return 0 if found is None else int(found)


class _Stream(BaseStreamer):
    """Gets the prompt, then each token, from ``generate``; writes text as soon as no later token can change it.

    What it writes is together what ``_continuation`` gives. Each time it decodes the last tokens alone, so that a long
    text costs no more a token than a short one.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", prompt: list[int], write: Write) -> None:
        self._tokenizer, self._prompt, self._write = tokenizer, prompt, write
        flagged = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._skipped = flagged | set(tokenizer.all_special_ids)
        self._window = list(prompt)  # the last tokens
        self._said: int | None = None  # how much of the window's text is out; None: does it begin as the prompt's does?
        self._in_bytes = False
        for token in prompt:
            self._see(token)
        self._prompt_seen = False
        self.ids: list[int] = []
        self.text = ""
        self.first: float | None = None

    def put(self, value: Tensor) -> None:
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self.first = self.first or time.monotonic()
        for token in value.flatten().tolist():
            self.ids.append(token)
            self._window.append(token)
            self._see(token)
        if not self._in_bytes:
            self._say(self._settled())

    def end(self) -> None:
        whole = _continuation(self._tokenizer, self._prompt, self.ids)
        if whole.startswith(self.text):
            self._say(whole[len(self.text) :])
        self.text = whole

    def _see(self, token: int) -> None:
        """Note whether the text ends in a run of bytes: one that is no UTF-8 makes all of the run unreadable."""
        known = self._tokenizer.convert_ids_to_tokens(token)
        if known is not None and token not in self._skipped:  # others have no text, and do not end a run
            self._in_bytes = BYTE.fullmatch(str(known)) is not None

    def _settled(self) -> str:
        """What is new in the window's text and stays as it is, whatever follows."""
        text = _text(self._tokenizer, self._window)
        stays = text.rstrip(UNREADABLE)  # perhaps a character's first bytes
        if self._tokenizer.clean_up_tokenization_spaces:
            stays = stays.rstrip(BEFORE_CLEANING)
        if self._said is None:
            before = _text(self._tokenizer, self._prompt)
            if len(stays) < len(before):
                return ""
            if not stays.startswith(before):
                self._window, self._said = list(self.ids), 0
                return self._settled()
            self._said = len(before)
        new = stays[self._said :]
        self._said = max(self._said, len(stays))
        if len(self._window) > 2 * WINDOW:
            self._shorten(text, self._said)
        return new

    def _shorten(self, text: str, said: int) -> None:
        """Let the window begin later, if from there on the text is the same, some of what is out included."""
        later = self._window[-WINDOW:]
        rest = _text(self._tokenizer, later)
        gone = len(text) - len(rest)
        if text.endswith(rest) and said - gone >= OVERLAP:
            self._window, self._said = later, said - gone

    def _say(self, text: str) -> None:
        self.text += text
        if text:
            self._write(text)
