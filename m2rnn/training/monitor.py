"""What a training watches after each backward pass, before the weights change.

The loss and the norm of the gradients, of each kind of layer too. A NaN or an infinity stops the run there, with the
weights of the last step untouched. Gradients that are too long are scaled down. After the step: a line of the log, the
display, and whether to save or to stop.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object, reduce
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from m2rnn.data.batches import PackedBatches
from m2rnn.layers.state_weight import bound_state_weights
from m2rnn.models import M2RNNConfig
from m2rnn.runs.display import Display
from m2rnn.runs.folder import to_json, write_whole_file
from m2rnn.runs.log import Log
from m2rnn.training.throughput import Throughput
from m2rnn.training.train_settings import TrainSettings

NON_FINITE = "non-finite.json"
REMEMBERED = 64  # steps whose losses say what is usual
SPIKE = 6.0  # standard deviations above their mean
NAMED_ROWS = 4  # that a message shows


class NonFiniteError(Exception):
    """A loss or a gradient is no finite number: the message says where it came from and how to go on."""


@dataclass
class Step:
    """What is known of the step in progress."""

    loss: float
    norms: dict[str, float]
    stop: bool
    interrupted: bool  # by the user, in any process

    @property
    def norm(self) -> float:
        return math.hypot(*self.norms.values())


class Monitor(TrainerCallback):
    """Watches a training; the same in all processes, but only the first has ``log`` and a display that shows.

    It knows the trainer by what transformers hands to a callback, and by the losses that the trainer notes.

    Args:
        settings: of the run.
        folder: of the run.
        config: of the model.
        batches: the data, whose batches are named if something is wrong with them.
        accumulation: micro-batches of a step and process.
        losses: where the trainer notes those of a step's micro-batches; emptied when a step begins.
        throughput: to count the steps' time.
        display: shows each step.
        log: takes a line for each step; None in other processes.
        interrupted: says whether the user wants to stop.
        minutes: to stop after.
        state: of ``state()``, when a run goes on.
    """

    def __init__(
        self,
        settings: TrainSettings,
        folder: Path,
        config: M2RNNConfig,
        batches: PackedBatches,
        accumulation: int,
        losses: list[Tensor],
        throughput: Throughput,
        display: Display,
        log: Log | None,
        interrupted: Callable[[], bool],
        minutes: float | None,
        state: Mapping[str, Any] | None,
    ) -> None:
        self.settings, self.folder, self.config, self.batches = settings, folder, config, batches
        self.accumulation, self.losses, self.throughput = accumulation, losses, throughput
        self.display, self.log, self.interrupted = display, log, interrupted
        state = state or {"seconds": 0.0, "losses": [], "spikes": 0}
        self._earlier_seconds: float = state["seconds"]
        self._began = time.monotonic()
        self._deadline = math.inf if minutes is None else self._began + 60 * minutes
        self._losses: deque[float] = deque(state["losses"], REMEMBERED)
        self._losses_of_entry: list[float] = []
        self.spikes: int = state["spikes"]
        self.step: Step | None = None

    @property
    def seconds(self) -> float:
        """Of training, interruptions left out."""
        return self._earlier_seconds + time.monotonic() - self._began

    @property
    def last_losses(self) -> list[float]:
        """Of the last steps, ``REMEMBERED`` at most."""
        return list(self._losses)

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold for the run to go on."""
        log_bytes = 0 if self.log is None else self.log.size_on_disk()
        state = {"seconds": self.seconds, "losses": list(self._losses), "spikes": self.spikes}
        return {"log_bytes": log_bytes, "monitor": state}

    def entries(self) -> dict[str, float]:
        """The last step, and the mean loss since the last call, for transformers' integrations."""
        if self.step is None:
            return {}
        speed = self.throughput.last
        # Without steps such as one that was skipped for its NaN.
        finite = [loss for loss in self._losses_of_entry if math.isfinite(loss)]
        self._losses_of_entry.clear()
        loss = sum(finite) / len(finite) if finite else math.nan
        entries = {"loss": loss, "grad_norm": self.step.norm, "tokens_per_second": speed}
        utilisation = self.throughput.utilisation(speed)
        if utilisation is not None:
            entries["mfu"] = utilisation
        return entries | {f"grad_norm/{kind}": norm for kind, norm in self.step.norms.items()}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        state.logging_steps = int(args.logging_steps)  # which Trainer takes from the checkpoint

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        source = np.random.SeedSequence([self.settings.seed, state.global_step, args.process_index])
        torch.manual_seed(int(source.generate_state(1)[0]))
        self.losses.clear()

    @torch.no_grad()
    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model: nn.Module = kwargs["model"]
        micro_losses = torch.stack(self.losses)
        by_kind = gradients_by_kind(model, self.config)
        norms = torch.stack([total_norm(gradients) for gradients in by_kind.values()])
        # A signal may reach one process alone: all must stop, and give the same reason.
        wishes = micro_losses.new_tensor([self.interrupted(), time.monotonic() > self._deadline])
        mine = torch.cat([micro_losses.sum()[None], wishes])
        together: Tensor = reduce(mine, "sum")
        loss, interrupted, late = together.tolist()
        numbers = dict(zip(by_kind, norms.tolist(), strict=True))
        self.step = Step(loss / args.world_size, numbers, stop=interrupted + late > 0, interrupted=interrupted > 0)

        number = state.global_step + 1
        if number in self.settings.skip_steps:
            for parameter in model.parameters():
                parameter.grad = None
        elif not math.isfinite(self.step.loss + self.step.norm):
            self._stop_before_damage(args, number, micro_losses)
        else:
            parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
            norm = torch.linalg.vector_norm(norms)
            clip_grads_with_norm_(parameters, self.settings.max_gradient_norm, norm)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        number = state.global_step + 1
        if number % self.settings.bound_every == 0 or number == self.settings.steps:
            bound_state_weights(kwargs["model"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert self.step is not None
        self.throughput.step()
        number, loss, speed = state.global_step, self.step.loss, self.throughput.last
        # The scheduler has moved on to the next step's rate.
        rate = kwargs["lr_scheduler"].lr_lambdas[0](number - 1) * self.settings.learning_rate
        utilisation = self.throughput.utilisation(speed)
        spike = self._is_spike(loss)
        skipped = number in self.settings.skip_steps
        self._losses_of_entry.append(loss)
        if math.isfinite(loss):
            self._losses.append(loss)
        self.spikes += spike
        if self.log is not None:
            notes: dict[str, Any] = {}
            if spike:
                notes["spike"] = self._rows(number - 1, range(self.accumulation * args.world_size), args.world_size)
            if skipped:
                notes["skipped"] = True
            self.log.write(
                step=number,
                tokens=number * self.throughput.tokens,
                loss=loss if math.isfinite(loss) else None,
                learning_rate=rate,
                gradient_norm=self.step.norm if math.isfinite(self.step.norm) else None,
                gradient_norms={k: norm if math.isfinite(norm) else None for k, norm in self.step.norms.items()},
                tokens_per_second=round(speed, 1),
                mfu=None if utilisation is None else round(utilisation, 4),
                seconds=round(self.seconds, 2),
                **notes,
            )
        left = (self.settings.steps - number) * self.throughput.tokens / self.throughput.mean
        used = "" if utilisation is None else f", MFU {utilisation:.1%}"
        self.display.update(
            f"step {number:,} of {self.settings.steps:,}, loss {loss:.4f}, learning rate {rate:.2e}, "
            f"{speed:,.0f} tokens/s{used}, {duration(left)} left"
        )
        control.should_training_stop = control.should_training_stop or self.step.stop
        is_last = number == self.settings.steps
        control.should_save = self.step.stop or is_last or number % self.settings.checkpoint_every == 0

    def _is_spike(self, loss: float) -> bool:
        if len(self._losses) < REMEMBERED:
            return False
        return bool(loss > np.mean(self._losses) + SPIKE * np.std(self._losses))

    def _stop_before_damage(self, args: TrainingArguments, number: int, micro_losses: Tensor) -> None:
        assert self.step is not None
        world, process = args.world_size, args.process_index
        # Batch b of a step goes to process b mod world.
        bad_here = [i * world + process for i in (~micro_losses.isfinite()).nonzero().flatten().tolist()]
        bad: list[int] = sorted(gather_object(bad_here))
        rows = self._rows(number - 1, bad or range(self.accumulation * world), world)
        if bad:
            what = f"the loss of {len(bad)} of the {self.accumulation * world} micro-batches is no finite number"
        else:
            kinds = [kind for kind, norm in self.step.norms.items() if not math.isfinite(norm)]
            what = f"the loss is {self.step.loss:.4g}, but the gradient is no finite number in {', '.join(kinds)}"
        shown = "; ".join(
            f"epoch {row['epoch']}, window {row['window']}, documents {row['first_document']} to {row['last_document']}"
            for row in rows[:NAMED_ROWS]
        )
        more = f" and {len(rows) - NAMED_ROWS} more" if len(rows) > NAMED_ROWS else ""
        if self.log is not None:
            norms = {kind: str(norm) for kind, norm in self.step.norms.items()}
            content = {"step": number, "loss": str(self.step.loss), "gradient_norms": norms, "rows": rows}
            write_whole_file(self.folder / NON_FINITE, to_json(content))
        raise NonFiniteError(
            f"step {number}: {what}. Rows: {shown}{more}. The weights were not changed by this step and the last "
            f"checkpoint is whole; {self.folder / NON_FINITE} has all rows. To go on without this step add "
            f"skip_steps=[{', '.join(map(str, [*self.settings.skip_steps, number]))}] to the command"
        )

    def _rows(self, step: int, numbers: Iterable[int], processes: int) -> list[dict[str, int]]:
        """The rows of some batches of a step, counted from 0."""
        first = step * self.accumulation * processes
        return [row for number in numbers for row in self.batches.describe(first + number)]


def gradients_by_kind(model: nn.Module, config: M2RNNConfig) -> dict[str, list[Tensor]]:
    """The gradients of embedding, mixers and MLPs (by their names, with the norm before each), final norm and head."""
    found: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found.setdefault(kind_of(name, config), []).append(parameter.grad)
    return found


def kind_of(name: str, config: M2RNNConfig) -> str:
    """The kind of layer that a parameter of ``M2RNNForCausalLM`` belongs to."""
    parts = name.split(".")
    if parts[0] == "lm_head":
        return "head"
    if parts[1] == "embed_tokens":
        return "embedding"
    if parts[1] == "layers":
        names = config.mixers if parts[3].startswith("mixer") else config.mlps
        return names[int(parts[2])]
    return "norm"


def total_norm(gradients: list[Tensor]) -> Tensor:
    """The norm of all together, of all processes' shards."""
    norm = get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def duration(seconds: float) -> str:
    """``5025`` as ``1 h 23 min``."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
