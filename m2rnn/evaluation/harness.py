"""``m2rnn eval tasks``: benchmarks of EleutherAI's lm-eval, through its own API and its own model class.

The scores are those of ``lm_eval.simple_evaluate`` with `harness_model`. Tasks that it knows by name (LongBench and
RULER too) or that lie in a folder of YAML files (``include_path``); such a folder may name Python functions, which run.
"""

import difflib
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from m2rnn.data.tokenizers import vocab_size_of
from m2rnn.evaluation.language_model import (
    LanguageModel,
    fingerprint,
    load_model,
    load_model_tokenizer,
)
from m2rnn.runs.display import Display
from m2rnn.runs.errors import check_sizes
from m2rnn.runs.folder import RESULTS, run_folder, to_json, write_whole_file
from m2rnn.runs.machine import check_device, hardware, versions
from m2rnn.runs.models import check_model_folders, results_file, short_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TASKS = "tasks"
UNLIMITED = 2**20  # tokens; lm-eval wants a number, and cuts what is longer
BOOTSTRAPS = 1000  # of a standard error that has no formula
DISABLE_MULTIPROC = "DISABLE_MULTIPROC"  # a variable that lm-eval reads

Results = dict[str, Any]


@dataclass(frozen=True)
class TaskSettings:
    """Which tasks, and how.

    Attributes:
        tasks: names that lm-eval or a file in ``include_path`` gives to tasks, groups or tags.
        include_path: folder with more tasks, as YAML files.
        limit: only the first so many documents of each task, to try out.
        num_fewshot: examples before each question; default what the task says.
        lengths: in tokens, of the tasks that are made in any length (RULER); default what the task says.
        max_length: most tokens that a model reads, longer prompts lose their beginning; default the model's
            ``max_position_embeddings``, and no limit for a model without.
        batch: requests at a time; scores do not depend on it, but for rounding.
        dtype, device: of the weights.

    Raises:
        ValueError: for a value that cannot be, or without lm-eval.
    """

    tasks: tuple[str, ...]
    include_path: str | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    lengths: tuple[int, ...] | None = None
    max_length: int | None = None
    batch: int = 8
    dtype: str = "auto"
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_sizes(vars(self))
        if find_spec("lm_eval") is None:
            raise ValueError("tasks need lm-eval: pip install 'm2rnn[eval]'")
        if not all(self.tasks) or not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"tasks {','.join(self.tasks)!r}: expected different names, with commas between them")
        if self.include_path is not None and not Path(self.include_path).is_dir():
            raise ValueError(f"include_path {self.include_path}: no such folder")
        for name, least in (("limit", 1), ("num_fewshot", 0), ("max_length", 2), ("batch", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} {value}: expected at least {least}")

    def identity(self) -> dict[str, Any]:
        """What an interrupted run must go on with."""
        return {name: value for name, value in asdict(self).items() if name != "batch"}


def evaluate_tasks(
    folders: Sequence[Path],
    settings: TaskSettings,
    out: Path,
    *,
    overwrite: bool = False,
    display: Display | None = None,
) -> Results:
    """Score each model on each task, and write ``results.json`` and every answer (``tasks/*.samples.jsonl``).

    A task that is finished is not repeated when the run goes on. All data sets are loaded before the first is
    evaluated.

    Raises:
        ValueError: for an unknown task, or a data set that cannot be loaded, naming both.
        RunFolderError: if ``out`` belongs to another run.
    """
    display = display or Display()
    check_device(settings.device)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    check_model_folders(folders)
    names = short_names(folders)
    described = {
        **settings.identity(),
        "models": {name: [str(f.resolve()), fingerprint(f)] for name, f in zip(names, folders, strict=True)},
    }
    with run_folder(out, described, overwrite, (TASKS, RESULTS)):
        if not (out / RESULTS).exists():
            results: Results = {"settings": {**asdict(settings), **described}, "models": {}}
            for name, folder in zip(names, folders, strict=True):
                display.say(f"{name}: loading the model and the tasks")
                results["models"][name] = _evaluate_model(name, folder, settings, out / TASKS, display)
            results["versions"] = versions(("m2rnn", "torch", "transformers", "tokenizers", "lm-eval", "datasets"))
            results["hardware"] = hardware(settings.device)
            write_whole_file(out / RESULTS, to_json(results))
        found: Results = json.loads((out / RESULTS).read_text(encoding="utf-8"))
        return found


def _evaluate_model(name: str, folder: Path, settings: TaskSettings, out: Path, display: Display) -> Results:
    model = load_model(folder, settings.device, settings.dtype)
    tokenizer = load_model_tokenizer(folder)
    if tokenizer is None:
        raise ValueError(f"{folder} has no tokenizer: save it there (save_pretrained)")
    ids = vocab_size_of(tokenizer)
    if ids > model.vocab_size:
        raise ValueError(
            f"{folder} has a vocabulary of {model.vocab_size:,} ids, its tokenizer one of {ids:,}: "
            "they do not belong together"
        )
    manager, loaded = load_tasks(settings, folder)
    adapted = harness_model(model, tokenizer, settings.batch, settings.max_length)
    found: Results = {}
    out.mkdir(exist_ok=True)
    for number, (task, content) in enumerate(loaded.items()):
        path = results_file(out, name, f".{quote(task, safe='')}.json")
        if not path.exists():
            display.say(f"{name}: {task}, {number + 1} of {len(loaded)}")
            scores, samples = _run(adapted, manager, content, settings)
            lines = "".join(json.dumps(sample, default=str, ensure_ascii=False) + "\n" for sample in samples)
            write_whole_file(path.with_suffix(".samples.jsonl"), lines.encode())
            write_whole_file(path, to_json(scores))
        found |= json.loads(path.read_text(encoding="utf-8"))
    return {"folder": str(folder), "parameters": model.parameters, "tasks": found}


def harness_model(
    model: LanguageModel, tokenizer: "PreTrainedTokenizerBase", batch: int = 8, max_length: int | None = None
) -> Any:
    """The model as lm-eval's ``HFLM``: log-probabilities in float32 at least, prompts of any length if it can."""
    from lm_eval.models.huggingface import HFLM

    limit = getattr(model.model.config, "max_position_embeddings", None)
    dtype = next(model.model.parameters()).dtype
    return with_one_bos(HFLM)(
        pretrained=model.model,
        tokenizer=tokenizer,
        backend="causal",
        batch_size=batch,
        max_length=max_length or limit or UNLIMITED,
        softmax_dtype="float64" if str(dtype) == "torch.float64" else "float32",
    )


def with_one_bos(kind: Any) -> Any:
    """A class of lm-eval's models whose rolling likelihoods see bos once: it puts one before what has one already."""

    class WithOneBos(kind):  # type: ignore[misc]
        _rolls = False

        def loglikelihood_rolling(self, *arguments: Any, **options: Any) -> Any:
            self._rolls = True
            try:
                return super().loglikelihood_rolling(*arguments, **options)
            finally:
                self._rolls = False

        def tok_encode(self, *arguments: Any, **options: Any) -> Any:
            ids = super().tok_encode(*arguments, **options)
            return ids[1:] if self._rolls and list(ids[:1]) == [self.prefix_token_id] else ids

    return WithOneBos


def load_tasks(settings: TaskSettings, folder: Path) -> tuple[Any, dict[str, list[Any]]]:
    """lm-eval's task manager, and the tasks or groups of each name, with their data sets.

    Raises:
        ValueError: naming the task, and what it lacks.
    """
    from lm_eval.tasks import TaskManager

    # RULER reads these: whose tokens to count, and how many.
    metadata: dict[str, Any] = {"pretrained": str(folder)}
    if settings.lengths is not None:
        metadata["max_seq_lengths"] = list(settings.lengths)
    known: list[str] = []
    manager: Any = None
    for with_defaults in (False, True):  # lm-eval's own index takes many seconds
        if with_defaults or settings.include_path is not None:
            manager = TaskManager(include_path=settings.include_path, include_defaults=with_defaults, metadata=metadata)
            known = list(manager.all_tasks)
        if set(settings.tasks) <= set(known):
            break
    loaded = {}
    for task in settings.tasks:
        if task not in known:
            near = difflib.get_close_matches(task, known, 3)
            hint = f"; similar: {', '.join(near)}" if near else ""
            raise ValueError(f"task {task!r}: lm-eval knows no task, group or tag of that name{hint}")
        try:
            found = manager.load([task])
        except Exception as error:  # of the network, of a file, of a package that the task needs
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"task {task}: its data cannot be loaded: {reason}") from error
        groups = list(found["groups"].values())
        loaded[task] = groups[:1] or list(found["tasks"].values())  # the first group holds the others
    return manager, loaded


