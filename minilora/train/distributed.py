"""Training in several processes, started by torchrun: each takes some rows of a batch, all take the same step.

    rank, world    the number of a process, from 0, and how many there are
    share          the rows that a process takes: rank, rank + world, … (neighbours are of like length: all get alike)

        loss = Σ over shares of loss(share) · labels(share) / labels(batch)

    data_parallel  every process holds the whole model; the adapters' gradients are summed: torch's DDP
    sharded        beside that, each process keeps only a part of every frozen weight: torch's FSDP2. A layer is
                   gathered when it is computed, forward and backward, and the others' parts are dropped again

Frozen weights are what needs memory, so they are sharded. Adapters are not: whole in every process, they are ordinary
tensors, and clipping, the 8-bit optimizer, checkpoints and saving need know nothing of processes. The price is 16 bytes
a trained number (itself, gradient, two moments): 0.6 GiB for Llama-2-7B with r=16 in all its linear layers.

Read before: train/trainer (in_parts).
"""

import gc
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from minilora.llm.model import Layer
from minilora.qlora.linear import NF4Linear
from minilora.train.data import Batch
from minilora.train.loss import loss_of

Gradients = Callable[[nn.Module, Batch], float]


@contextmanager
def process_group(device_type: str = "cpu") -> Iterator[tuple[int, int]]:
    """Meet the other processes of a torchrun, and part from them in the end: `with process_group() as (rank, world)`.

    They talk by gloo; on CUDA by nccl, each with the GPU of its own number. Models belong into a function that is
    called within: one that is still there when the processes part may abort them.

    Raises:
        ValueError: if torchrun did not start this process.
    """
    if "RANK" not in os.environ:
        raise ValueError("this is no process of several: start it by `torchrun --nproc-per-node 2 -m minilora.cli …`")
    if device_type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device_type == "cuda" else "gloo")
    try:
        yield dist.get_rank(), dist.get_world_size()
        gc.collect()  # DDP and FSDP2 hold themselves in cycles, and threads of their own with them
        dist.barrier()  # not after an error: the others may wait elsewhere, until torchrun ends them
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True)
class Together:
    """What several processes do otherwise than one in a training: train/finetune."""

    rank: int
    gradients: Gradients

    def anywhere(self, flag: bool) -> bool:
        """Whether it is so in any process: one that stopped alone would leave the others waiting for its gradients."""
        found = torch.tensor(int(flag))
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return bool(found)

    def check_same(self, done: int) -> None:
        """
        Raises:
            ValueError: if not all processes have made as many steps.
        """
        steps = [torch.zeros((), dtype=torch.int64) for _ in range(dist.get_world_size())]
        dist.all_gather(steps, torch.tensor(done))
        if len(different := sorted(set(map(int, steps)))) > 1:
            raise ValueError(
                f"the processes would go on from the steps {different}: they do not see the same --out; put it on a "
                "file system that all of them share"
            )


def data_parallel(model: nn.Module, n_parts: int = 1) -> Gradients:
    """A `gradients` for train: a process computes its share of each batch, in `n_parts`; gradients are summed over all.

    Loss and gradients are those of the whole batch up to rounding, and the same bits in all processes. Nothing but the
    gradients of what trains, and the loss, is exchanged. What trains begins in all processes as it is in the first.
    """
    return _summed_gradients(BatchLoss(model), n_parts)


def sharded(model: nn.Module, n_parts: int = 1) -> Gradients:
    """As data_parallel, with the frozen weights sharded, in place: a decoder's layers, its embedding, head and norm.

    4-bit weights are sharded as the bytes they are; their units, 3 % of them, are not. From now on the model is
    computed by the `gradients` alone. The adapters stay as they are, to be trained and saved.
    """
    for module in model.modules():
        if isinstance(module, NF4Linear):  # FSDP2 shards parameters; a buffer it leaves whole
            packed = module.packed
            del module.packed
            module.packed = nn.Parameter(packed, requires_grad=False)
    trained = {p for p in model.parameters() if p.requires_grad}
    mesh = init_device_mesh(next(model.parameters()).device.type, (dist.get_world_size(),))
    root = BatchLoss(model)
    for module in [*(m for m in model.modules() if isinstance(m, Layer)), root]:
        fully_shard(module, mesh=mesh, ignored_params=trained)
    return _summed_gradients(root, n_parts)


class BatchLoss(nn.Module):
    """loss_of as a module: DDP and FSDP2 act when a module is called, and loss_of reaches past the model's own call.

    FSDP2 has gathered embedding, head and norm when this is called, so that the head's weight can be used alone.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.decoder = model

    def forward(self, batch: Batch) -> Float[Tensor, ""]:
        return loss_of(self.decoder, batch)


def shares(batch: Batch, rank: int, world: int, n_parts: int) -> list[tuple[Batch, float]]:
    """What a process computes of a batch, one part after the other, each with its share of the batch's labels.

    Every process has as many parts, for all must be there whenever something is exchanged: where no row is left, it is
    the first one once more, which counts nothing.
    """
    found = []
    for start in range(rank, world * n_parts, world):
        which = torch.arange(start, max(start, len(batch.tokens)), world * n_parts)
        part = batch.rows(which if len(which) else torch.tensor([0]))
        found.append((part, part.n_labels / batch.n_labels if len(which) else 0.0))
    return found


def _summed_gradients(root: BatchLoss, n_parts: int) -> Gradients:
    if n_parts < 1:
        raise ValueError(f"cannot take a share of a batch in {n_parts} parts: choose 1 or more")
    rank, world = dist.get_rank(), dist.get_world_size()
    held = [*root.named_parameters(remove_duplicate=False), *root.named_buffers()]
    frozen = [name for name, tensor in held if not tensor.requires_grad]  # DDP would send them, and buffers every time
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(root, frozen)
    ddp = DistributedDataParallel(root, gradient_as_bucket_view=True)

    def gradients(model: nn.Module, batch: Batch) -> float:
        total = torch.zeros((), dtype=torch.float64, device=next(model.parameters()).device)
        for number, (part, weight) in enumerate(shares(batch, rank, world, n_parts), start=1):
            with nullcontext() if number == n_parts else ddp.no_sync():  # gradients are exchanged once a batch
                loss = ddp(part) * weight
                (loss * world).backward()  # DDP gives the mean over processes
            total += loss.detach()
            del loss
        dist.all_reduce(total)
        unshard: Any = getattr(root, "unshard", None)
        if unshard and not math.isfinite(total.item()):
            unshard()  # the trainer will ask the model where that arose
        return total.item()

    return gradients
