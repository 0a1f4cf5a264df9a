"""The family: what others made of LoRA, one paper a file, each over a whole layer or model of the base."""

from minilora.methods.dora import DoRAConv1D, DoRALinear, dora_layer
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
from minilora.methods.layer_for import layer_for
from minilora.methods.loraplus import loraplus_groups

__all__ = [
    "DoRAConv1D",
    "DoRALinear",
    "LoftQBase",
    "LoftQLinear",
    "OLoRAConv1D",
    "OLoRALinear",
    "PiSSAConv1D",
    "PiSSALinear",
    "dora_layer",
    "layer_for",
    "loraplus_groups",
    "olora_layer",
    "pissa_layer",
]
