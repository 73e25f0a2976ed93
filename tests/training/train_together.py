"""One of the processes of a training under torchrun on the CPU: python train_together.py FOLDER KEY=VALUE…

With fsdp=true accelerate, which shards over GPUs only, is told that the CPU is one.
"""

import sys
from pathlib import Path
from typing import Any

from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from m2rnn.training.train import leave_process_group, train
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
    if "fsdp=true" in sys.argv:
        shard_on_cpu()
    train(load_settings(None, sys.argv[2:]), Path(sys.argv[1]))
    leave_process_group()


if __name__ == "__main__":
    main()
