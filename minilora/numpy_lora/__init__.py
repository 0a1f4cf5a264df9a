"""Layer 1: LoRA, rank and NF4 as arithmetic you can print. Needs NumPy, not torch."""

from minilora.numpy_lora.forward import delta_weight, lora_backward, lora_forward, lora_init, merge, unmerge
from minilora.numpy_lora.rank import effective_rank, subspace_similarity, truncated_svd

__all__ = [
    "delta_weight",
    "effective_rank",
    "lora_backward",
    "lora_forward",
    "lora_init",
    "merge",
    "subspace_similarity",
    "truncated_svd",
    "unmerge",
]
