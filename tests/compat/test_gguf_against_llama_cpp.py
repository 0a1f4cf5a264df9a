"""llama.cpp opens what write_gguf writes, and computes what our model computes.

Greedy text is coarse: with the rows of q and k in the wrong order the task's JSON still comes out right. So next-token
probabilities are compared too, for an adapter on q and k alone that is large enough to be seen.

How llama.cpp comes here is told in conftest.py.
"""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minilora.classroom.demo import encode
from minilora.llm import Decoder, Tokenizer, generate, load_model, write_gguf
from minilora.llm.gguf_vocabulary import vocabulary_of
from minilora.llm.write_gguf import write_adapter, write_model
from minilora.torch_lora import LoRALinear, inject, load_adapter, save_adapter
from minilora.torch_lora.inject import ALL_LINEAR, adapter_layers
from minilora.torch_lora.wrap import lora_layer
from minilora.train.export import adapter_pairs, export, merged_weight
from minilora.train.extraction import write
from minilora.train.finetune import Recipe, fine_tune

pytestmark = pytest.mark.long

BASE = "smollm2-135m"
N_ASKED, MAX_NEW_TOKENS = 6, 64
FIRST_NAMES = ["Anna", "Peter", "Maria", "John", "Laura", "David"]
LAST_NAMES = ["Smith", "Brown", "Miller", "Wilson", "Moore", "Clark"]
SHAPE = "On {date}, {name} ordered {n} {things} from {city}."
TEXTS = ["The capital of France is", "Once upon a time there was a", "def add(a, b):\n    return a", "Two plus two is"]
CLOSE = 0.01  # llama.cpp rounds what goes into a product to 16 bits; seen: 0.0016


@pytest.fixture(scope="module")
def examples():
    """Sentences of one shape with few names: the first to be asked, the others to be learnt."""
    return write(24 * 8 + N_ASKED, random.Random(0), FIRST_NAMES, LAST_NAMES, [SHAPE])


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, examples) -> Path:
    """An adapter trained for 24 steps."""
    model, tokenizer = load_model(BASE, dtype=torch.bfloat16)
    start = torch.Generator().manual_seed(0)
    inject(model, ALL_LINEAR, lambda base: LoRALinear(base, r=8, alpha=16, generator=start))
    samples = [encode(tokenizer, example) for example in examples[N_ASKED:]]
    assert tokenizer.pad is not None
    fine_tune(model, samples, Recipe(lr=2e-3, batch_size=8), pad=tokenizer.pad)
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(model, folder, base_name=model.origin.name, base_sha256=model.origin.sha256)
    return folder


