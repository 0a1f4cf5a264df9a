"""The memory of a training step against published figures, and against arithmetic that can be done by hand.

Beside what a real step takes: tests/train/test_memory.py.
"""

from dataclasses import replace

import pytest

from minilora.llm.activations import activation_terms, logit_terms
from minilora.llm.architectures import ARCHITECTURES
from minilora.llm.setup import Setup
from minilora.llm.sizes import base_params
from minilora.llm.training_memory import training_bytes

LLAMA_2_7B, LLAMA_2_70B, SMOLLM2 = (ARCHITECTURES[name] for name in ("llama-2-7b", "llama-2-70b", "smollm2-135m"))
LLAMA_65B = replace(LLAMA_2_70B, intermediate=22016, n_kv_heads=64)  # the first Llama, which [QLoRA] fine-tunes
GPT2 = ARCHITECTURES["gpt2"]
QV = ("q_proj", "v_proj")


def test_qlora_quantizes_all_linear_layers_whatever_has_an_adapter():
    few = training_bytes(LLAMA_2_7B, Setup(method="qlora", targets=QV))
    assert few.weights == training_bytes(LLAMA_2_7B, Setup(method="qlora")).weights


def test_the_8_bit_state_of_an_adapter_of_40m_parameters_is_80_mb():
    state = training_bytes(LLAMA_2_7B, Setup(r=16, optimizer="adamw-8bit")).optimizer
    assert 80e6 < state < 83e6  # 2 bytes and 8/256 of a byte for each of 39,976,960


# --- the memory of training ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("billions", "gb"), [(7, 112), (13, 208), (70, 1120)])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_full_fine_tuning_takes_16_bytes_a_parameter(billions, gb, dtype):
    """fp32: 4 weight + 4 gradient + 8 moments. 16 bits: 2 + 2 + 8, and the 4 of the fp32 copy."""
    used = training_bytes(LLAMA_2_7B, Setup(method="full", dtype=dtype))
    per_param = (used.weights + used.gradients + used.optimizer + used.master) / base_params(LLAMA_2_7B)
    assert per_param * billions == gb


def test_a_70b_in_16_bits_part_by_part():
    """140 GB of weights and 560 of moments are 700, with gradients 840, with an fp32 copy 1,120."""
    used = training_bytes(LLAMA_2_70B, Setup(method="full", dtype="bf16"))
    gb = 70 / base_params(LLAMA_2_70B)  # for a nominal 70 billion
    parts = [part * gb for part in (used.weights, used.optimizer, used.gradients, used.master)]
    assert parts == pytest.approx([140, 560, 140, 280], rel=1e-12)


def test_full_fine_tuning_in_fp32_or_on_request_has_no_second_copy():
    assert training_bytes(GPT2, Setup(method="full", dtype="fp32")).master == 0
    assert training_bytes(GPT2, Setup(method="full", dtype="bf16", master_weights=False)).master == 0


def test_a_65b_takes_more_than_780_gb_in_full_and_less_than_48_gb_in_4_bits():
    """[QLoRA], abstract and section 1: 16-bit weights and gradients, fp32 moments; one 48 GB card."""
    full = training_bytes(LLAMA_65B, Setup(method="full", dtype="bf16", master_weights=False))
    assert full.weights + full.gradients + full.optimizer > 780e9
    assert training_bytes(LLAMA_65B, Setup(method="qlora", r=64, checkpointing=True, seq=512)).total < 48 * 2**30


def test_only_the_adapter_has_gradients_and_state():
    used = training_bytes(LLAMA_2_7B, Setup(method="qlora", r=16))
    assert (used.adapter, used.gradients, used.optimizer, used.master) == (
        4 * 39_976_960,
        4 * 39_976_960,
        8 * 39_976_960,
        0,
    )


def test_the_total_is_the_sum_of_the_parts():
    used = training_bytes(SMOLLM2, Setup())
    assert used.total == used.weights + used.adapter + used.gradients + used.optimizer + used.activations + used.logits


def test_checkpoints_are_the_hidden_state_of_every_layer():
    """32 layers · 4 · 2048 tokens · 4096 features · 4 bytes = 4.3 GB."""
    terms = activation_terms(LLAMA_2_7B, Setup(method="full", dtype="fp32", batch=4, seq=2048, checkpointing=True))
    assert terms["checkpoints: input of each layer"] == 32 * 4 * 2048 * 4096 * 4 == 4_294_967_296


def test_all_activations_of_a_7b_are_many_times_its_hidden_states():
    """The other figures for the same batch, 34 to 122 GB, differ in what is counted; ours lies between them."""
    terms = activation_terms(LLAMA_2_7B, Setup(method="full", dtype="fp32", batch=4, seq=2048))
    assert 34e9 < sum(terms.values()) < 122e9


def test_activations_grow_in_proportion_to_the_tokens():
    one, many = (sum(activation_terms(SMOLLM2, Setup(method="full", batch=n)).values()) for n in (1, 24))
    assert many == 24 * one


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_checkpointing_never_takes_more_activations(method):
    for arch in ARCHITECTURES.values():
        kept, again = (training_bytes(arch, Setup(method=method, checkpointing=c)).activations for c in (False, True))
        assert again < kept


