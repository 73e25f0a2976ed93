"""One of the processes of a training under torchrun on the CPU: python train_together.py FOLDER MINUTES KEY=VALUE…

With fsdp=true accelerate, which shards over GPUs only, is told that the CPU is one.
"""

import os
import sys
from pathlib import Path
from typing import Any

from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from m2rnn.models import loss
from m2rnn.training.train import Stopped, leave_process_group, train
from m2rnn.training.train_settings import load_settings
from m2rnn.training.trainer import CheckpointingTrainer


def shard_on_cpu() -> None:
    make = CheckpointingTrainer.create_accelerator_and_postprocess

    def make_sharding(self: Any) -> None:
        make(self)
        self.accelerator.state.distributed_type = DistributedType.FSDP
        self.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
        self.is_fsdp_enabled = True

    CheckpointingTrainer.create_accelerator_and_postprocess = make_sharding  # type: ignore[method-assign]


def main() -> None:
    folder, minutes, *overrides = sys.argv[1:]
    sharded = "fsdp=true" in overrides
    if sharded:
        shard_on_cpu()
        loss.LOGITS_PER_CHUNK = 4096  # so that the loss is of many parts
    try:
        train(load_settings(None, overrides), Path(folder), minutes=float(minutes))
    except Stopped:
        leave_process_group()  # as the command does, while the exception holds the trainer
    else:
        leave_process_group()
    if sharded:
        os._exit(0)  # DTensor's caches hold the group whatever one does: its threads could abort the usual end
    threads = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").glob("*")]
    assert not [name for name in threads if "gloo" in name], threads


if __name__ == "__main__":
    main()
