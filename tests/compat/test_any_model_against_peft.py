"""Eleven architectures of transformers, with the layers that PEFT adapts: the same outputs, gradients, training, files.

Tolerances are those of float32: each number here is a sum of at most 99 products, of size 1 or so, that the two sides
may add up in another order: 99 · 6e-8 < 1e-5.
"""

from pathlib import Path

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn

from minilora.qlora import QLoRALinear
from minilora.torch_lora import inject, load_adapter, lora_layer, save_adapter
from minilora.torch_lora.inject import adapter_layers, match_targets
from minilora.torch_lora.serve import AdapterServer
from minilora.torch_lora.targets import DEFAULT_TARGETS, default_targets

# A name that transformers will drop, and PEFT's word that it looked for a hub's config: nothing that is compared here.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]

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
DEFAULT, ALL_LINEAR = "default", "all-linear"
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


def in_peft(kind: str, targets: str, **changes) -> PeftModel:
    """The model under PEFT, every matrix of its adapter away from zero."""
    config = LoraConfig(
        r=4, lora_alpha=6, fan_in_fan_out=kind == "gpt2", target_modules=None if targets == DEFAULT else targets
    )
    model = get_peft_model(tiny(kind, **changes), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def in_ours(kind: str, targets: str, theirs: PeftModel, **changes) -> nn.Module:
    """The model with our layers, A and B as PEFT's."""
    model = tiny(kind, **changes)
    chosen = default_targets(model) if targets == DEFAULT else targets
    inject(model, chosen, lambda base: lora_layer(base, r=4, alpha=6))
    matrices = peft_matrices(theirs)
    with torch.no_grad():
        for key, matrix in our_matrices(model).items():
            matrix.copy_(matrices[key])
    return model


def our_matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        f"{name}.{letter}": getattr(layer, letter) for name, layer in adapter_layers(model).items() for letter in "AB"
    }


def peft_matrices(model: PeftModel) -> dict[str, nn.Parameter]:
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {
        name.removeprefix("base_model.model.").replace(".lora_", ".").removesuffix(".default.weight"): p
        for name, p in found.items()
    }


def backward(model: nn.Module, kind: str) -> Tensor:
    """Gradients of a loss; the logits it came from."""
    logits = logits_of(model, kind)
    model.zero_grad()
    nn.functional.cross_entropy(logits.flatten(0, 1), TOKENS[:, : logits.shape[1]].flatten()).backward()
    return logits.detach()


def assert_same_outputs_and_gradients(ours: nn.Module, theirs: PeftModel, kind: str) -> None:
    torch.testing.assert_close(backward(ours, kind), backward(theirs, kind), rtol=1e-5, atol=1e-5)
    expected = peft_matrices(theirs)
    for key, matrix in our_matrices(ours).items():
        assert expected[key].grad.abs().max() > 1e-4, key  # or equality would say little
        torch.testing.assert_close(
            matrix.grad, expected[key].grad, rtol=1e-5, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}"
        )


@pytest.fixture(params=MODELS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[DEFAULT, ALL_LINEAR])
def targets(request: pytest.FixtureRequest) -> str:
    return request.param


def test_our_default_targets_are_those_of_peft():
    theirs = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    assert {name: list(targets) for name, targets in DEFAULT_TARGETS.items()} == {n: theirs[n] for n in DEFAULT_TARGETS}
    assert DEFAULT_TARGETS.keys() == {kind for kind in MODELS if " " not in kind}


def test_the_same_layers_are_adapted(kind, targets):
    model = tiny(kind)
    hits = match_targets(model, default_targets(model) if targets == DEFAULT else targets)
    ours = {name for names in hits.values() for name in names}
    head = model.get_output_embeddings()

    assert {f"{name}.{letter}" for name in ours for letter in "AB"} == peft_matrices(in_peft(kind, targets)).keys()
    if targets == ALL_LINEAR:
        linear = (nn.Linear, tf.pytorch_utils.Conv1D)
        assert ours == {n for n, m in model.named_modules() if isinstance(m, linear) and m is not head}


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD], ids=lambda kind: kind.__name__)
def test_outputs_and_gradients_are_the_same_before_and_after_three_steps(kind, targets, optimizer):
    theirs = in_peft(kind, targets)
    ours = in_ours(kind, targets, theirs)
    before = logits_of(ours, kind).detach()
    assert (before - logits_of(tiny(kind), kind)).abs().max() > 0.1
    assert_same_outputs_and_gradients(ours, theirs, kind)

    sides = [ours, theirs]
    optimizers = [optimizer([p for p in side.parameters() if p.requires_grad], lr=1e-2) for side in sides]
    for _ in range(3):
        for side, step in zip(sides, optimizers, strict=True):
            backward(side, kind)
            step.step()

    assert (before - logits_of(ours, kind)).abs().max() > 1e-3
    assert_same_outputs_and_gradients(ours, theirs, kind)


