"""One of the processes of a training under torchrun on the CPU: python train_together.py FOLDER MINUTES KEY=VALUE…

With fsdp=true accelerate, which shards over GPUs only, is told that the CPU is one. After each micro-batch all
gradients must be sharded. With SIGNALLED=RANK in the environment Ctrl-C reaches that process alone.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.tensor import DTensor

from m2rnn.models import loss
from m2rnn.training.monitor import Monitor
from m2rnn.training.train import Stopped, leave_process_group, train
from m2rnn.training.train_settings import load_settings
from m2rnn.training.trainer import CheckpointingTrainer


def shard_on_cpu() -> None:
    make = CheckpointingTrainer.create_accelerator_and_postprocess

    def make_sharding(self: Any) -> None:
        make(self)
        # An AcceleratorState made later takes it from there.
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.accelerator.state.distributed_type = DistributedType.FSDP
        self.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
        self.is_fsdp_enabled = True

    step = CheckpointingTrainer.training_step

    def sharded_step(self: Any, model: Any, *arguments: Any, **options: Any) -> Any:
        loss = step(self, model, *arguments, **options)
        assert self.accelerator.is_fsdp2
        assert all(isinstance(parameter.grad, DTensor) for parameter in model.parameters())
        return loss

    CheckpointingTrainer.create_accelerator_and_postprocess = make_sharding  # type: ignore[method-assign]
    CheckpointingTrainer.training_step = sharded_step  # type: ignore[method-assign]


def interrupt() -> None:
    begin = Monitor.on_step_begin

    def begin_step(self: Any, *arguments: Any, **options: Any) -> None:
        begin(self, *arguments, **options)
        signal.raise_signal(signal.SIGINT)

    Monitor.on_step_begin = begin_step  # type: ignore[method-assign]


def main() -> None:
    folder, minutes, *overrides = sys.argv[1:]
    sharded = "fsdp=true" in overrides
    if sharded:
        shard_on_cpu()
        loss.LOGITS_PER_CHUNK = 4096  # so that the loss is of many parts
    if os.environ.get("SIGNALLED") == os.environ["RANK"]:
        interrupt()
    try:
        train(load_settings(None, overrides), Path(folder), minutes=float(minutes))
    except Stopped as stopped:
        sys.stdout.write(f"{stopped!r}\n")
        sys.stdout.flush()
        leave_process_group()  # as the command does, while the exception holds the trainer
    else:
        leave_process_group()
    if sharded:
        os._exit(0)  # DTensor's caches hold the group whatever one does: its threads could abort the usual end
    threads = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").glob("*")]
    assert not [name for name in threads if "gloo" in name], threads


if __name__ == "__main__":
    main()
