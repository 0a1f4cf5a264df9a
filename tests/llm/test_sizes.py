"""Counts and bytes against published numbers, and against arithmetic that can be done by hand.

Other people's software is asked in tests/compat/test_sizes_against_peers.py.
"""

from dataclasses import replace

import pytest

from minilora.llm.architectures import ARCHITECTURES, Linear
from minilora.llm.sizes import (
    adapter_bytes,
    adapter_header_bytes,
    base_params,
    houlsby_params,
    ia3_params,
    linear_weights,
    lora_params,
    nf4_bytes,
    optimizer_bytes,
    prefix_params,
    prompt_params,
    weight_bytes,
)

LLAMA_2_7B, LLAMA_2_13B, LLAMA_2_70B = (ARCHITECTURES[f"llama-2-{size}"] for size in ("7b", "13b", "70b"))
LLAMA_3_8B, LLAMA_3_70B, LLAMA_3B = (ARCHITECTURES[f"llama-{size}"] for size in ("3-8b", "3-70b", "3.2-3b"))
MISTRAL_7B, SMOLLM2 = ARCHITECTURES["mistral-7b"], ARCHITECTURES["smollm2-135m"]
GPT2, GPT2_MEDIUM, GPT3 = ARCHITECTURES["gpt2"], ARCHITECTURES["gpt2-medium"], ARCHITECTURES["gpt-3-175b"]
LLAMA_65B = replace(LLAMA_2_70B, intermediate=22016, n_kv_heads=64)  # the first Llama, which [QLoRA] fine-tunes
GPT2_APART = replace(GPT2, fused_qkv=False)  # as LLMs-from-scratch writes it
SQUARE = Linear("4096 × 4096", 4096, 4096)

