"""What each of two processes does in test_distributed: `torchrun … two_processes.py everything FOLDER`, say."""

import json
import random
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_run import CONFIG
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from minilora.llm import Decoder, ModelConfig
from minilora.llm.architectures import ALL_LINEAR
from minilora.qlora import PagedAdamW, QLoRALinear
from minilora.torch_lora import LoRALinear, inject
from minilora.train import Batch, collate, mask_prompt, train
from minilora.train import distributed as minilora_distributed
from minilora.train.distributed import data_parallel, process_group, sharded

METHODS = {"lora": LoRALinear, "qlora": QLoRALinear}
WAYS = {"ddp": data_parallel, "fsdp": sharded}
CASES = [
    (method, way, n_parts, checkpointing)
    for method in METHODS
    for way in WAYS
    for n_parts, checkpointing in ((1, False), (3, False), (1, True))
]
SOME = [("lora", "ddp", 1, False), ("qlora", "fsdp", 1, False)]
VOCAB, N_STEPS = 97, 20


class Collectives(TorchDispatchMode):
    """The names of what processes did together within it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.names.add(func.__name__.partition(".")[0])
        return func(*args, **(kwargs or {}))


def tiny_model(method: str, seed: int = 0) -> Decoder:
    torch.manual_seed(1)
    model = Decoder(ModelConfig.from_hf(CONFIG | {"vocab_size": VOCAB}))
    torch.nn.init.normal_(model.model.embed_tokens.weight)
    start = torch.Generator().manual_seed(seed)
    inject(model, ALL_LINEAR, lambda base: METHODS[method](base, r=4, alpha=8, generator=start))
    return model


def batches() -> list[Batch]:
    """Of one to seven rows, whose answers have one to eleven tokens; each comes again, so that it is learnt."""
    rng = random.Random(0)

    def tokens(most: int) -> list[int]:
        return [rng.randrange(1, VOCAB) for _ in range(rng.randint(1, most))]

    different = [
        collate([mask_prompt(tokens(8), tokens(11), eos=0) for _ in range(rows)], pad=0) for rows in (1, 7, 2, 4, 3)
    ]
    return different * (N_STEPS // len(different))


def trained(model: Decoder, gradients=None) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Losses and norms of 20 steps, and the adapters after them."""
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = PagedAdamW(adapters.values(), lr=1e-2, weight_decay=0.0)
    steps = train(model, batches(), optimizer, gradients=gradients).steps
    return [s.loss for s in steps], [s.grad_norm for s in steps], {n: p.detach().clone() for n, p in adapters.items()}


def one_case(method: str, way: str, n_parts: int, checkpointing: bool, rank: int, path: Path) -> None:
    sent: list[int] = []

    class Counted(DistributedDataParallel):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.register_comm_hook(None, count)

    def count(state, bucket):
        sent.append(bucket.buffer().nbytes)
        return allreduce_hook(None, bucket)

    minilora_distributed.DistributedDataParallel = Counted
    model = tiny_model(method, seed=rank)  # the second process begins with another adapter, and is given the first's
    model.model.gradient_checkpointing = checkpointing
    whole_bytes = frozen_bytes(model)
    gradients = WAYS[way](model, n_parts)
    losses, norms, adapters = trained(model, gradients)
    with Collectives() as seen:
        gradients(model, batches()[1])
    found = {
        "losses": losses,
        "norms": norms,
        "sent_bytes": sum(sent) / (N_STEPS + 1),
        "whole_bytes": whole_bytes,
        "kept_bytes": frozen_bytes(model),
        "collectives": sorted(seen.names),
    }
    path.with_suffix(".json").write_text(json.dumps(found))
    save_file(adapters, path.with_suffix(".safetensors"))


def frozen_bytes(model: Decoder) -> int:
    """Bytes of frozen tensors that lie in this process."""
    held = [*model.parameters(), *model.buffers()]
    here = [t.to_local() if isinstance(t, DTensor) else t for t in held if not t.requires_grad]
    return sum(t.nbytes for t in here)


def bad_numbers(way: str, rank: int, path: Path) -> None:
    """What is said of a loss that is not finite: of a bad weight, and of good ones that overflow."""
    said = []
    for layer, value in (("up_proj", float("nan")), ("down_proj", 3e38)):
        model = tiny_model("lora")
        with torch.no_grad():
            model.model.layers[1].mlp.get_submodule(layer).B.fill_(value)
        try:
            trained(model, WAYS[way](model))
        except FloatingPointError as error:
            said.append(str(error))
    path.with_suffix(".json").write_text(json.dumps(said))


def main(what: str, folder: Path) -> None:
    with process_group() as (rank, world):
        assert world == 2
        if what in WAYS:  # a short run, to look at its end
            model = tiny_model("qlora")
            optimizer = PagedAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
            train(model, batches()[:3], optimizer, gradients=WAYS[what](model))
            del model, optimizer
            return
        for case in CASES if what == "everything" else SOME:
            one_case(*case, rank, folder / f"{name_of(*case)}-{rank}")
        for way in WAYS if what == "everything" else []:
            bad_numbers(way, rank, folder / f"bad-{way}-{rank}")


def name_of(method: str, way: str, n_parts: int, checkpointing: bool) -> str:
    return f"{method}-{way}-{n_parts}-{checkpointing}"


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
