"""A causal language model from its folder, and the loss of every token that it is asked for."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import m2rnn.models  # noqa: F401 (registers M2RNN with the Auto classes)
from m2rnn.data.tokenizers import load_tokenizer
from m2rnn.models.cache import CACHE_NAME
from m2rnn.models.loss import IGNORED, chunked_token_losses
from m2rnn.runs.display import no_progress_bars
from m2rnn.runs.machine import check_device
from m2rnn.runs.models import check_model_folders

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
TOKENS_PER_BATCH = 2**14  # unless a batch is asked for
DTYPES = ("auto", "float64", "float32", "bfloat16", "float16")


@dataclass
class LanguageModel:
    """A model in evaluation mode.

    Attributes:
        folder: where it came from.
        model: the Hugging Face model.
        head: from hidden states to logits, if that is all that the model does after its stack; else None.
    """

    folder: Path
    model: PreTrainedModel
    head: nn.Module | None

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding: ids must be below it."""
        embedding = self.model.get_input_embeddings()
        assert isinstance(embedding.weight, Tensor)
        return int(embedding.weight.shape[0])

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def to_logits(self) -> nn.Module:
        """What makes logits of that which the model is asked for: its head, or nothing."""
        return nn.Identity() if self.head is None else self.head

    def check_length(self, length: int) -> None:
        """Raise ``ValueError`` if the model has no position embedding for so many tokens."""
        limit = getattr(self.model.config, "max_position_embeddings", None)
        tokens = self.model.get_input_embeddings()
        tables = [m for m in self.model.modules() if isinstance(m, nn.Embedding) and m is not tokens]
        if limit and length > limit and any(limit <= table.num_embeddings <= limit + 2 for table in tables):
            raise ValueError(f"context {length}: {self.folder} has learned positions for {limit} tokens and no more")


def load_model(folder: Path, device: str, dtype: str = "auto") -> LanguageModel:
    """The model in ``folder``, from safetensors alone and without code from the folder.

    Args:
        dtype: of its weights; ``"auto"`` is that of the checkpoint.

    Raises:
        ValueError: if there is no model, a weight is missing, or the device is not there.
    """
    check_model_folders([folder])
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    check_device(device)
    try:
        with no_progress_bars():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype if dtype == "auto" else getattr(torch, dtype),
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
    except Exception as error:  # transformers and safetensors have many
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"{folder} cannot be loaded as a causal language model: {reason}") from error
    model, report = loaded
    absent = [*report["missing_keys"], *(key for key, *_ in report.get("mismatched_keys", ()))]
    if absent:
        raise ValueError(
            f"{folder}: the weights of {len(absent)} tensors are missing or of another shape, such as {min(absent)}"
        )
    return in_memory(model.to(device), folder)


def in_memory(model: PreTrainedModel, folder: Path = Path()) -> LanguageModel:
    """A model that is loaded already, which this puts into evaluation mode; messages name it by ``folder``."""
    model.eval()
    return LanguageModel(folder, model, _plain_head(model))


def load_model_tokenizer(folder: Path) -> "PreTrainedTokenizerBase | None":
    """The tokenizer in the folder of a model; None if it has none.

    Raises:
        DataError: if it is damaged, or none that the `tokenizers` library can run.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    return load_tokenizer(folder)


def fingerprint(folder: Path) -> dict[str, list[int]]:
    """Size and time of change of the files that make a model, to notice that it is not the same any more."""
    kinds = ("*.safetensors", "*.json", "*.model")
    files = sorted({path for kind in kinds for path in folder.glob(kind)})
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files}


@torch.inference_mode()
def _plain_head(model: PreTrainedModel) -> nn.Module | None:
    """The head, if logits are exactly what it makes of the last hidden state: some models scale or cap them."""
    head = model.get_output_embeddings()
    if head is None or model.base_model is model:
        return None
    ids = torch.arange(7, device=model.device)[None] % model.config.get_text_config().vocab_size
    logits = model(input_ids=ids, use_cache=False).logits
    hidden = model.base_model(input_ids=ids, use_cache=False)[0]
    return head if torch.equal(logits, head(hidden)) else None


@torch.inference_mode()
def read(
    model: LanguageModel, ids: Tensor, stops: Sequence[int], keep_state: bool = False
) -> Iterator[tuple[slice, Tensor, Any]]:
    """Read ``ids`` ``[B, T]`` up to each of ``stops`` in turn, carrying the state (transformers' cache) on.

    Yields:
        The places of a part, the ``[B, part, …]`` that ``model.to_logits`` takes there, and the state after it: None
        if there is but one part, unless ``keep_state``.

    Raises:
        ValueError: if the model returns no state to carry.
    """
    run: Callable[..., Any] = model.model if model.head is None else model.model.base_model
    carries = keep_state or len(stops) > 1
    state, start = None, 0
    for stop in stops:
        carried: dict[str, Any] = {CACHE_NAME: state} if state is not None else {}
        outputs = run(input_ids=ids[:, start:stop], use_cache=carries, **carried)
        if carries:
            state = outputs.get(CACHE_NAME)
            if state is None:
                raise ValueError(f"{model.folder} returns no cache to carry on: use segment 0, whole windows")
        yield slice(start, stop), outputs.logits if model.head is None else outputs.last_hidden_state, state
        start = stop


@torch.inference_mode()
def token_losses(
    model: LanguageModel,
    ids: Tensor,
    labels: Tensor,
    segment: int | None = None,
    positions: Sequence[int] = (),
    measure: Callable[[Any], None] | None = None,
) -> Tensor:
    """``-log p(label)`` for each label that is not -100, float32 (float64 for a float64 model), in their order.

    The logits are computed for labelled places only, a part at a time, and reduced in float32.

    Args:
        ids: ``[B, T]``, sequences that each start from an empty state, filled up on the right with any ids: a causal
            model does not see what follows.
        labels: ``[B, T]``, the token that each place predicts, or -100.
        segment: read so many tokens at a time and carry the state (transformers' cache) on; None for all at once.
        positions: numbers of tokens after which ``measure`` is called with the state; a part ends there.

    Raises:
        ValueError: if the model returns no state to carry.
    """
    length = ids.shape[1]
    step = length if segment is None else segment
    stops = sorted({*range(step, length, step), *positions, length})
    losses = torch.zeros(labels.shape, dtype=torch.float64, device=ids.device)
    for part, hidden, state in read(model, ids, stops, keep_state=bool(positions)):
        wanted = labels[:, part] != IGNORED
        found = chunked_token_losses(hidden[wanted], labels[:, part][wanted], model.to_logits, model.vocab_size)
        losses[:, part][wanted] = found.double()
        if measure is not None and part.stop in positions:
            measure(state)
    return losses[labels != IGNORED]


def check_segments(model: LanguageModel) -> None:
    """Raise ``ValueError`` if the model does not go on from its state: some take only one token with one."""
    generator = torch.Generator().manual_seed(0)
    ids, labels = torch.randint(model.vocab_size, (2, 1, 64), generator=generator).to(model.model.device)
    whole = token_losses(model, ids, labels)
    difference = token_losses(model, ids, labels, segment=16) - whole
    eps = torch.finfo(next(model.model.parameters()).dtype).eps
    if not float(difference.norm() / whole.norm()) < max(10 * eps, 1e-4):
        raise ValueError(
            f"{model.folder}: {type(model.model).__name__} does not go on from its state with several tokens: use "
            "segment 0, whole windows"
        )
