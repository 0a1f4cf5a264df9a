"""Small models of transformers' own, and how one under PEFT is compared with one under ours.

Tolerances are those of float32: each number here is a sum of at most 99 products, of size 1 or so, that the two sides
may add up in another order: 99 · 6e-8 < 1e-5.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel
from torch import Tensor, nn

from minilora.torch_lora.inject import adapter_layers

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
# A name that transformers will drop, and PEFT's words on hubs, heads and ties: nothing that is compared here.
QUIET = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"], "qwen2": ["q_proj", "up_proj"]}
LORA_NAMES = {"A": "lora_A.default.weight", "B": "lora_B.default.weight"}
Pairs = dict[str, tuple[nn.Parameter, nn.Parameter]]  # ours, PEFT's

SMALL = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
WITH_MLP = SMALL | {"intermediate_size": 48}
OF_GPT = {"vocab_size": 99, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
OF_T5 = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
MODELS = {
    "bert": (tf.BertForMaskedLM, tf.BertConfig, WITH_MLP),
    "bloom": (tf.BloomForCausalLM, tf.BloomConfig, OF_GPT | {"hidden_size": 32}),
    "falcon": (tf.FalconForCausalLM, tf.FalconConfig, SMALL | {"bias": True, "bos_token_id": 1, "eos_token_id": 2}),
    "gpt2": (tf.GPT2LMHeadModel, tf.GPT2Config, OF_GPT | {"n_embd": 32}),
    "gpt_neox": (tf.GPTNeoXForCausalLM, tf.GPTNeoXConfig, WITH_MLP),
    "llama": (tf.LlamaForCausalLM, tf.LlamaConfig, WITH_MLP | {"num_key_value_heads": 2}),
    "mistral": (tf.MistralForCausalLM, tf.MistralConfig, WITH_MLP | {"num_key_value_heads": 2}),
    "opt": (tf.OPTForCausalLM, tf.OPTConfig, SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 16}),
    "phi": (tf.PhiForCausalLM, tf.PhiConfig, WITH_MLP),
    "qwen2": (tf.Qwen2ForCausalLM, tf.Qwen2Config, WITH_MLP | {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "t5": (tf.T5ForConditionalGeneration, tf.T5Config, OF_T5),
    # T5 1.1: another MLP, which looks at its wo.weight too, and a head of its own
    "t5 gated": (
        tf.T5ForConditionalGeneration,
        tf.T5Config,
        OF_T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
}
TOKENS = torch.arange(2, 26).reshape(2, 12)


def tiny(kind: str, **changes) -> nn.Module:
    """A random model with logits of size 1, and biases and norms that are not the zeros and ones of a new one."""
    model_class, config_class, sizes = MODELS[kind]
    torch.manual_seed(1)
    model = model_class(config_class(**(sizes | changes))).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
        else:  # T5 does not divide the scores of attention by √head_dim: its q starts smaller, by so much
            nn.init.normal_(parameter, std=0.05 if name.endswith("Attention.q.weight") else 0.15)
    return model


def logits_of(model: nn.Module, kind: str) -> Tensor:
    """Logits of two texts, the second of them padded."""
    mask = torch.ones_like(TOKENS)
    mask[1, 9:] = 0
    given = {"decoder_input_ids": TOKENS[:, :7]} if kind.startswith("t5") else {}
    return model(input_ids=TOKENS, attention_mask=mask, **given).logits


def backward(model: nn.Module, kind: str) -> Tensor:
    """Gradients of a loss; the logits it came from."""
    logits = logits_of(model, kind)
    model.zero_grad()
    nn.functional.cross_entropy(logits.flatten(0, 1), TOKENS[:, : logits.shape[1]].flatten()).backward()
    return logits.detach()


def pairs(ours: nn.Module, theirs: PeftModel, peft_names: Mapping[str, str] = LORA_NAMES) -> Pairs:
    """Every tensor that trains in ours with PEFT's own, by layer and letter; in PEFT no other trains."""
    named = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    found = {
        f"{name}.{letter}": (tensor, named.pop(f"base_model.model.{name}.{peft_names[letter]}"))
        for name, layer in adapter_layers(ours).items()
        for letter, tensor in layer.adapter_tensors().items()
    }
    assert not named
    return found


@torch.no_grad()
def copy_from_peft(named: Pairs) -> None:
    """Give ours PEFT's numbers; what is a vector here may be a row or a column there."""
    for mine, its in named.values():
        mine.copy_(its.view_as(mine))


def assert_same_training(
    named: Pairs,
    backward_of_both: Callable[[], tuple[Tensor, Tensor]],
    optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW,
) -> None:
    """The same outputs and gradients before and after each of three steps."""
    optimizers = [optimizer(side, lr=1e-2) for side in zip(*named.values(), strict=True)]
    for _ in range(4):
        for side in optimizers:
            side.zero_grad()
        torch.testing.assert_close(*backward_of_both(), **CLOSE)
        for name, (mine, its) in named.items():
            assert its.grad.abs().max() > 1e-4, name  # or equality would say little
            torch.testing.assert_close(
                mine.grad, its.grad.view_as(mine), rtol=1e-4, atol=1e-5, msg=lambda m, k=name: f"{k}: {m}"
            )
        for side in optimizers:
            side.step()


@torch.no_grad()
def assert_files_go_both_ways(
    ours: nn.Module,
    theirs: PeftModel,
    folder: Path,
    save: Callable[..., Any],
    load: Callable[..., Any],
    logits: Callable[[nn.Module], Tensor],
    bases: tuple[nn.Module, nn.Module],
) -> nn.Module:
    """Each opens the other's files, over a fresh base for each, with PEFT's logits; give our model that did."""
    here, there = bases
    expected = logits(theirs)
    save(ours, folder / "ours")
    theirs.save_pretrained(folder / "theirs")
    torch.testing.assert_close(logits(PeftModel.from_pretrained(there, folder / "ours").eval()), expected, **CLOSE)
    load(here, folder / "theirs")
    torch.testing.assert_close(logits(here), expected, **CLOSE)
    return here
