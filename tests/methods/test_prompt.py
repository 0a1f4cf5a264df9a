"""Prefix and prompt tuning against the base that reads real tokens first, and against PEFT in compat/.

Where a layer begins with words, the base that reads these words before the text is the oracle: it needs none of this.
P is float32, so a float64 model agrees with it to 1e-7, and through three layers to 1e-5.
"""

import pytest
import torch
from torch import nn

from minilora.llm import Decoder, KVCache, ModelConfig, generate
from minilora.methods import PrefixTuning, PromptTuning
from minilora.methods.peft_prompt import load_prompt, save_prompt
from minilora.methods.prompt import TrainedCache, VirtualTokens
from minilora.qlora import NF4Linear
from minilora.torch_lora import LoRALinear, inject, remove
from minilora.torch_lora.adapter_layer import merged
from minilora.torch_lora.inject import adapter_layers, count_parameters
from minilora.train.data import Batch, Sample, stack
from minilora.train.loss import loss_of
from minilora.train.packing import make_packed_batches
from minilora.train.trainer import train

WORDS = [7, 3, 11, 42]
N = len(WORDS)
KINDS = {
    "prefix": lambda base, **settings: PrefixTuning(base, **({"n_virtual": N} | settings)),
    "prefix, MLP": lambda base: PrefixTuning(base, n_virtual=N, mlp_features=10),
    "prompt": lambda base, **settings: PromptTuning(base, **({"n_virtual": N} | settings)),
}
WITH_WORDS = ["prefix", "prompt"]


@pytest.fixture
def tiny() -> Decoder:
    """Weights in float64, large enough that it does not say the same token for ever."""
    sizes = {"vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "n_layers": 3, "n_heads": 6}
    model = Decoder(ModelConfig(**sizes, n_kv_heads=2, max_seq_len=64)).double().eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.5)
    return model


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def put(model: Decoder, wrap, **settings) -> VirtualTokens:
    inject(model, ["model"], lambda base: wrap(base, **settings))
    return model.model


def random_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, 50, shape)


