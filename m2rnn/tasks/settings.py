"""What determines a run on a synthetic problem: same settings, same machine, same weights to the last bit."""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from m2rnn.runs.errors import SettingsError, check_sizes
from m2rnn.tasks.curriculum import Curriculum, Progress
from m2rnn.tasks.problems import make_problem
from m2rnn.tasks.problems.contract import Batch, Problem
from m2rnn.tasks.problems.word_problem import Group, Inputs, WordProblem

Options = Mapping[str, Any]


@dataclass(frozen=True)
class RunSettings(ABC):
    """What runs of ``m2rnn track`` and ``m2rnn tasks`` have in common; `SettingsError` for values that cannot work."""

    mixer: str = "m2rnn"
    model: Mapping[str, Any] = field(default_factory=dict)  # overrides of the state-tracking preset
    train_length: int = 128
    curriculum: bool = True
    grow_below: float = 0.03  # smoothed loss, nats per answer, under which the sequences grow
    steps: int = 3000
    patience: int | None = None  # steps without growth before the full length, then the run is given up
    decay_steps: int = 100  # on which the learning rate goes to zero at the end
    batch_size: int = 128
    learning_rate: float = 5e-3
    noise: float = 0.0  # on the embeddings in training: the largest standard deviation, each sequence has another
    seed: int = 0
    test_lengths: tuple[int, ...] = (128, 256, 512, 1024, 4096)
    test_sequences: int = 256
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_sizes({name: value for name, value in vars(self).items() if name != "seed"})
        try:
            self.problem()
        except ValueError as error:
            raise SettingsError(str(error)) from error
        for name in ("train_length", "steps", "patience", "decay_steps", "batch_size", "test_sequences"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingsError(f"{name} {value}: expected a whole number of at least 1")
        if not 0 < self.learning_rate < math.inf:
            raise SettingsError(f"learning_rate {self.learning_rate}: expected a number above 0, like 5e-3")
        if not 0 <= self.noise < math.inf:
            raise SettingsError(f"noise {self.noise}: expected a standard deviation of at least 0, like 0.5")
        if not self.grow_below > 0:
            raise SettingsError(f"grow_below {self.grow_below}: expected a loss above 0, like 0.03")
        lengths = self.test_lengths
        if not lengths or min(lengths) < 1 or list(lengths) != sorted(set(lengths)):
            raise SettingsError(
                f"test_lengths {','.join(map(str, lengths))!r}: expected increasing whole numbers "
                "of at least 1, such as 128,256,512"
            )

    @abstractmethod
    def problem(self) -> Problem:
        """The problem that is trained and tested on."""

    @abstractmethod
    def title(self) -> str:
        """What a plot says above its curves."""

    def plan(self) -> Curriculum:
        """When the sequences grow, and when the training ends."""
        return Curriculum(
            self.train_length,
            self.steps,
            self.curriculum,
            self.patience,
            decay_steps=self.decay_steps,
            grow_below=self.grow_below,
            min_length=self.problem().min_length,
        )

    def train_batch(self, problem: Problem, progress: Progress) -> Batch:
        """The batch of the step after ``progress``, of this run's ``problem``."""
        return problem.batch("train", progress.step, self.batch_size, progress.length)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "model": dict(self.model), "test_lengths": list(self.test_lengths)}


@dataclass(frozen=True)
class TrackSettings(RunSettings):
    """Settings of one run of ``m2rnn track``: a word problem."""

    group: str = "S3"
    inputs: Inputs = "all"
    grow_inputs: bool = False  # from the identity and generators to all

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.grow_inputs and self.inputs != "all":
            raise SettingsError(f"grow_inputs with inputs {self.inputs!r}: expected 'all', which they grow to")

    def problem(self) -> WordProblem:
        """The word problem that is trained and tested on."""
        return WordProblem(Group.from_name(self.group), self.inputs, self.seed)

    def title(self) -> str:
        return f"{self.group} word problem"

    def plan(self) -> Curriculum:
        problem = self.problem()
        elements = len(problem.alphabet)
        return Curriculum(
            self.train_length,
            self.steps,
            self.curriculum,
            self.patience,
            inputs=(len(problem.generators) if self.grow_inputs else elements, elements),
            decay_steps=self.decay_steps,
            grow_below=self.grow_below,
        )

    def train_batch(self, problem: Problem, progress: Progress) -> Batch:
        assert isinstance(problem, WordProblem)
        return problem.batch("train", progress.step, self.batch_size, progress.length, progress.inputs)


@dataclass(frozen=True)
class TaskSettings(RunSettings):
    """Settings of one run of ``m2rnn tasks run``; `task_settings` takes the lengths from the task."""

    task: str = "parity"  # a name of `PROBLEMS`, a group, or the path of a problem of one's own
    options: Options = field(default_factory=dict)  # fields of the problem

    def __post_init__(self) -> None:
        super().__post_init__()
        problem = self.problem()
        for name, length in (("train_length", self.train_length), ("test_lengths", self.test_lengths[0])):
            if length < problem.min_length:
                raise SettingsError(f"{name} {length}: {problem.name} needs at least {problem.min_length} tokens")

    def problem(self) -> Problem:
        return make_problem(self.task, **{"seed": self.seed, **self.options})

    def title(self) -> str:
        options = "".join(f", {name} {value}" for name, value in self.options.items())
        return f"{self.problem().name}{options}"

    def train_batch(self, problem: Problem, progress: Progress) -> Batch:
        """A batch of the length so far, or, where the task trains on a range of lengths, of a random one up to it."""
        shortest, longest = problem.train_lengths
        length = progress.length
        if shortest < min(longest, length):
            (word,) = np.random.SeedSequence((self.seed, progress.step)).generate_state(1)
            length = shortest + int(word) % (length - shortest + 1)
        return problem.batch("train", progress.step, self.batch_size, length)

    def as_json(self) -> dict[str, Any]:
        settings = {**super().as_json(), "options": dict(self.options)}
        if self.task.endswith(".py"):  # a run does not go on with another problem under the same name
            settings["task_sha256"] = hashlib.sha256(Path(self.task).read_bytes()).hexdigest()
        return settings


def task_settings(
    task: str,
    options: Options | None = None,
    *,
    train_length: int | None = None,
    test_lengths: tuple[int, ...] | None = None,
    **choices: Any,
) -> TaskSettings:
    """Settings of a run on ``task``, with the lengths of its protocol unless others are given.

    Raises:
        SettingsError: there is no such task, or it has no such options.
    """
    try:
        problem = make_problem(task, **(options or {}))
    except ValueError as error:
        raise SettingsError(str(error)) from error
    return TaskSettings(
        task=task,
        options=options or {},
        train_length=problem.train_lengths[1] if train_length is None else train_length,
        test_lengths=problem.test_lengths if test_lengths is None else test_lengths,
        **choices,
    )
