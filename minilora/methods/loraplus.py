"""LoRA+: B learns faster than A, by a fixed ratio; nothing else changes.

    η_A, η_B    the learning rates of A and B             ratio    η_B / η_A
    G_A, G_B    what the optimizer makes of their gradients

        A ← A − η_A · G_A        B ← B − η_A · ratio · G_B        [LoRAPlus] eq. 2 and section 3.2

B begins at zero and A does not, so that with one rate for both, A of a wide layer hardly learns anything: features are
learnt efficiently only where η_B / η_A grows with the layer's width ([LoRAPlus] theorem 1). The paper takes 2⁴, and a
smaller η_A than LoRA's rate. It is a matter of the optimizer alone: these groups are handed to one, and any layer that
trains A and B can be trained so.

Read before this file: torch_lora/layers, torch_lora/decay.
"""

import math
from typing import Any

from torch import nn

from minilora.torch_lora.decay import spared_tensors
from minilora.torch_lora.inject import adapter_layers
from minilora.torch_lora.layers import LoRAEmbedding

RATIO = 16.0  # [LoRAPlus] section 5


def loraplus_groups(
    model: nn.Module, *, lr: float, ratio: float = RATIO, embedding_lr: float = 1e-6, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Sort what trains into groups for an optimizer: A at `lr`, B at `lr` times `ratio`, embeddings' at their own rate.

    Vectors, such as DoRA's magnitudes and biases, go with B, as in PEFT. Without decay are those of the base, which are
    biases and norms, and what torch_lora/decay spares, as PEFT does not. Whole matrices that train go with A. Empty
    groups are left out.

    Raises:
        ValueError: if nothing trains, the ratio is below 1, or a rate is not positive.
    """
    if not (0 < lr < math.inf and 0 < embedding_lr < math.inf and 1 <= ratio < math.inf and weight_decay >= 0):
        raise ValueError(
            f"lr is {lr}, embedding_lr {embedding_lr}, ratio {ratio} and weight_decay {weight_decay}: "
            "rates are above 0, a ratio 1 or more, a decay 0 or more"
        )
    layers = adapter_layers(model).values()
    of_adapters = {p: name for layer in layers for name, p in layer.adapter_tensors().items()}
    of_embeddings = {p for y in layers if isinstance(y, LoRAEmbedding) for p in y.adapter_tensors().values()}
    spared = spared_tensors(model)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for p in (p for p in model.parameters() if p.requires_grad):
        like_b = of_adapters.get(p) == "B" or p.ndim == 1
        rate = embedding_lr if p in of_embeddings else lr * ratio if like_b else lr
        decay = 0.0 if p in spared or (p.ndim == 1 and p not in of_adapters) else weight_decay
        groups.setdefault((rate, decay), []).append(p)
    if not groups:
        raise ValueError("nothing in this model trains: inject(model, targets, wrap) gives it an adapter")
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]