@pytest.fixture(scope="module")
def base_f16(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base.gguf"
    export(BASE, None, path, "F16")
    return path


@pytest.fixture(scope="module")
def prompts(examples) -> list[list[int]]:
    _, tokenizer = load_model(BASE)
    return [tokenizer.encode_chat(example.messages) for example in examples[:N_ASKED]]


@pytest.fixture
def llama_cpp(run_node):
    """Ask llama.cpp: greedy answers as tokens, and the probabilities of the token after each prompt."""

    def ask(path: Path, tokenizer: Tokenizer, prompts, max_new_tokens=MAX_NEW_TOKENS, lora: Path | None = None):
        question = {
            "model": str(path),
            "lora": str(lora) if lora else None,
            "prompts": prompts,
            "maxTokens": max_new_tokens,
            "stop": tokenizer.stop_tokens,
            "vocabSize": len(tokenizer),
        }
        answer = run_node("answer.mjs", question)
        return answer["greedy"], torch.tensor(answer["probabilities"])

    return ask


def greedy(model: Decoder, tokenizer: Tokenizer, prompts) -> list[list[int]]:
    return generate(model, prompts, max_new_tokens=MAX_NEW_TOKENS, stop_tokens=tokenizer.stop_tokens)


@torch.no_grad()
def probabilities(model: Decoder, prompts) -> torch.Tensor:
    return torch.stack([model(torch.tensor([prompt]))[0, -1].softmax(-1) for prompt in prompts])


def right(tokenizer: Tokenizer, answers, examples) -> list[bool]:
    return [tokenizer.decode(tokens) == example.answer for tokens, example in zip(answers, examples, strict=False)]


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0"])
def test_llama_cpp_answers_from_a_merged_file_as_our_model_does(kind, adapter, examples, prompts, llama_cpp, tmp_path):
    path = tmp_path / "merged.gguf"
    export(BASE, adapter, path, kind)
    ours, tokenizer = load_model(path)

    answers, _ = llama_cpp(path, tokenizer, prompts)

    assert answers == greedy(ours, tokenizer, prompts)
    least = {"F16": N_ASKED, "Q8_0": N_ASKED, "Q4_0": 1}  # 4 bits miscopy some names; the same ones in both
    assert sum(right(tokenizer, answers, examples)) >= least[kind]


def test_the_merged_file_is_the_model_with_its_adapter(adapter, prompts, tmp_path):
    live, tokenizer = load_model(BASE)
    load_adapter(live, adapter)
    export(BASE, adapter, tmp_path / "merged.gguf", "F32")
    merged, _ = load_model(tmp_path / "merged.gguf")

    assert greedy(merged, tokenizer, prompts) == greedy(live, tokenizer, prompts)
    assert (probabilities(merged, prompts) - probabilities(live, prompts)).abs().max() < 1e-4  # float32, summed apart


@pytest.mark.parametrize("lays_over", ["our F16 file", "the published file"])
def test_llama_cpp_answers_from_base_and_adapter_as_our_model_does(
    lays_over, adapter, examples, prompts, llama_cpp, base_f16, base_gguf, tmp_path
):
    ours, tokenizer = load_model(BASE)
    load_adapter(ours, adapter)
    export(BASE, adapter, tmp_path / "lora.gguf", "adapter")
    base = base_f16 if lays_over == "our F16 file" else base_gguf

    answers, theirs = llama_cpp(base, tokenizer, prompts, lora=tmp_path / "lora.gguf")

    assert answers == greedy(ours, tokenizer, prompts)
    assert all(right(tokenizer, answers, examples))
    assert (theirs - probabilities(ours, prompts)).abs().max() < CLOSE


def with_noise(targets, make) -> tuple[Decoder, Tokenizer]:
    """The base with an adapter whose B is drawn from N(0, 0.15), large enough to be seen in every probability."""
    torch.manual_seed(0)
    model, tokenizer = load_model(BASE)
    inject(model, targets, make)
    with torch.no_grad():
        for layer in adapter_layers(model).values():
            layer.B.normal_(std=0.15)
    return model, tokenizer


def plain(base):
    return LoRALinear(base, r=8, alpha=16)


def rslora(base):
    return LoRALinear(base, r=8, alpha=5, use_rslora=True)  # a scaling of 1.8; without the root 0.6


def patterned(base):
    """Ranks and strengths by the kind of the layer."""
    if base.out_features == 192:  # k and v
        return LoRALinear(base, r=4, alpha=8)
    return LoRALinear(base, r=8, alpha=6, use_rslora=base.in_features == 1536)


CASES = {
    "plain": (["q_proj", "k_proj"], plain),
    "rsLoRA": (["q_proj", "k_proj"], rslora),
    "patterned": (["q_proj", "k_proj", "v_proj", "down_proj"], patterned),
}


@pytest.mark.parametrize("case", CASES)
def test_llama_cpps_probabilities_over_an_adapter_are_ours(case, llama_cpp, base_f16, tmp_path):
    ours, tokenizer = with_noise(*CASES[case])
    write_adapter(tmp_path / "lora.gguf", adapter_pairs(ours), ours.config)
    texts = [tokenizer.encode(text) for text in TEXTS]
    base, _ = load_model(BASE)
    expected = probabilities(ours, texts)

    _, theirs = llama_cpp(base_f16, tokenizer, texts, 0, tmp_path / "lora.gguf")

    assert (theirs - expected).abs().max() < CLOSE
    assert (probabilities(base, texts) - expected).abs().max() > 10 * CLOSE  # an adapter left out would be seen


def test_without_the_reordering_llama_cpps_probabilities_are_others(llama_cpp, base_f16, tmp_path, monkeypatch):
    ours, tokenizer = with_noise(*CASES["plain"])
    texts = [tokenizer.encode(text) for text in TEXTS]
    monkeypatch.setattr(write_gguf, "permute", lambda w, n_heads: w)
    write_adapter(tmp_path / "lora.gguf", adapter_pairs(ours), ours.config)

    _, theirs = llama_cpp(base_f16, tokenizer, texts, 0, tmp_path / "lora.gguf")

    assert (theirs - probabilities(ours, texts)).abs().max() > 10 * CLOSE


def test_llama_cpp_applies_adapters_of_an_embedding_and_a_head_of_their_own(llama_cpp, tmp_path):
    ours, tokenizer = with_noise(["embed_tokens", "lm_head"], lambda base: lora_layer(base, r=8, alpha=8))
    with torch.no_grad():
        for layer in adapter_layers(ours).values():
            layer.A.normal_(std=0.05)
    config = replace(ours.config, tie_word_embeddings=False)
    vocabulary = vocabulary_of(tokenizer, config.vocab_size)
    base, _ = load_model(BASE)
    write_model(tmp_path / "base.gguf", lambda name: merged_weight(base, name), config, vocabulary)
    write_adapter(tmp_path / "lora.gguf", adapter_pairs(ours), config)
    texts = [tokenizer.encode(text) for text in TEXTS]
    expected = probabilities(ours, texts)

    _, theirs = llama_cpp(tmp_path / "base.gguf", tokenizer, texts, 0, tmp_path / "lora.gguf")

    assert (theirs - expected).abs().max() < CLOSE
    assert (probabilities(base, texts) - expected).abs().max() > 10 * CLOSE