QV, QKVO = ("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "o_proj")


# --- exact counts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("llama-2-7b", 6_738_415_616),
        ("llama-2-13b", 13_015_864_320),
        ("llama-2-70b", 68_976_648_192),
        ("llama-3-8b", 8_030_261_248),
        ("llama-3-70b", 70_553_706_496),
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3.2-3b", 3_212_749_824),
        ("mistral-7b", 7_241_732_096),
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen2.5-7b", 7_615_616_512),
        ("smollm2-135m", 134_515_008),
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_the_parameters_are_those_that_the_published_checkpoint_has(name, params):
    assert base_params(ARCHITECTURES[name]) == params


def test_gpt_3_has_the_175_billion_of_its_name():
    assert round(base_params(GPT3) / 1e9) == 175


@pytest.mark.parametrize(
    ("arch", "qv", "qkvo", "all_linear"),
    [
        (LLAMA_2_7B, 524_288, 1_048_576, 2_498_560),
        (LLAMA_3_8B, 425_984, 851_968, 2_621_440),
        (MISTRAL_7B, 425_984, 851_968, 2_621_440),
        (LLAMA_2_70B, 2_048_000, 4_096_000, 12_943_360),
        (LLAMA_3_70B, 2_048_000, 4_096_000, 12_943_360),
    ],
    ids=["llama-2-7b", "llama-3-8b", "mistral-7b", "llama-2-70b", "llama-3-70b"],
)
@pytest.mark.parametrize("r", [1, 16, 64])
def test_lora_counts_per_unit_of_rank(arch, qv, qkvo, all_linear, r):
    assert lora_params(arch, r, QV) == qv * r
    assert lora_params(arch, r, QKVO) == qkvo * r
    assert lora_params(arch, r, "all-linear") == all_linear * r


@pytest.mark.parametrize(
    ("counted", "expected", "source"),
    [
        (lora_params(LLAMA_3B, 32, QV), 9_175_040, "PEFT's method_comparison"),
        (lora_params(LLAMA_3B, 32, QV, use_dora=True), 9_289_728, "PEFT's method_comparison, DoRA: 114,688 more"),
        (lora_params(GPT3, 4, QV), 18_874_368, "[LoRA] table 4: 18M"),
        (lora_params(GPT3, 1, QV), 4_718_592, "[LoRA] table 4: 4.7M"),
        (lora_params(GPT3, 8, QV), 37_748_736, "[LoRA] table 4: 37.7M"),
        (lora_params(GPT2, 8, "c_attn"), 294_912, "peft tests/test_common_gpu.py"),
        (
            lora_params(GPT2_MEDIUM, 4, "c_attn"),
            393_216,
            "[LoRA]'s released checkpoint of 1.5 MB; its paper prints 0.35M",
        ),
        (
            lora_params(GPT2_APART, 16) + Linear("head of 2 classes", 768, 2).lora_params(16),
            2_666_528,
            "LLMs-from-scratch E",
        ),
        (lora_params(LLAMA_2_7B, 8, QV), 4_194_304, "32 layers · 2 · 8 · 8192"),
        (lora_params(LLAMA_2_7B, 16), 39_976_960, "32 · 16 · (4 · 8192 + 3 · 15104)"),
        (base_params(LLAMA_2_7B) + lora_params(LLAMA_2_7B, 16), 6_778_392_576, "the same and the base"),
        (lora_params(LLAMA_2_7B, 16, QKVO), 16_777_216, "32 · 4 · 16 · 8192"),
        (base_params(LLAMA_2_7B) + lora_params(LLAMA_2_7B, 16, QKVO), 6_755_192_832, "the same and the base"),
        (lora_params(LLAMA_3_8B, 16), 41_943_040, "k and v are 4096 → 1024"),
        (lora_params(MISTRAL_7B, 16), 41_943_040, "the same layers as Llama-3-8B"),
        (base_params(LLAMA_3_8B) + lora_params(LLAMA_3_8B, 16), 8_072_204_288, "the same and the base"),
        (lora_params(LLAMA_3_8B, 32), 83_886_080, "twice r = 16"),
        (base_params(LLAMA_3_8B) + lora_params(LLAMA_3_8B, 32), 8_114_147_328, "the same and the base"),
        (lora_params(LLAMA_2_70B, 16, QKVO), 65_536_000, "80 layers"),
        (lora_params(LLAMA_2_70B, 16), 207_093_760, "80 layers"),
        (lora_params(LLAMA_2_7B, 8, QKVO), 8_388_608, "8.39M"),
        (SQUARE.lora_params(4), 32_768, "512 times smaller than the matrix"),
        (SQUARE.lora_params(8), 65_536, "256 times smaller"),
        (SQUARE.lora_params(16), 131_072, "128 times smaller"),
        (
            Linear("with bias", 4096, 4096, bias=True).params + SQUARE.lora_params(16),
            16_912_384,
            "4,096 of them a bias",
        ),
        (
            2 * Linear("q or v", 512, 512).lora_params(8) + 2 * 512**2,
            540_672,
            "attention of 512, k and o left unfrozen",
        ),
        (ia3_params(LLAMA_2_7B), 614_400, "32 · (4096 + 4096 + 11008)"),
        (prompt_params(LLAMA_2_7B, 100), 409_600, "100 · 4096"),
        (prefix_params(LLAMA_2_7B, 20), 5_242_880, "20 · 32 · 2 · 4096"),
        (prefix_params(LLAMA_3_8B, 20), 1_310_720, "20 · 32 · 2 · 1024"),
        (prefix_params(LLAMA_2_7B, 20, projection=4096), 1_090_867_200, "what prefix_projection=True trains"),
        (houlsby_params(replace(LLAMA_2_7B, n_layers=1), 64), 2 * 528_448, "two a layer, each 2·d·m + d + m"),
        (2 * LLAMA_2_7B.vocab * LLAMA_2_7B.hidden, 262_144_000, "embeddings and head"),
        (2 * LLAMA_3_8B.vocab * LLAMA_3_8B.hidden, 1_050_673_152, "embeddings and head"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_exact_counts(counted, expected, source):
    assert counted == expected


@pytest.mark.parametrize(
    ("counted", "printed", "source"),
    [
        (houlsby_params(GPT3, 1) / 1e6, "7.1", "[LoRA] table 4, Adapter-H"),
        (houlsby_params(GPT3, 8) / 1e6, "40.1", "[LoRA] table 4, Adapter-H"),
        (lora_params(GPT3, 4, QV) / base_params(GPT3) * 100, "0.01", "[LoRA]: 0.01 % of 175B"),
        (lora_params(LLAMA_2_7B, 8, QV) / ia3_params(LLAMA_2_7B), "6.8", "LoRA r 8 on q and v over IA³"),
        (lora_params(LLAMA_2_7B, 8, QKVO) / ia3_params(LLAMA_2_7B), "13.7", "on q, k, v and o"),
        (lora_params(LLAMA_2_7B, 8) / ia3_params(LLAMA_2_7B), "32.5", "on all linear layers"),
        (SQUARE.lora_params(64) / SQUARE.params * 100, "3.125", "r 64 beside 4096²"),
        (SQUARE.lora_params(16) / SQUARE.params * 100, "0.78", "r 16 beside 4096²"),
        (4 * 512**2 / 540_672, "1.94", "attention of 512, k and o left unfrozen"),
        (linear_weights(LLAMA_2_7B) / 64 / 1e6, "101.2", "absmax values of a 7B"),
        (linear_weights(LLAMA_2_7B) / 64 * 4 / 1e6, "405", "their megabytes in fp32"),
        (prompt_params(LLAMA_2_7B, 100) / 10e9 * 100, "0.004", "prompt tuning at 10B"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_printed_figures(counted, printed, source):
    decimals = len(printed.partition(".")[2])
    assert f"{counted:.{decimals}f}" == printed


@pytest.mark.parametrize(
    ("arch", "r", "targets", "percent"),
    [
        (LLAMA_2_7B, 4, QV, "0.031"),
        (LLAMA_2_7B, 8, QV, "0.062"),
        (LLAMA_2_7B, 16, QV, "0.124"),
        (LLAMA_2_7B, 64, QV, "0.4955"),
        (LLAMA_2_7B, 256, QV, "1.95"),
        (LLAMA_2_7B, 8, QKVO, "0.12"),
        (LLAMA_2_7B, 16, QKVO, "0.2484"),
        (LLAMA_2_7B, 16, "all-linear", "0.5898"),
        (LLAMA_3_8B, 16, "all-linear", "0.5196"),
        (LLAMA_2_70B, 16, "all-linear", "0.30"),
    ],
)
def test_the_trainable_share_of_all_parameters(arch, r, targets, percent):
    trainable = lora_params(arch, r, targets)
    share = 100 * trainable / (base_params(arch) + trainable)
    assert f"{share:.{len(percent.partition('.')[2])}f}" == percent


@pytest.mark.parametrize(("r", "millions"), [(4, "2.10"), (8, "4.19"), (16, "8.39"), (64, "33.55"), (256, "134.22")])
def test_what_q_and_v_of_llama_2_7b_take_at_each_rank(r, millions):
    assert f"{lora_params(LLAMA_2_7B, r, QV) / 1e6:.2f}" == millions


def test_dora_adds_one_magnitude_for_each_output():
    dora, lora = (lora_params(LLAMA_3B, 32, QV, use_dora=use_dora) for use_dora in (True, False))
    assert dora - lora == 114_688 == 28 * (3072 + 1024)


def test_an_embedding_and_the_head_can_have_adapters_too():
    assert lora_params(LLAMA_2_7B, 8, ["embed_tokens", "lm_head"]) == 2 * 8 * (32000 + 4096)


# --- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "targets", "fp32_mb", "bf16_mb"),
    [
        (LLAMA_2_7B, QKVO, "67.1", "33.6"),
        (LLAMA_2_7B, "all-linear", "159.9", "80.0"),
        (LLAMA_3_8B, "all-linear", "167.8", "83.9"),
    ],
    ids=["llama-2-7b q, k, v, o", "llama-2-7b all", "llama-3-8b all"],
)
def test_megabytes_of_an_adapter_of_rank_16(arch, targets, fp32_mb, bf16_mb):
    assert f"{adapter_bytes(arch, 16, targets, 'fp32') / 1e6:.1f}" == fp32_mb
    assert f"{adapter_bytes(arch, 16, targets, 'bf16') / 1e6:.1f}" == bf16_mb


def test_tensors_and_header_are_the_file_that_peft_published():
    """PEFT's method_comparison prints 36,715,216 bytes for Llama-3.2-3B, r 32 on q and v."""
    assert adapter_bytes(LLAMA_3B, 32, QV) + adapter_header_bytes(LLAMA_3B, 32, QV) == 36_715_216


def test_the_whole_model_in_bf16_is_the_file_that_peft_published():
    """PEFT's method_comparison prints 6.43 GB for full fine-tuning of Llama-3.2-3B."""
    assert f"{weight_bytes(LLAMA_3B, 'bf16') / 1e9:.2f}" == "6.43"


@pytest.mark.parametrize(("bits_per_weight", "gb"), [(8.5, "7.16"), (6.5625, "5.53")])
def test_gguf_files_of_llama_2_7b_by_bits_per_weight(bits_per_weight, gb):
    assert f"{base_params(LLAMA_2_7B) * bits_per_weight / 8 / 1e9:.2f}" == gb


# --- bytes of weights and states ----------------------------------------------------------------------------------


def test_a_4_bit_weight_takes_4_127_bits():
    assert nf4_bytes(64 * 256 * 100) * 8 == 4.126953125 * 64 * 256 * 100
    assert nf4_bytes(64 * 256 * 100, use_double_quantization=False) * 8 == 4.5 * 64 * 256 * 100


def test_a_short_last_block_is_a_block():
    assert nf4_bytes(65) == 33 + 2 + 4


@pytest.mark.parametrize(
    ("arch", "dtype", "gb"),
    [(LLAMA_2_70B, "bf16", "36.4"), (LLAMA_3_70B, "bf16", "39.5"), (LLAMA_3_70B, "fp32", "43.7")],
    ids=["llama-2-70b", "llama-3-70b", "llama-3-70b with fp32 embeddings"],
)
def test_the_weights_of_a_70b_in_4_bits(arch, dtype, gb):
    assert f"{weight_bytes(arch, dtype, in_4_bits=True) / 1e9:.1f}" == gb


def test_the_weights_of_a_7b_in_4_bits():
    assert f"{nf4_bytes(linear_weights(LLAMA_2_7B)) / 1e9:.2f}" == "3.34"
    assert f"{4 * 2 * LLAMA_2_7B.vocab * LLAMA_2_7B.hidden / 1e9:.2f}" == "1.05"  # embeddings and head in fp32


def test_double_quantization_saves_3_gb_at_65b():
    n = linear_weights(LLAMA_65B)
    saved_bits = 8 * (nf4_bytes(n, use_double_quantization=False) - nf4_bytes(n)) / n
    assert f"{saved_bits:.3f}" == "0.373"
    assert f"{saved_bits * n / 8 / 1e9:.0f}" == "3"


def test_adamw_keeps_two_fp32_numbers_for_each_parameter():
    assert optimizer_bytes([(16, 4096), (7,)], "adamw") == 8 * (16 * 4096 + 7)


def test_sgd_keeps_nothing():
    assert optimizer_bytes([(16, 4096)], "sgd") == 0


def test_8_bit_adamw_keeps_small_tensors_in_fp32():
    """GPT-2's c_attn at r 4: A has 3,072 elements, below the 4,096 from which states are 8-bit."""
    assert optimizer_bytes([(4, 768)], "adamw-8bit") == 8 * 3072
    assert optimizer_bytes([(4, 1024)], "adamw-8bit") == 2 * 4096 + 2 * 4 * 16


def test_rank_zero_is_refused():
    with pytest.raises(ValueError, match="r is 0: it must be 1 or more"):
        lora_params(GPT2, 0)
