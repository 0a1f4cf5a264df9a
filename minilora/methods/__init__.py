"""The family: what others made of LoRA, one paper a file, each over a whole layer or model of the base."""

from minilora.methods.adalora import AdaLoRAConv1D, AdaLoRALinear, adalora_layer, orthogonality, rank_report, to_lora
from minilora.methods.adalora_budget import RankAllocator, RankSchedule
from minilora.methods.dora import DoRAConv1D, DoRALinear, dora_layer
from minilora.methods.galore import GaLoreAdamW
from minilora.methods.layer_for import layer_for
from minilora.methods.loraplus import loraplus_groups

__all__ = [
    "AdaLoRAConv1D",
    "AdaLoRALinear",
    "DoRAConv1D",
    "DoRALinear",
    "GaLoreAdamW",
    "RankAllocator",
    "RankSchedule",
    "adalora_layer",
    "dora_layer",
    "layer_for",
    "loraplus_groups",
    "orthogonality",
    "rank_report",
    "to_lora",
]
