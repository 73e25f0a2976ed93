"""When the sequences grow, when the problem counts as solved, and the learning rate that goes with both.

A non-linear recurrence learns nothing from long sequences while it cannot do short ones, so the length starts
at 4 and grows by a quarter whenever the smoothed loss is small. Inputs can grow too: sequences of 6 tokens are first of
the identity and generators, then of more and more elements, then longer. From 16 tokens on the learning rate falls with
the square root of the length. At the full length the run waits until the loss has been small for a while, then takes
the learning rate down to zero and ends; if the loss rises again on the way, it goes on as before. A run that does not
get there uses up its steps, the last of them on the same decay, or is given up once a length has taken too many.
"""

from dataclasses import dataclass

START_LENGTH = 4
GROWTH = 1.25
PEAK_RATE_LENGTH = 16  # tokens; of longer sequences, what is learnt at the peak learning rate is often lost again
INPUTS_LENGTH = 6  # of the sequences while elements are added
INPUTS_GROWTH = 1.3
ADD_INPUTS_BELOW = 0.15  # smoothed loss, nats per token; the elements known need not be perfect to help with the next
SOLVED_BELOW = 0.01
SOLVED_STEPS = 50  # consecutive steps at the full length
LOST_ABOVE = 0.1  # smoothed loss, at which a solved problem is no longer solved
SMOOTHING = 0.9  # weight of the past in the smoothed loss
WARMUP_STEPS = 20


@dataclass(frozen=True)
class Progress:
    """Where a run stands after ``step`` steps: beside weights and optimizer, all it needs to go on."""

    step: int
    length: int
    smoothed_loss: float | None = None
    steps_below: int = 0  # how many steps in a row the full length has had a small loss
    solved_at: int | None = None
    grown_at: int = 0
    inputs: int = 0  # how many elements occur in the sequences


@dataclass(frozen=True)
class Curriculum:
    """The plan of a run of at most ``steps`` steps on sequences of up to ``train_length`` tokens.

    It is given up after ``patience`` steps at one length shorter than that. Inputs grow from ``inputs[0]`` elements to
    ``inputs[1]``.
    """

    train_length: int
    steps: int
    grow: bool = True
    patience: int | None = None
    inputs: tuple[int, int] = (0, 0)
    decay_steps: int = 100
    grow_below: float = 0.03  # smoothed loss, nats per token
    min_length: int = 1  # of the problem's sequences

    def start(self) -> Progress:
        """The progress before the first step."""
        shortest = max(START_LENGTH, self.min_length)
        length = min(shortest, self.train_length) if self.grow else self.train_length
        return Progress(step=0, length=length, inputs=self.inputs[0])

    def after(self, progress: Progress, loss: float) -> Progress:
        """The progress after one more step, which had ``loss`` at ``progress.length``."""
        past = loss if progress.smoothed_loss is None else progress.smoothed_loss
        smoothed_loss = SMOOTHING * past + (1 - SMOOTHING) * loss
        steps_below, solved_at = 0, progress.solved_at
        if self._is_full(progress):
            length, inputs, grown_at = progress.length, progress.inputs, progress.grown_at
            steps_below = progress.steps_below + 1 if smoothed_loss < SOLVED_BELOW else 0
            if steps_below == SOLVED_STEPS and solved_at is None:
                solved_at = progress.step + 1
            elif smoothed_loss > LOST_ABOVE:
                solved_at = None
        else:
            length, inputs = self._grown(progress, smoothed_loss)
            unchanged = (length, inputs) == (progress.length, progress.inputs)
            grown_at = progress.grown_at if unchanged else progress.step + 1
        return Progress(progress.step + 1, length, smoothed_loss, steps_below, solved_at, grown_at, inputs)

    def _grown(self, progress: Progress, smoothed_loss: float) -> tuple[int, int]:
        """Length and inputs for the next step."""
        length, inputs = progress.length, progress.inputs
        if inputs < self.inputs[1] and length >= min(INPUTS_LENGTH, self.train_length):
            if smoothed_loss < ADD_INPUTS_BELOW:
                inputs = min(max(inputs + 1, int(inputs * INPUTS_GROWTH)), self.inputs[1])
        elif smoothed_loss < self.grow_below:
            length = min(max(length + 1, int(length * GROWTH)), self.train_length)
        return length, inputs

    def _is_full(self, progress: Progress) -> bool:
        return progress.length == self.train_length and progress.inputs == self.inputs[1]

    def is_finished(self, progress: Progress) -> bool:
        return self.is_given_up(progress) or progress.step >= self._decay_start(progress) + self._decay_steps

    def is_given_up(self, progress: Progress) -> bool:
        if self.patience is None or self._is_full(progress):
            return False
        return progress.step - progress.grown_at >= self.patience

    def learning_rate(self, progress: Progress) -> float:
        """The factor of the peak learning rate for the step after ``progress``."""
        warmup = (progress.step + 1) / WARMUP_STEPS
        decay = (self._decay_start(progress) + self._decay_steps - progress.step) / self._decay_steps
        peak = min(1.0, (PEAK_RATE_LENGTH / progress.length) ** 0.5) if self.grow else 1.0
        return min(warmup, peak, peak * decay)

    @property
    def _decay_steps(self) -> int:
        return min(self.decay_steps, self.steps)

    def _decay_start(self, progress: Progress) -> int:
        latest = self.steps - self._decay_steps
        return latest if progress.solved_at is None else min(progress.solved_at, latest)
