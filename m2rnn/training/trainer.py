"""transformers' Trainer with checkpoints of our own, which are whole and hold no pickle.

Trainer keeps the loop, data loader, devices, DDP, FSDP2, schedule and integrations. Replaced is only what reads and
writes checkpoints (it pickles the optimizer, the scheduler and the random state), and how bfloat16 comes in: accelerate
would use autocast with DDP, but bfloat16 weights with FSDP, which gives another residual stream and other decay
parameters.

Random numbers of a step depend on (seed, step, process) alone, so that there is no random state to save.

Private methods of Trainer that are overridden. A release of transformers may rename them; a test compares this list and
their parameters with the installed one.

    _save_checkpoint                   writes a folder that is whole or absent, with checksums and no pickle
    _load_from_checkpoint              reads its weights, sharded or not
    _load_optimizer_and_scheduler      reads its moments by parameter name, and the schedule from JSON
    _load_rng_state                    nothing: a step seeds itself
    _get_grad_norm                     nothing: Trainer's own scales by inf / norm, and one NaN would spread to every
                                       gradient before the monitor sees it

The first four would give way to a public hook for the storage of checkpoints, such as an argument of TrainingArguments.
The last is not needed once Trainer measures a norm without scaling by it. Without such hooks the way out is a loop of
our own over accelerate, which has all that is used of Trainer but its integrations. ``train.training_arguments`` also
sets ``_n_gpu`` to 1, since Trainer has no other switch against DataParallel.
"""

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from m2rnn.training.checkpoint import load_optimizer, load_state, load_weights, save_checkpoint

TRAINER_STATE = "trainer_state.json"  # the name that Trainer reads
NOT_SAVED: dict[str, Any] = {"log_history": [], "logging_steps": None}  # what log.jsonl has; what may change


class CheckpointingTrainer(Trainer):
    """Trainer for ``M2RNNForCausalLM``.

    Args:
        folder: of the run, for its checkpoints.
        keep_checkpoints: how many.
        autocast: whether to compute in bfloat16; weights, gradients and moments are float32 all the same.
        run_state: what else a checkpoint must hold, for JSON; called in the first process.
        entries: what to add to a log entry.
        losses: takes the loss of each micro-batch, its share of the step's mean, times the number of processes.
        **options: Trainer's own.
    """

    def __init__(
        self,
        *,
        folder: Path,
        keep_checkpoints: int,
        autocast: bool,
        run_state: Callable[[], dict[str, Any]],
        entries: Callable[[], dict[str, float]],
        losses: list[Tensor],
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.folder, self.keep_checkpoints, self.autocast = folder, keep_checkpoints, autocast
        self.run_state, self.entries, self.losses = run_state, entries, losses

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Weight decay for matrices and the like, embedding and head included.

        None for vectors (norms, biases) and for what the model spares: ``A_log``, ``dt_bias``, ``D``.
        """
        spared: set[str] = model.no_weight_decay()  # type: ignore[operator]
        return [name for name, weight in model.named_parameters() if weight.dim() > 1 and name not in spared]

    def compute_loss_context_manager(self) -> ExitStack:
        context = ExitStack()
        context.enter_context(torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.autocast))
        return context

    def training_step(self, *arguments: Any, **options: Any) -> Tensor:
        loss: Tensor = super().training_step(*arguments, **options)
        self.losses.append(loss)
        return loss.nan_to_num(0.0, 0.0, 0.0)  # Trainer's running sum would stay NaN after a step that is skipped

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None, *_: Any, **__: Any) -> Any:
        return grad_norm

    def get_batch_samples(self, *arguments: Any, **options: Any) -> tuple[list[Any], Tensor]:
        samples, labels = super().get_batch_samples(*arguments, **options)
        assert isinstance(labels, Tensor)
        return samples, labels.clamp(min=1)  # a step without labels, such as a lone eos, has the loss 0, not 0/0

    def log(self, logs: dict[str, float], *arguments: Any, **options: Any) -> None:
        super().log(logs | self.entries() if "loss" in logs else logs, *arguments, **options)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        scheduler = self.lr_scheduler
        assert scheduler is not None
        assert self.model is not None
        first = self.is_world_process_zero()
        save_checkpoint(
            self.folder,
            self.state.global_step,
            self.model,
            self.optimizer,  # type: ignore[arg-type] # accelerate's, which behaves like one
            {
                "step": self.state.global_step,
                "scheduler": scheduler.state_dict(),
                **(self.run_state() if first else {}),
            },
            files={TRAINER_STATE: json.dumps(asdict(self.state) | NOT_SAVED, indent=2).encode()},
            keep=self.keep_checkpoints,
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        weights = self.model if model is None else model
        assert weights is not None
        load_weights(Path(resume_from_checkpoint), weights)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        scheduler, optimizer = self.lr_scheduler, self.optimizer
        assert scheduler is not None
        assert optimizer is not None
        assert self.model is not None
        load_optimizer(Path(checkpoint), self.model, optimizer)
        scheduler.load_state_dict(load_state(Path(checkpoint))["scheduler"])
        for group, rate in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
            group["lr"] = rate

    def _load_rng_state(self, checkpoint: str | None) -> None:
        pass