def test_our_adapter_opens_in_peft(tmp_path, kind, targets):
    ours = in_ours(kind, targets, in_peft(kind, targets))
    save_adapter(ours, tmp_path, base_name=f"tiny/{kind}", task_type=None)
    theirs = PeftModel.from_pretrained(tiny(kind), tmp_path).eval()

    torch.testing.assert_close(logits_of(theirs, kind), logits_of(ours, kind), rtol=1e-5, atol=1e-5)


def test_pefts_adapter_opens_in_ours(tmp_path, kind, targets):
    theirs = in_peft(kind, targets)
    theirs.save_pretrained(tmp_path)
    ours = tiny(kind)
    load_adapter(ours, tmp_path)

    torch.testing.assert_close(logits_of(ours, kind), logits_of(theirs, kind), rtol=1e-5, atol=1e-5)


def test_merging_is_the_same_in_each(kind):
    theirs = in_peft(kind, ALL_LINEAR)
    ours = in_ours(kind, ALL_LINEAR, theirs)
    for layer in adapter_layers(ours).values():
        layer.merge()

    torch.testing.assert_close(logits_of(ours, kind), logits_of(theirs.merge_and_unload(), kind), rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_a_served_row_is_what_the_adapter_alone_makes_of_it(tmp_path, kind, targets):
    ours = in_ours(kind, targets, in_peft(kind, targets))
    save_adapter(ours, tmp_path, task_type=None)
    served = tiny(kind)
    server = serving(served, tmp_path, ours)
    plain = logits_of(served, kind)
    with server.rows(["one", None]):
        if (kind, targets) == ("opt", ALL_LINEAR):  # which makes (rows · tokens, hidden) of x before fc1
            with pytest.raises(ValueError, match=r"layers.0.fc1 is called with \(24, 32\), without an axis for rows"):
                logits_of(served, kind)
            return
        together = logits_of(served, kind)

    torch.testing.assert_close(together[0], logits_of(ours, kind)[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(together[1], plain[1], rtol=1e-5, atol=1e-5)


def serving(model: nn.Module, folder: Path, adapted: nn.Module) -> AdapterServer:
    """A server of the layers that another model has adapted."""
    server = AdapterServer(model, limit_bytes=10**6, targets=list(adapter_layers(adapted)))
    server.cache.register("one", folder)
    return server


@torch.inference_mode()
def test_blooms_product_by_slices_of_a_weight_cannot_be_served_and_says_so(tmp_path):
    slow = {"slow_but_exact": True, "pretraining_tp": 2}
    ours = in_ours("bloom", ALL_LINEAR, in_peft("bloom", ALL_LINEAR, **slow), **slow)
    save_adapter(ours, tmp_path, task_type=None)
    served = tiny("bloom", **slow)
    before = logits_of(served, "bloom")
    server = serving(served, tmp_path, ours)

    assert torch.equal(logits_of(served, "bloom"), before)
    with server.rows([None, None]):
        assert torch.equal(logits_of(served, "bloom"), before)
    with server.rows(["one", None]), pytest.raises(RuntimeError, match=r"dense.weight .*slow_but_exact=False calls it"):
        logits_of(served, "bloom")


def test_blooms_product_by_slices_of_a_weight_has_the_adapter_in_it():
    """It reads dense.weight and dense_4h_to_h.weight, and never calls these layers (nor adds their biases)."""
    theirs = in_peft("bloom", ALL_LINEAR)
    whole = in_ours("bloom", ALL_LINEAR, theirs)
    sliced = in_ours("bloom", ALL_LINEAR, theirs, slow_but_exact=True, pretraining_tp=2)
    for model in (whole, sliced):
        read = [y for n, y in adapter_layers(model).items() if n.endswith(("self_attention.dense", "4h_to_h"))]
        assert len(read) == 4
        for layer in read:
            nn.init.zeros_(layer.base.bias)

    torch.testing.assert_close(backward(sliced, "bloom"), backward(whole, "bloom"), rtol=1e-5, atol=1e-5)
    expected = our_matrices(whole)
    for key, matrix in our_matrices(sliced).items():
        torch.testing.assert_close(matrix.grad, expected[key].grad, rtol=1e-5, atol=1e-5)


def test_t5_reads_the_dtype_of_a_weight_in_4_bits():
    """transformers keeps wo in float32 in any case; over 4 bits it is told float32, which A and B are in."""
    model = tiny("t5")
    inject(model, ALL_LINEAR, lambda base: QLoRALinear(base, r=4, alpha=6))
    backward(model, "t5")

    assert all(layer.B.grad.abs().max() > 0 for layer in adapter_layers(model).values())
