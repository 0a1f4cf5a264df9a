"""Which layers to adapt where nobody says: the default targets of each architecture, as PEFT has them.

    model_type        what a transformers model calls its architecture, in model.config
    default targets   the layers that [LoRA] section 7.1 finds worth adapting first: queries and values of attention.
                      Where one matrix makes queries, keys and values (GPT-2, BLOOM, Falcon, GPT-NeoX): that one

    inject(model, default_targets(model), lambda base: lora_layer(base, r=8, alpha=16))

The other choice, "all-linear", needs no table: every linear layer but the output head (inject.match_targets). Read
before this file: inject.
"""

from typing import Any

from torch import nn

from minilora.torch_lora.inject import match_targets

# transformers' model_type -> last parts of module names. An adapter trained with these has the layers that PEFT's has.
DEFAULT_TARGETS: dict[str, tuple[str, ...]] = {
    "bert": ("query", "value"),
    "bloom": ("query_key_value",),
    "falcon": ("query_key_value",),
    "gpt2": ("c_attn",),
    "gpt_neox": ("query_key_value",),
    "llama": ("q_proj", "v_proj"),
    "mistral": ("q_proj", "v_proj"),
    "opt": ("q_proj", "v_proj"),
    "phi": ("q_proj", "v_proj", "fc1", "fc2"),  # the MLP as well
    "qwen2": ("q_proj", "v_proj"),
    "t5": ("q", "v"),
}


def default_targets(model: nn.Module) -> list[str]:
    """Name the layers to adapt in a model of a known architecture: what PEFT adapts when it is told nothing.

    Raises:
        ValueError: if the model does not say its `config.model_type`, or it is not in DEFAULT_TARGETS, or the model
            has no such layers; the error names the model's linear layers.

    >>> default_targets(nn.Sequential(nn.Linear(3, 3)))
    Traceback (most recent call last):
    ValueError: no default targets for a Sequential, which has no config.model_type: name the layers to adapt, some
    of ['0'], or take "all-linear"
    """
    model_type: Any = getattr(getattr(model, "config", None), "model_type", None)
    if isinstance(model_type, str) and model_type in DEFAULT_TARGETS:
        targets = list(DEFAULT_TARGETS[model_type])
        match_targets(model, targets)
        return targets
    says = "which has no config.model_type" if model_type is None else f"model_type {model_type!r}"
    [names] = match_targets(model, "all-linear").values()
    linear = sorted({name.rpartition(".")[2] for name in names})
    raise ValueError(
        f"no default targets for a {type(model).__name__}, {says}: name the layers to adapt, some of {linear}, "
        'or take "all-linear"'
    )
