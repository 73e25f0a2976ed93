"""What determines a state-tracking run: same settings, same machine, same weights to the last bit."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from m2rnn.runs.errors import SettingsError
from m2rnn.tasks.problems.word_problem import Group, Inputs, WordProblem


@dataclass(frozen=True)
class TrackSettings:
    """Settings of one run of ``m2rnn track``; `SettingsError` for values that cannot work."""

    group: str = "S3"
    inputs: Inputs = "all"
    mixer: str = "m2rnn"
    model: Mapping[str, Any] = field(default_factory=dict)  # overrides of the state-tracking preset
    train_length: int = 128
    curriculum: bool = True
    grow_below: float = 0.03  # smoothed loss, nats per token, under which the sequences grow
    grow_inputs: bool = False  # from the identity and generators to all
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
        try:
            self.problem()
        except ValueError as error:
            raise SettingsError(str(error)) from error
        if self.grow_inputs and self.inputs != "all":
            raise SettingsError(f"grow_inputs with inputs {self.inputs!r}: expected 'all', which they grow to")
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

    def problem(self) -> WordProblem:
        """The word problem that is trained and tested on."""
        return WordProblem(Group.from_name(self.group), self.inputs, self.seed)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "model": dict(self.model), "test_lengths": list(self.test_lengths)}