def _run(model: Any, manager: Any, tasks: list[Any], settings: TaskSettings) -> tuple[Results, list[Results]]:
    from lm_eval import simple_evaluate

    with redirect_stdout(sys.stderr), _one_process():  # lm-eval prints
        found = simple_evaluate(
            model=model,
            tasks=tasks,
            limit=settings.limit,
            num_fewshot=settings.num_fewshot,
            bootstrap_iters=BOOTSTRAPS,
            log_samples=True,
            task_manager=manager,  # else it makes its own, which takes many seconds
        )
    scores = {
        task: {
            "metrics": _metrics(values),
            "documents": found["n-samples"].get(task, {}).get("effective"),
            "few_shot": found["n-shot"].get(task),
            "version": found["versions"].get(task),
        }
        for task, values in (found["results"] | found.get("groups", {})).items()
    }
    samples = [{"task": task, **sample} for task, several in found["samples"].items() for sample in several]
    return scores, samples


@contextmanager
def _one_process() -> Iterator[None]:
    """Without lm-eval's processes, one a core and forked from one that uses the GPU, for its bootstrapped errors."""
    before = os.environ.get(DISABLE_MULTIPROC)
    os.environ[DISABLE_MULTIPROC] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[DISABLE_MULTIPROC]
        else:
            os.environ[DISABLE_MULTIPROC] = before


