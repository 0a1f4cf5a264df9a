"""The family: what others made of LoRA, one paper a file, each over a whole layer or model of the base."""

from minilora.methods.adalora import AdaLoRAConv1D, AdaLoRALinear, adalora_layer, orthogonality, rank_report, to_lora
from minilora.methods.adalora_budget import RankAllocator, RankSchedule
from minilora.methods.dora import DoRAConv1D, DoRALinear, dora_layer
from minilora.methods.galore import GaLoreAdamW
from minilora.methods.houlsby import HoulsbyLinear
from minilora.methods.houlsby_format import load_houlsby, save_houlsby
from minilora.methods.ia3 import IA3Linear, inject_ia3
from minilora.methods.inits import (
    LoftQBase,
    LoftQLinear,
    OLoRAConv1D,
    OLoRALinear,
    PiSSAConv1D,
    PiSSALinear,
    olora_layer,
    pissa_layer,
)
from minilora.methods.loraplus import loraplus_groups
from minilora.methods.peft_adalora import load_adalora, save_adalora
from minilora.methods.peft_ia3 import load_ia3, save_ia3
from minilora.methods.peft_prompt import load_prompt, save_prompt
from minilora.methods.prompt import PrefixTuning, PromptTuning

__all__ = [
    "AdaLoRAConv1D",
    "AdaLoRALinear",
    "DoRAConv1D",
    "DoRALinear",
    "GaLoreAdamW",
    "HoulsbyLinear",
    "IA3Linear",
    "LoftQBase",
    "LoftQLinear",
    "OLoRAConv1D",
    "OLoRALinear",
    "PiSSAConv1D",
    "PiSSALinear",
    "PrefixTuning",
    "PromptTuning",
    "RankAllocator",
    "RankSchedule",
    "adalora_layer",
    "dora_layer",
    "inject_ia3",
    "load_adalora",
    "load_houlsby",
    "load_ia3",
    "load_prompt",
    "loraplus_groups",
    "olora_layer",
    "orthogonality",
    "pissa_layer",
    "rank_report",
    "save_adalora",
    "save_houlsby",
    "save_ia3",
    "save_prompt",
    "to_lora",
]
