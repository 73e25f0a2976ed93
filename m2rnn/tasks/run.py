"""``m2rnn track`` and ``m2rnn tasks run``: train on a problem, measure accuracy by length and position, plot it."""

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np
import torch

from m2rnn.models import M2RNNForCausalLM
from m2rnn.models.sizes import size_of
from m2rnn.runs.display import Display, no_progress_bars
from m2rnn.runs.errors import SettingsError
from m2rnn.runs.folder import (
    MODEL,
    PLOT,
    RESULTS,
    read_json,
    run_folder,
    to_json,
    whole_folder,
    write_whole_file,
)
from m2rnn.runs.machine import check_device, hardware, versions
from m2rnn.tasks.problems.contract import Problem, Score
from m2rnn.tasks.problems.word_problem import WordProblem
from m2rnn.tasks.report import write_plot
from m2rnn.tasks.settings import RunSettings
from m2rnn.tasks.training import TrainingResult, build_config, train

TINY = 1_000_000  # parameters, below which a model takes one thread
TOKENS_PER_BATCH = 2**17
LOGITS_PER_BATCH = 2**27
ATTENTION_SCORES_PER_BATCH = 2**26  # per head, where the scores of a whole batch are held in memory
CHANCE_SEQUENCES = 256

Results = dict[str, Any]


def track(
    settings: RunSettings,
    folder: Path,
    *,
    overwrite: bool = False,
    checkpoint_every: int = 100,
    minutes: float | None = None,
    display: Display | None = None,
) -> Results:
    """Train, evaluate, and write ``model/``, ``results.json`` and ``accuracy-by-length.png`` into ``folder``.

    An interrupted run goes on where its last checkpoint stands; a finished one is read, not repeated. Raises
    `SettingsError` and `RunFolderError` for what a user can get wrong, before anything is trained.
    """
    check_can_run(settings)
    display = display or Display()
    with run_folder(folder, settings.as_json(), overwrite), _threads(threads_of(settings)):
        if (folder / RESULTS).exists():
            return read_results(folder)
        trained = train(settings, folder, checkpoint_every=checkpoint_every, minutes=minutes, display=display)
        rmtree(folder / MODEL, ignore_errors=True)  # of a training that ``minutes`` ended, and that has gone on since
        with whole_folder(folder / MODEL) as model_folder, no_progress_bars():
            trained.model.save_pretrained(model_folder)
        results = evaluate(trained, settings, display)
        write_plot(folder / PLOT, [results])
        write_whole_file(folder / RESULTS, to_json(results))
        return results


def threads_of(settings: RunSettings) -> int | None:
    """One thread for a tiny model on a CPU; None for as many as torch takes.

    Such a model gains little from a second thread, and on a busy machine threads that wait for each other cost many
    times the work. ``OMP_NUM_THREADS`` decides where it is set.
    """
    if settings.device != "cpu" or "OMP_NUM_THREADS" in os.environ:
        return None
    return 1 if size_of(build_config(settings), settings.train_length).parameters < TINY else None


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_can_run(settings: RunSettings) -> None:
    """Raise `SettingsError` now for what would otherwise fail after minutes of training."""
    build_config(settings)
    check_device(settings.device)
    if find_spec("matplotlib") is None:
        raise SettingsError("the plot needs matplotlib: pip install 'm2rnn[plot]'")


def read_results(folder: Path) -> Results:
    return read_json(folder / RESULTS, "delete it, and the same command writes it again")


def evaluate(trained: TrainingResult, settings: RunSettings, display: Display) -> Results:
    """Accuracy on the test split at every test length, with all that is needed to repeat it."""
    began = time.monotonic()
    problem, accuracy = settings.problem(), {}
    for length in settings.test_lengths:
        display.say(f"testing {settings.test_sequences} sequences of {length} tokens")
        accuracy[str(length)] = as_json(score_model(trained.model, settings, length))
    variants = {}
    for name, variant in problem.variants().items():
        display.say(f"testing {name}: {settings.test_sequences} sequences of {settings.train_length} tokens")
        variants[name] = as_json(score_model(trained.model, settings, settings.train_length, variant))
    return {
        "settings": settings.as_json(),
        "parameters": sum(parameter.numel() for parameter in trained.model.parameters()),
        "training": {
            "outcome": trained.outcome,
            "seconds": round(trained.seconds, 1),
            **asdict(trained.progress),
        },
        "evaluation_seconds": round(time.monotonic() - began, 1),
        "title": settings.title(),
        "chance": chance(problem, settings.train_length),
        "accuracy": accuracy,
        **({"variants": variants} if variants else {}),
        "versions": versions(("m2rnn", "torch", "transformers", "numba", "numpy")),
        "hardware": hardware(settings.device),
    }


def as_json(score: Score) -> dict[str, Any]:
    """A score by ranges of positions that have answers; ``last_quarter`` is of all where the last quarter has none."""
    last_quarter = score.last_quarter()
    return {
        "all": score.accuracy(),
        "last_quarter": score.accuracy() if math.isnan(last_quarter) else last_quarter,
        "by_position": [
            {"start": start, "stop": stop, "accuracy": value}
            for start, stop, value in score.in_buckets()
            if not math.isnan(value)
        ],
        "answers": score.answers,
        "errors": score.errors,
        "sequences": score.sequences,
        "sequences_right": score.sequences_right,
    }


def chance(problem: Problem, length: int) -> float:
    """The accuracy of always giving the commonest answer; of a word problem, whose answers are uniform, exactly."""
    if isinstance(problem, WordProblem):
        return 1 / problem.vocab_size
    batch = problem.batch("validation", 0, CHANCE_SEQUENCES, length)
    answers = np.bincount(batch.targets[batch.mask])
    return float(answers.max() / answers.sum())


@torch.inference_mode()
def score_model(model: M2RNNForCausalLM, settings: RunSettings, length: int, problem: Problem | None = None) -> Score:
    """The model's score on the test split's sequences of ``length`` tokens, in batches that fit in memory.

    They are of another ``problem`` than the settings' if that is given.
    """
    batch = (problem or settings.problem()).batch("test", 0, settings.test_sequences, length)
    rows = min(TOKENS_PER_BATCH, LOGITS_PER_BATCH // model.config.vocab_size) // length
    if "attention" in model.config.mixers:
        rows = min(rows, ATTENTION_SCORES_PER_BATCH // length**2)
    rows = max(rows, 1)
    score = Score(length)
    for first in range(0, settings.test_sequences, rows):
        inputs, targets = (tokens[first : first + rows] for tokens in batch)
        logits = model(torch.from_numpy(inputs).to(model.device), use_cache=False).logits
        score.add(logits.argmax(-1).cpu().numpy(), targets)
    return score
