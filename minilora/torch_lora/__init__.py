"""Layer 2: the handwritten LoRA module in PyTorch, put into any model by name, saved as PEFT saves."""

from minilora.torch_lora.adapter_layer import merged
from minilora.torch_lora.config import LoRAConfig
from minilora.torch_lora.inject import count_parameters, inject, match_targets, remove
from minilora.torch_lora.layers import LoRAConv1D, LoRAEmbedding, LoRALinear
from minilora.torch_lora.peft_format import load_adapter, save_adapter
from minilora.torch_lora.targets import default_targets
from minilora.torch_lora.train_whole import train_biases, train_modules
from minilora.torch_lora.wrap import lora_layer

__all__ = [
    "LoRAConfig",
    "LoRAConv1D",
    "LoRAEmbedding",
    "LoRALinear",
    "count_parameters",
    "default_targets",
    "inject",
    "load_adapter",
    "lora_layer",
    "match_targets",
    "merged",
    "remove",
    "save_adapter",
    "train_biases",
    "train_modules",
]