def test_fewer_targets_keep_fewer_inputs():
    gpt2 = ARCHITECTURES["gpt2"]
    few, many = (activation_terms(gpt2, Setup(targets=t)) for t in ("c_attn", "all-linear"))
    assert few["inputs of trained matrices"] == 12 * 512 * 2 * 768
    assert many["inputs of trained matrices"] == 12 * 512 * 2 * (768 + 768 + 3072)  # attention keeps its output itself


def test_lora_in_a_llama_keeps_one_input():
    """Attention's output; a norm's result and the product of gate and up are made again from what is kept anyway."""
    assert activation_terms(LLAMA_2_7B, Setup())["inputs of trained matrices"] == 32 * 512 * 2 * 4096


def test_an_adapter_in_one_layer_keeps_the_input_of_one_layer():
    terms = activation_terms(ARCHITECTURES["gpt2"], Setup(targets=("h.11.attn.c_attn",)))
    assert terms["inputs of trained matrices"] == 512 * 2 * 768


def test_logits_are_tokens_times_vocabulary_up_to_a_chunk():
    assert logit_terms(SMOLLM2, Setup(batch=2, seq=50))["logits in bf16"] == 100 * 49152 * 2
    assert logit_terms(SMOLLM2, Setup(batch=2, seq=200))["logits in bf16"] == 256 * 49152 * 2


def test_only_a_trained_head_has_a_gradient():
    assert list(logit_terms(SMOLLM2, Setup(method="lora"))) == ["logits in bf16"]
    full = logit_terms(SMOLLM2, Setup(method="full", dtype="bf16"))
    assert full["gradient of the head in fp32, and scaled"] == 2 * 49152 * 576 * 4


# --- the other methods ---------------------------------------------------------------------------------------------


def test_a_prompt_is_read_as_so_many_tokens_more_in_every_row_and_has_no_logits():
    prompt = training_bytes(SMOLLM2, Setup(method="prompt", n_virtual=20, batch=2, seq=100))
    longer = activation_terms(SMOLLM2, Setup(method="prompt", n_virtual=1, batch=2, seq=119))
    assert prompt.activations == sum(longer.values())
    assert prompt.logits == 200 * 49152 * 2


def test_pissa_runs_as_lora_of_twice_the_rank_and_trains_as_one_of_its_own():
    pissa, lora, double = (
        training_bytes(LLAMA_2_7B, Setup(method=method, r=r))
        for method, r in (("pissa", 16), ("lora", 16), ("lora", 32))
    )
    assert (pissa.gradients, pissa.optimizer, pissa.adapter) == (lora.gradients, lora.optimizer, double.adapter)
    made = 4 * 2 * 39_976_960  # [A − A0; A0] and [B, B − B0], in fp32
    assert pissa.activations == double.activations + made


def test_loftq_has_the_bill_of_qlora():
    assert training_bytes(LLAMA_2_7B, Setup(method="loftq")) == training_bytes(LLAMA_2_7B, Setup(method="qlora"))


def test_galore_keeps_of_a_7b_what_can_be_counted_by_hand():
    """32 layers of 4 matrices 4096², 3 of 4096 · 11008; embeddings, head and 65 norms keep 8 bytes a number."""
    used = training_bytes(LLAMA_2_7B, Setup(method="galore", r=1024, dtype="bf16"))
    projected = 4 * 1024 * 32 * (4 * 3 * 4096 + 3 * (4096 + 2 * 11008))
    assert used.optimizer == projected + 8 * (2 * 32000 * 4096 + 65 * 4096)
    assert (used.gradients, used.master, used.adapter) == (2 * 6_738_415_616, 0, 0)


def test_galore_of_the_full_rank_is_adamw():
    full, galore = (training_bytes(SMOLLM2, Setup(method=method, r=576)).optimizer for method in ("full", "galore"))
    assert galore == full


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"method": "lisa"}, "no method is named 'lisa'; there are full, lora, dora, qlora, adalora"),
        ({"dtype": "int8"}, "no dtype is named 'int8'; there are fp32, bf16, fp16"),
        ({"optimizer": "adam"}, "no optimizer is named 'adam'; there are adamw, adamw-8bit, sgd"),
        ({"r": 0}, "r is 0: it must be 1 or more"),
        ({"batch": -1}, "batch is -1: it must be 1 or more"),
        ({"seq": 0}, "seq is 0: it must be 1 or more"),
        ({"bottleneck": 0}, "bottleneck is 0: it must be 1 or more"),
        ({"n_virtual": 0}, "n_virtual is 0: it must be 1 or more"),
        ({"mlp_features": 0}, "mlp_features is 0: it must be 1 or more"),
        ({"method": "prefix", "checkpointing": True}, "gradients would not reach the prefix; leave checkpointing out"),
        ({"method": "galore", "optimizer": "adamw-8bit"}, "galore is an AdamW of its own: .* adamw, not adamw-8bit"),
    ],
)
def test_an_impossible_setup_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Setup(**wrong)


def test_a_sequence_longer_than_the_positions_is_refused():
    with pytest.raises(ValueError, match="2048 tokens is too long: this model has 1024 positions"):
        training_bytes(GPT2, Setup(seq=2048))


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_virtual_tokens_take_positions(method):
    training_bytes(GPT2, Setup(method=method, seq=1004, n_virtual=20))
    with pytest.raises(ValueError, match="1005 tokens, with 20 virtual ones before it, is too long"):
        training_bytes(GPT2, Setup(method=method, seq=1005, n_virtual=20))
