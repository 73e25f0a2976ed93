"""One of the processes that cut sharded W together, under torchrun on the CPU: python bound_together.py.

Each compares the whole with what one process makes of it: heads that cannot be shared out evenly, fewer heads than
processes, and the start of a sharded W.
"""

import sys

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from m2rnn.layers import M2RNN
from m2rnn.layers.state_weight import bound_state_weights

BOUND = 0.9
CASES = ((5, None), (5, 3), (5, 1), (1, None))  # heads, bounded heads


def layer_of(heads: int, bounded_heads: int | None) -> M2RNN:
    torch.manual_seed(heads)
    layer = M2RNN(8, num_heads=heads, key_dim=2, value_dim=6, weight_init="normal")
    layer.state_weight.data *= 3
    layer.state_weight_bound, layer.bounded_heads = BOUND, bounded_heads
    return layer


def main() -> None:
    distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for heads, bounded_heads in CASES:
        alone, shared = layer_of(heads, bounded_heads), layer_of(heads, bounded_heads)
        bound_state_weights(alone)
        shared.state_weight = nn.Parameter(distribute_tensor(shared.state_weight.data, mesh, [Shard(0)]))
        bound_state_weights(shared)
        found = shared.state_weight
        assert isinstance(found, DTensor)
        torch.testing.assert_close(found.full_tensor(), alone.state_weight, rtol=0, atol=1e-6)

        shared.reset_parameters()
        values = torch.linalg.svdvals(shared.state_weight.full_tensor().detach())
        count = heads if bounded_heads is None else bounded_heads
        assert (values[:count] < BOUND + 1e-6).all(), values
        assert (values[count:].amax(-1) > BOUND).all(), values
    distributed.destroy_process_group()
    sys.stdout.write("same\n")


if __name__ == "__main__":
    main()
