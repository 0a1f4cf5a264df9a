"""A task whose answer is known: an update of rank k is planted in some layers of a model, and LoRA is to find it.

    teacher   a copy of the model with W + ΔW in the planted layers; ΔW has k singular values, all equal
    student   the model as it was, with adapters

        loss = mean over tokens of KL(teacher ‖ student), as a share of what it is without adapters

With rank k an adapter can say all that the teacher does, and nothing of the loss has to be left. With less it misses
singular values of which each is worth as much as the others (Eckart and Young 1936). So the elbow of a rank sweep is
known before it is measured, and so is where AdaLoRA's ranks should go.

Read before this file: train/trainer, methods/adalora_budget.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from minilora.llm.config import ModelConfig
from minilora.llm.model import Decoder
from minilora.methods import RankAllocator, RankSchedule, adalora_layer, orthogonality, rank_report
from minilora.torch_lora import LoRALinear, inject
from minilora.torch_lora.inject import ALL_LINEAR
from minilora.train.data import Batch
from minilora.train.methods import GAMMA
from minilora.train.trainer import train, warmup_then_decay

CONFIG = ModelConfig(vocab_size=64, hidden_size=48, intermediate_size=96, n_layers=2, n_heads=4, n_kv_heads=2)
PLANTED = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")
SIZE = 0.5  # ‖ΔW‖ / ‖W‖ of a planted layer
TEXT, BATCH = 16, 16  # tokens of a text, texts of a step
UNSEEN = 32  # texts that the loss is measured on
LR = 0.03


@torch.no_grad()
def plant(model: nn.Module, layers: Sequence[str], k: int, size: float, generator: torch.Generator) -> nn.Module:
    """Make the teacher: a copy whose named linear layers hold an update of rank k, of ‖ΔW‖ = size · ‖W‖.

        ΔW = s U Vᵀ, with U (out, k) and V (in, k) of random orthonormal columns and s = size · ‖W‖ / √k

    Raises:
        ValueError: if k is below 1 or above the smaller side of a layer.
    """
    teacher = copy.deepcopy(model)
    for name in layers:
        W = teacher.get_submodule(name).weight
        assert isinstance(W, Tensor)
        if not 1 <= k <= min(W.shape):
            raise ValueError(f"k is {k}: an update of {name}, a weight of {tuple(W.shape)}, has 1 to {min(W.shape)}")
        U, V = (torch.linalg.qr(torch.randn(features, k, generator=generator)).Q for features in W.shape)
        W += (size * W.norm() / math.sqrt(k)) * U @ V.T
    return teacher


def divergence(student: nn.Module, teacher: nn.Module, tokens: Int[Tensor, "batch seq"]) -> Float[Tensor, ""]:
    """KL(teacher ‖ student), nats per token."""
    with torch.no_grad():
        said = F.log_softmax(teacher(tokens).float(), dim=-1).flatten(0, 1)
    ours = F.log_softmax(student(tokens).float(), dim=-1).flatten(0, 1)
    return F.kl_div(ours, said, log_target=True, reduction="batchmean")


def small_model(seed: int) -> Decoder:
    """A random decoder that a laptop trains hundreds of times: two layers, and logits that differ from each other."""
    generator = torch.Generator().manual_seed(seed)
    model = Decoder(CONFIG)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.copy_(torch.randn(p.shape, generator=generator) / math.sqrt(p.shape[1]))
        model.lm_head.weight.mul_(3)
    return model.eval()


def loss_of_rank(r: int, k: int, seed: int, steps: int = 400) -> float:
    """Plant rank k in two layers of a small model and look for it with LoRA of rank r: the share of the loss left."""
    generator = torch.Generator().manual_seed(seed)
    student = small_model(seed)
    teacher = plant(student, PLANTED, k, SIZE, generator)
    inject(student, PLANTED, lambda base: LoRALinear(base, r=r, alpha=r, generator=generator))
    optimizer = torch.optim.Adam([p for p in student.parameters() if p.requires_grad], lr=LR)
    return hunt(student, teacher, optimizer, steps, generator)


def ranks_found(k: int, seed: int, steps: int = 600) -> dict[str, int]:
    """Plant rank k in two of fourteen layers, and let AdaLoRA share out 2 k triplets among all: who has how many.

    Raises:
        ValueError: if 2 k triplets cannot be a whole number a layer: k is a multiple of 7.
    """
    generator = torch.Generator().manual_seed(seed)
    student = small_model(seed)
    teacher = plant(student, PLANTED, k, SIZE, generator)
    torch.manual_seed(seed)  # of A and B
    inject(student, ALL_LINEAR, lambda base: adalora_layer(base, r=2 * k, alpha=2 * k))
    n_layers = len(rank_report(student).ranks)
    target_r, rest = divmod(len(PLANTED) * k, n_layers)
    if rest:
        raise ValueError(f"k is {k}: {len(PLANTED)} times it is to be a multiple of the {n_layers} layers")
    optimizer = torch.optim.Adam([p for p in student.parameters() if p.requires_grad], lr=LR)
    schedule = RankSchedule(target_r=target_r, n_steps=steps, t_init=steps // 4, t_final=steps // 3, delta_t=10)
    allocator = RankAllocator(student, schedule)
    optimizer.register_step_post_hook(lambda *_: allocator.step(allocator.done + 1))
    hunt(student, teacher, optimizer, steps, generator, lambda: GAMMA * orthogonality(student))
    return {name: rank for name, (rank, _) in rank_report(student).ranks.items()}


def hunt(
    student: Decoder,
    teacher: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    generator: torch.Generator,
    penalty: Callable[[], Tensor] | None = None,
) -> float:
    """Train the student towards the teacher, in place, on fresh random texts; give the share of the loss left."""
    vocab = student.config.vocab_size

    def texts(n: int) -> Batch:
        tokens = torch.randint(vocab, (n, TEXT), generator=generator)
        return Batch(tokens, tokens)

    def gradients(model: nn.Module, batch: Batch) -> float:
        loss = divergence(model, teacher, batch.tokens)
        (loss if penalty is None else loss + penalty()).backward()
        return loss.item()

    unseen = texts(UNSEEN).tokens
    with torch.no_grad():
        before = divergence(student, teacher, unseen).item()  # a new adapter changes nothing
    train(student, [texts(BATCH) for _ in range(steps)], optimizer, warmup_then_decay(steps, 20), gradients=gradients)
    with torch.no_grad():
        return divergence(student, teacher, unseen).item() / before


def elbow(losses: Mapping[int, Sequence[float]]) -> int:
    """The smallest rank that is as good as the best, as far as the seeds can tell.

        band   how far apart seeds alone put the losses of one rank: largest less least, the mean of all ranks
        elbow  the smallest r with  mean loss(r) ≤ least mean loss + band

    Raises:
        ValueError: if a rank has fewer than two losses: then nothing is known of the noise.

    >>> elbow({1: [0.7, 0.8], 2: [0.41, 0.45], 4: [0.11, 0.1], 8: [0.09, 0.1]})
    4
    """
    if not losses or min(map(len, losses.values())) < 2:
        raise ValueError("an elbow is told from noise by seeds: give every rank the losses of two or more")
    band = sum(max(found) - min(found) for found in losses.values()) / len(losses)
    means = {r: sum(found) / len(found) for r, found in losses.items()}
    return min(r for r, mean in means.items() if mean <= min(means.values()) + band)
