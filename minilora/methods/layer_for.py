"""Which layers an adapter's file is of: LoRA's, or DoRA's, as its config says.

    load_adapter(model, folder, layer_for(folder))

Read before this file: dora, torch_lora/peft_format.
"""

from collections.abc import Callable
from pathlib import Path

from torch import nn

from minilora.methods.dora import dora_layer
from minilora.torch_lora import lora_layer
from minilora.torch_lora.peft_config import CONFIG_FILE, read_config


def layer_for(folder: str | Path) -> Callable[..., nn.Module]:
    """The `wrap` of load_adapter that makes the layers of this adapter.

    Raises:
        FileNotFoundError: if the folder has no config.
        ValueError: if the config is damaged, or asks for what is not read.
    """
    return dora_layer if read_config(Path(folder) / CONFIG_FILE).use_dora else lora_layer
