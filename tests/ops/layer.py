"""What the processes of the DDP test run: imports little, since each of them starts from nothing."""

from datetime import timedelta

import torch
from torch import Tensor, nn

from m2rnn.ops import m2rnn_scan


class Layer(nn.Module):
    """The least that uses the operator as a layer does: projections and a weight."""

    def __init__(self, width: int = 6, heads: int = 2, key: int = 3, value: int = 4) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.sizes = (key, key, heads * value, heads)
        self.heads, self.value = heads, value
        self.project = nn.Parameter(0.7 * torch.randn(sum(self.sizes), width, generator=generator))
        self.weight = nn.Parameter(torch.randn(heads, value, value, generator=generator) / 2)

    def forward(self, x: Tensor, backend: str | None = None) -> Tensor:
        q, k, v, f = (x @ self.project.T).split(self.sizes, -1)
        v = v.unflatten(-1, (self.heads, self.value))
        y, state = m2rnn_scan(
            q[..., None, :],
            k[..., None, :],
            v,
            f.sigmoid(),
            self.weight,
            output_final_state=True,
            state_clip=0.5,
            backend=backend,
        )
        return torch.cat([y.flatten(1), state.flatten(1)], 1)


def layer_inputs(batch: int = 4, device: str = "cpu") -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(batch, 37, 6, generator=generator)
    return x.to(device), torch.randn(batch, 37 * 8 + 24, generator=generator).to(device)


def train_half(rank: int, folder: str, backend: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=90),
    )
    layer = nn.parallel.DistributedDataParallel(Layer())
    x, cotangent = layer_inputs()
    mine = slice(2 * rank, 2 * rank + 2)
    (layer(x[mine], backend) * cotangent[mine]).sum().backward()
    torch.save({name: p.grad for name, p in layer.module.named_parameters()}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()