@pytest.mark.parametrize("kind", WITH_WORDS)
@torch.no_grad()
def test_begun_with_words_it_is_the_base_that_reads_them_first(tiny, kind):
    tokens = random_tokens(3, 9)
    expected = tiny(torch.cat([torch.tensor(WORDS).expand(3, N), tokens], dim=1))[:, N:]
    put(tiny, KINDS[kind], words=WORDS)
    torch.testing.assert_close(tiny(tokens), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_each_numbers_place_in_a_row_of_P(tiny):
    layer = put(tiny, KINDS["prefix"])
    kept = layer.keys_and_values()
    assert kept.shape == (3, 2, 2, N, 4)
    head, kv = 4, 8
    for place in [(1, 0, 1, 2, 3), (2, 1, 0, 3, 1)]:
        depth, value, kv_head, token, feature = place
        assert kept[place] == layer.P[token, depth * 2 * kv + value * kv + kv_head * head + feature]


@torch.no_grad()
def test_the_mlp_is_the_papers_and_folds_away(tiny):
    layer, tokens = put(tiny, KINDS["prefix, MLP"]), random_tokens(2, 6)
    first, _, second = layer.mlp
    P = torch.tanh(layer.P @ first.weight.T + first.bias) @ second.weight.T + second.bias
    torch.testing.assert_close(layer.prefix(), P)
    before = tiny(tokens)
    layer.fold()
    assert torch.equal(tiny(tokens), before)
    assert layer.adapter_tensors().keys() == {"P"}
    assert layer.P.shape == (N, 3 * 2 * 8)
    assert layer.P.requires_grad


def test_only_its_own_parameters_train(tiny, kind):
    layer, tokens = put(tiny, kind), random_tokens(2, 7)
    tiny(tokens).square().mean().backward()
    got = {name for name, p in tiny.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert got == {f"model.{name}" for name in layer.adapter_tensors()}


def test_gradients_are_those_of_finite_differences(tiny, kind):
    layer, tokens = put(tiny, kind), random_tokens(2, 5)
    layer.double()
    tensors = list(layer.adapter_tensors().values())

    def loss(*_):
        return tiny(tokens).logsumexp(-1).mean()

    torch.autograd.gradcheck(loss, tensors, atol=1e-6, fast_mode=True)


def test_padding_on_the_right_changes_nothing(tiny, kind):
    layer, tokens = put(tiny, kind), random_tokens(2, 9)
    layer.double()
    alone = tiny(tokens[:1, :5])
    torch.testing.assert_close(tiny(tokens)[:1, :5], alone)


def test_packed_samples_give_what_they_give_alone(tiny, kind):
    put(tiny, kind).double()
    samples = [Sample(random_tokens(n).tolist(), random_tokens(n).tolist()) for n in (4, 7, 5)]
    (packed,) = make_packed_batches(samples, rows=1, max_tokens=16, pad=0, seed=0)
    assert packed.segments is not None
    total = sum(loss_of(tiny, alone) * alone.n_labels for alone in (stack([[s]], pad=0) for s in samples))
    packed_loss = loss_of(tiny, packed)
    torch.testing.assert_close(packed_loss * packed.n_labels, total)


def test_a_row_of_many_samples_is_hidden_from_the_others(tiny, kind):
    put(tiny, kind).double()
    samples = [Sample([1, 2, 3], [1, 2, 3]), Sample([4, 5, 6, 7], [4, 5, 6, 7])]
    batch = stack([samples], pad=0)
    alone = tiny(torch.tensor([[4, 5, 6, 7]]))
    together = tiny(batch.tokens, positions=batch.positions, mask=batch.mask)
    torch.testing.assert_close(together[:, 3:], alone)


def test_rows_that_begin_alike_are_refused_or_read_once(tiny):
    tokens = random_tokens(1, 8).repeat(3, 1)
    tokens[:, 5:] = random_tokens(3, 3)
    layer = put(tiny, KINDS["prompt"]).double()
    torch.testing.assert_close(layer(tokens, shared=5), layer(tokens))
    remove(tiny)
    layer = put(tiny, KINDS["prefix"])
    with pytest.raises(ValueError, match="leave shared at 0"):
        layer(tokens, shared=5)


def test_the_loss_of_rows_that_begin_alike_is_that_of_each(tiny, kind):
    put(tiny, kind).double()
    rows = torch.cat([random_tokens(1, 6).repeat(4, 1), random_tokens(4, 3)], dim=1)
    batch = Batch(rows, rows)
    assert batch.shared >= 6
    mean = sum(loss_of(tiny, Batch(row[None], row[None])) for row in rows) / 4
    torch.testing.assert_close(loss_of(tiny, batch), mean)


def slowly(model: Decoder, prompt: list[int], n_tokens: int) -> list[int]:
    """Greedy continuation by definition: everything read again, without a cache."""
    text = list(prompt)
    with torch.no_grad():
        for _ in range(n_tokens):
            text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
    return text[len(prompt) :]


def test_greedy_tokens_with_the_cache_are_those_without(tiny, kind):
    base = [slowly(tiny, prompt, 12) for prompt in ([5, 6, 7], [1])]
    put(tiny, kind)
    prompts = [random_tokens(n).tolist() for n in (1, 7, 3, 12, 7)]
    together = generate(tiny, prompts, max_new_tokens=12)
    assert together == [slowly(tiny, prompt, 12) for prompt in prompts]
    assert [generate(tiny, [prompt], max_new_tokens=12)[0] for prompt in prompts] == together
    assert generate(tiny, [[5, 6, 7], [1]], max_new_tokens=12) != base  # it has an effect


def test_rows_that_stopped_are_forgotten(tiny, kind):
    put(tiny, kind)
    prompts = [random_tokens(n).tolist() for n in (4, 6, 5, 3)]
    endless = [slowly(tiny, prompt, 15) for prompt in prompts]
    stop = endless[1][2]
    kept: list[list[int]] = []
    answers = generate(tiny, prompts, max_new_tokens=15, stop_tokens=[stop, endless[0][1]], on_rows_kept=kept.append)
    stops = {stop, endless[0][1]}
    assert answers == [row[: next((i for i, t in enumerate(row) if t in stops), 15)] for row in endless]
    assert kept


@torch.no_grad()
def test_the_cache_grows_by_the_virtual_tokens(tiny, kind):
    layer, tokens = put(tiny, kind), random_tokens(2, 6)
    cache = KVCache(3, max_tokens=6)
    in_parts = [layer(part, cache=cache) for part in tokens.split([3, 2, 1], dim=1)]
    torch.testing.assert_close(torch.cat(in_parts, dim=1), layer(tokens), rtol=1e-6, atol=1e-6)
    assert (cache.length, cache.max_tokens) == (6 + N, 6 + N)
    with pytest.raises(ValueError, match="make it larger"):
        layer(tokens[:, :1], cache=cache)


def test_bfloat16_generates_with_the_kernels_for_one_token(tiny, kind):
    tiny.bfloat16()
    put(tiny, kind)
    with torch.no_grad():
        logits, cache = [], KVCache(3, max_tokens=8)
        for token in random_tokens(8):
            logits.append(tiny(token[None, None], cache=cache))
    assert torch.isfinite(torch.cat(logits, dim=1)).all()
    assert torch.isfinite(tiny(random_tokens(1, 1))).all()  # one token, with gradients: not in place
    assert all(p.dtype == torch.float32 for p in tiny.model.adapter_tensors().values())


def test_a_prompt_must_leave_room_for_the_virtual_tokens(tiny, kind):
    put(tiny, kind)
    assert len(generate(tiny, [[1]], max_new_tokens=64 - N - 1)[0]) == 64 - N - 1
    with pytest.raises(ValueError, match=f"more than the model's {64 - N}"):
        generate(tiny, [[1]], max_new_tokens=64 - N)


@pytest.mark.parametrize("kind", ["prefix", "prefix, MLP"])
def test_a_prefix_refuses_checkpointing_where_gradients_are(tiny, kind):
    layer, tokens = put(tiny, KINDS[kind]), random_tokens(1, 4)
    layer.gradient_checkpointing = True
    assert layer.base.gradient_checkpointing
    with pytest.raises(ValueError, match=r"gradient_checkpointing = False"):
        tiny(tokens)
    with torch.no_grad():
        tiny(tokens)


def test_prompt_tuning_trains_with_checkpointing(tiny):
    layer, tokens = put(tiny, KINDS["prompt"]), random_tokens(2, 6)
    gradients = []
    for on in (False, True):
        layer.gradient_checkpointing = on
        gradients += torch.autograd.grad(tiny(tokens).square().mean(), layer.P)
    assert torch.equal(*gradients)


@torch.no_grad()
def test_after_remove_the_base_is_itself(tiny, kind):
    tokens = random_tokens(2, 6)
    transformer, before, state = tiny.model, tiny(tokens), {k: v.clone() for k, v in tiny.state_dict().items()}
    put(tiny, kind)
    assert list(adapter_layers(tiny)) == ["model"]
    assert not torch.equal(tiny(tokens), before)
    remove(tiny)
    assert tiny.model is transformer
    assert torch.equal(tiny(tokens), before)
    assert state.keys() == tiny.state_dict().keys()
    assert all(torch.equal(tiny.state_dict()[name], tensor) for name, tensor in state.items())


def test_over_four_bits(tiny, kind):
    tiny.float()
    for layer in tiny.model.layers:
        layer.self_attn.q_proj = NF4Linear(layer.self_attn.q_proj)
        layer.mlp.down_proj = NF4Linear(layer.mlp.down_proj)
    stored = {name: t.clone() for name, t in tiny.state_dict().items()}
    put(tiny, kind)
    optimizer = torch.optim.AdamW([p for p in tiny.parameters() if p.requires_grad], lr=0.1)
    rows = random_tokens(4, 8)
    training = train(tiny, [Batch(rows, rows)] * 8, optimizer)
    assert training.steps[-1].loss < training.steps[0].loss - 0.1
    remove(tiny)
    assert all(torch.equal(tiny.state_dict()[name], tensor) for name, tensor in stored.items())


def test_it_runs_in_the_trainer_with_lora_inside(tiny, kind):
    tiny.float()
    inject(tiny, ["q_proj"], lambda base: LoRALinear(base, r=2, alpha=2))
    put(tiny, kind)
    trains = {name for name, p in tiny.named_parameters() if p.requires_grad}
    assert trains == {f"{name}.{t}" for name, layer in adapter_layers(tiny).items() for t in layer.adapter_tensors()}


def test_nothing_merges(tiny, kind):
    layer, before = put(tiny, kind), tiny.state_dict()
    for refused in (layer.merge, layer.fused, layer.delta_weight, merged(tiny).__enter__):
        with pytest.raises(TypeError, match="cannot be merged"):
            refused()
    with pytest.raises(TypeError, match="cannot be merged"):
        layer.adapt(torch.zeros(2, 2))
    assert all(torch.equal(tiny.state_dict()[name], tensor) for name, tensor in before.items())


LLAMA_2_7B = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "n_layers": 32, "n_heads": 32}


@pytest.mark.parametrize(
    ("wrap", "n_kv_heads", "count"),
    [
        (lambda base: PrefixTuning(base, n_virtual=20), 32, 20 * 32 * 2 * 4096),
        (lambda base: PrefixTuning(base, n_virtual=20), 8, 20 * 32 * 2 * 1024),  # a quarter of the heads have keys
        (lambda base: PromptTuning(base, n_virtual=20), 32, 20 * 4096),
        (
            lambda base: PrefixTuning(base, n_virtual=20, mlp_features=512),
            32,
            20 * 4096 + (4096 + 1) * 512 + (512 + 1) * 32 * 2 * 4096,
        ),
    ],
    ids=["prefix", "prefix, grouped heads", "prompt", "prefix, MLP"],
)
def test_it_counts_its_parameters_as_its_formula_says(wrap, n_kv_heads, count):
    with torch.device("meta"):
        model = Decoder(ModelConfig(**LLAMA_2_7B, n_kv_heads=n_kv_heads))
    report = inject(model, ["model"], wrap)
    assert report.count.trainable == count
    assert count_parameters(model) == report.count
    assert 20 * 32 * 2 * 4096 == 5_242_880


@pytest.mark.parametrize("kind", WITH_WORDS)
def test_what_does_not_fit_is_refused_before_anything_changes(tiny, kind):
    wrap, transformer = KINDS[kind], tiny.model
    flags = [p.requires_grad for p in tiny.parameters()]
    for settings, message in [
        ({"n_virtual": 0}, "use 1 to 63"),
        ({"n_virtual": 64}, "use 1 to 63"),
        ({"words": [1, 2]}, "4 virtual tokens from 2 words"),
        ({"words": [1, 2, 3, 50]}, r"outside 0\.\.49"),
        ({"words": [1, 2, 3, -1]}, r"outside 0\.\.49"),
    ]:
        with pytest.raises(ValueError, match=message):
            put(tiny, wrap, **settings)
    with pytest.raises(TypeError, match=r"inject\(model, \[.model.\], wrap\)"):
        wrap(nn.Linear(3, 3))
    assert tiny.model is transformer
    assert [p.requires_grad for p in tiny.parameters()] == flags
    put(tiny, wrap)
    with pytest.raises(ValueError, match="wrapped already"):
        put(tiny, wrap)


def test_an_mlp_that_does_not_fit_is_refused(tiny):
    with pytest.raises(ValueError, match="leave one of the two out"):
        PrefixTuning(tiny.model, n_virtual=N, mlp_features=8, words=WORDS)
    with pytest.raises(ValueError, match="mlp_features is 0"):
        PrefixTuning(tiny.model, n_virtual=N, mlp_features=0)


def test_new_ones_begin_as_the_docstrings_say(tiny):
    P = PromptTuning(tiny.model, n_virtual=60).P
    assert -0.5 <= P.min() < -0.4
    assert 0.4 < P.max() <= 0.5
    assert 0.9 < PrefixTuning(tiny.model, n_virtual=60).P.std() < 1.1  # of 2,880 numbers: 1 ± 0.013


def test_a_trained_cache_keeps_nothing_new():
    kept = torch.randn(1, 2, 2, N, 4)
    cache = TrainedCache(kept)
    new = torch.randn(3, 2, 5, 4)
    for _ in range(2):
        keys, values = cache.extend(0, new, -new)
        assert torch.equal(keys[1], torch.cat([kept[0, 0], new[1]], dim=1))
        assert torch.equal(values[1], torch.cat([kept[0, 1], -new[1]], dim=1))


@torch.no_grad()
def test_it_survives_save_and_load(tiny, kind, tmp_path):
    tokens = random_tokens(2, 6)
    put(tiny, kind)
    expected = tiny(tokens)
    save_prompt(tiny, tmp_path)
    remove(tiny)
    report = load_prompt(tiny, tmp_path)
    assert torch.equal(tiny(tokens), expected)
    assert report.hits == {"model": ["model"]}
    tiny.model.P.zero_()
    load_prompt(tiny, tmp_path)  # into the layer that is there
    assert torch.equal(tiny(tokens), expected)