def _metrics(values: Results) -> list[Results]:
    """lm-eval's ``"acc,none": 0.5, "acc_stderr,none": 0.1`` as one entry a metric."""
    metrics = []
    for key, value in values.items():
        metric, comma, taken = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            error = values.get(f"{metric}_stderr,{taken}")
            error = error if isinstance(error, float) else None
            metrics.append({"metric": metric, "filter": taken, "value": value, "standard_error": error})
    return metrics


def table(results: Results) -> str:
    """One row a model, task and metric."""
    models = results["models"]
    width = max(len("model"), *map(len, models)) + 2
    column = max(len("task"), *(len(task) for model in models.values() for task in model["tasks"])) + 2
    lines = [f"{'model':<{width}}{'task':<{column}}{'metric':<20}{'value':>11}{'± error':>11}{'documents':>11}"]
    for name, model in models.items():
        for task, found in model["tasks"].items():
            for row in found["metrics"]:
                metric = row["metric"] if row["filter"] == "none" else f"{row['metric']} ({row['filter']})"
                value, error = _short(row["value"]), _short(row["standard_error"])
                documents = "" if found["documents"] is None else f"{found['documents']:,}"
                lines.append(f"{name:<{width}}{task:<{column}}{metric:<20}{value:>11}{error:>11}{documents:>11}")
    return "\n".join(lines)


def _short(value: Any) -> str:
    if not isinstance(value, (int, float)):
        return "" if value is None else str(value)
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.4g}"
