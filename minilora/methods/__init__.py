"""The family: what others made of LoRA, one paper a file, each over a whole layer or model of the base."""

from minilora.methods.dora import DoRAConv1D, DoRALinear, dora_layer
from minilora.methods.layer_for import layer_for
from minilora.methods.loraplus import loraplus_groups
from minilora.methods.prompt import PrefixTuning, PromptTuning

__all__ = ["DoRAConv1D", "DoRALinear", "PrefixTuning", "PromptTuning", "dora_layer", "layer_for", "loraplus_groups"]
