"""A new token's attention in one call: against float64 over the same bfloat16 numbers, and against the plain lines."""

import pytest
import torch
import torch.nn.functional as F

from minilora.cpu import one_token
from minilora.llm import Decoder, KVCache, ModelConfig, model
from minilora.llm.generation import generate
from minilora.llm.model import rotate

PAST, MOST = 37, 50


def tiny_config():
    sizes = {"vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "n_layers": 3, "n_heads": 6, "n_kv_heads": 2}
    return ModelConfig(**sizes)


def given(batch, heads, kv_heads, head_dim, n_rotations=1, size=1.0):
    torch.manual_seed(0)
    q, k, v = (torch.randn(batch, 1, n * head_dim).bfloat16() for n in (heads, kv_heads, kv_heads))
    keys, values = (torch.randn(batch, kv_heads, MOST, head_dim).bfloat16() for _ in range(2))
    angles = torch.randn(n_rotations, 1, head_dim // 2)
    cos, sin = torch.cat((angles.cos(), angles.cos()), -1), torch.cat((-angles.sin(), angles.sin()), -1)
    return q * size, k, v, (cos.bfloat16(), sin.bfloat16()), keys, values


def exactly(q, k, v, rotation, keys, values, past, mask=None):
    """What it should give, and write into keys, in float64. The new key is rounded, as the cache keeps it."""
    batch, head_dim = len(keys), keys.shape[-1]
    cos_sin = tuple(table.double() for table in rotation)
    q, k, v = (t.double().view(batch, -1, 1, head_dim) for t in (q, k, v))
    with torch.no_grad():
        q, k = rotate(q, cos_sin), rotate(k, cos_sin)
    keys, values = keys.double()[:, :, : past + 1].clone(), values.double()[:, :, : past + 1].clone()
    keys[:, :, past], values[:, :, past] = k[:, :, 0].bfloat16().double(), v[:, :, 0]
    y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)
    return y.transpose(1, 2).flatten(2), k[:, :, 0]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (6, 2), (9, 3)])
@pytest.mark.parametrize("head_dim", [2, 6, 64])
@pytest.mark.parametrize("rotations", ["one for all", "one a row"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", [1, 10])
def test_it_is_exact_but_for_one_rounding(batch, heads, head_dim, rotations, masked, size):
    """Between the rounding of the key and that of the result all is float32, with an exp that is off by 2⁻¹⁸, and by
    |score| · 2⁻²³ more for what a score is off itself: together far below the rounding, 2⁻⁸."""
    *inputs, keys, values = given(batch, *heads, head_dim, batch if rotations == "one a row" else 1, size)
    mask = None
    if masked:
        mask = torch.rand(batch, 1, 1, PAST + 1) < 0.5
        mask[..., -1] = True
    right, right_key = exactly(*inputs, keys, values, PAST, mask)
    kept = keys.clone(), values.clone()
    y = one_token.attention(*inputs, keys, values, PAST, mask)

    spread = values[:, :, : PAST + 1].float().abs().amax().item()
    assert ((y.double() - right).abs() <= 2**-8 * right.abs() + 2**-12 * spread).all()
    assert ((keys[:, :, PAST].double() - right_key).abs() <= 2**-8 * right_key.abs() + 2**-20).all()
    assert torch.equal(values[:, :, PAST].flatten(1), inputs[2].flatten(1))
    for now, before in zip((keys, values), kept, strict=True):
        before[:, :, PAST] = now[:, :, PAST]
        assert torch.equal(now, before)


def test_what_is_hidden_does_not_count_at_all():
    *inputs, keys, values = given(2, 6, 2, 64)
    mask = torch.ones(2, 1, 1, PAST + 1, dtype=torch.bool)
    mask[1, ..., :20] = False
    y = one_token.attention(*inputs, keys, values, PAST, mask)
    keys[1, :, :20], values[1, :, :20] = 30, 3e38
    again = one_token.attention(*inputs, keys, values, PAST, mask)

    assert torch.equal(again[0], y[0])
    assert torch.equal(again[1], y[1])


@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_gives_the_same_alone_and_in_any_number_of_threads(threads):
    *inputs, rotation, keys, values = given(3, 6, 2, 64)
    together = one_token.attention(*inputs, rotation, keys.clone(), values.clone(), PAST)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for row in range(3):
            alone = [t[row : row + 1].clone() for t in (*inputs, keys, values)]
            assert torch.equal(one_token.attention(*alone[:3], rotation, *alone[3:], PAST), together[row : row + 1])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a | {"q": a["q"][:, :, :-2]},
        lambda a: a | {"k": a["k"][:1]},
        lambda a: a | {"v": a["v"].repeat(1, 2, 1)},
        lambda a: a | {"past": MOST},
        lambda a: a | {"past": -1},
        lambda a: a | {"keys": a["keys"].transpose(1, 2).contiguous().transpose(1, 2)},
        lambda a: a | {"values": a["values"][:, :, :-1]},
        lambda a: a | {"rotation": tuple(t.repeat(3, 1, 1) for t in a["rotation"])},
        lambda a: a | {"mask": torch.ones(2, 1, 1, PAST, dtype=torch.bool)},
        lambda a: a | {"mask": torch.ones(2, 1, 1, PAST + 1)},
        lambda a: a | {"q": a["q"].float()},
    ],
)
def test_what_does_not_fit_is_refused(change):
    names = "q", "k", "v", "rotation", "keys", "values"
    arguments = change(dict(zip(names, given(2, 6, 2, 64), strict=True)) | {"past": PAST, "mask": None})
    with pytest.raises(ValueError, match="do not fit together"):
        one_token.attention(**arguments)


@pytest.fixture
def calls(monkeypatch):
    seen, attention = [], one_token.attention
    monkeypatch.setattr(one_token, "attention", lambda *given: seen.append(given) or attention(*given))
    return seen


def test_the_decoder_asks_for_it_and_gives_what_it_gave(calls):
    """Logits of one token, read behind others and with them: the two ways round in other places, by 2⁻⁸ each."""
    torch.manual_seed(0)
    decoder = Decoder(tiny_config()).bfloat16().eval()
    tokens = torch.randint(0, decoder.config.vocab_size, (2, 7))
    with torch.no_grad():
        whole, cache = decoder(tokens), KVCache(decoder.config.n_layers, 7)
        decoder(tokens[:, :6], cache=cache)
        assert not calls
        last = decoder(tokens[:, 6:], cache=cache)

    assert len(calls) == decoder.config.n_layers
    assert cache.length == 7
    assert (last[:, 0] - whole[:, 6]).norm() <= 2**-6 * whole[:, 6].norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_and_gradients_go_the_plain_way(dtype, calls):
    decoder = Decoder(tiny_config())
    tokens = torch.randint(0, decoder.config.vocab_size, (2, 7))
    for kind, grad in ((dtype, False), (torch.bfloat16, True)):
        decoder, cache = decoder.to(kind), KVCache(decoder.config.n_layers, 7)
        with torch.no_grad():
            decoder(tokens[:, :6], cache=cache)
        with torch.set_grad_enabled(grad):
            decoder(tokens[:, 6:], cache=cache)
        assert not calls


@pytest.mark.parametrize(("most", "n_calls"), [(11, 0), (12, 3)])
def test_with_much_in_the_cache_torch_does_it(most, n_calls, calls, monkeypatch):
    monkeypatch.setattr(model, "MOST_TOKENS", most)
    decoder, cache = Decoder(tiny_config()).bfloat16(), KVCache(3, 7)
    tokens = torch.randint(0, decoder.config.vocab_size, (2, 7))
    with torch.no_grad():
        decoder(tokens[:, :6], cache=cache)
        decoder(tokens[:, 6:], cache=cache)
    assert len(calls) == n_calls


def test_a_full_cache_is_refused(calls):
    decoder, cache = Decoder(tiny_config()).bfloat16(), KVCache(3, 6)
    tokens = torch.randint(0, decoder.config.vocab_size, (2, 7))
    with torch.no_grad():
        decoder(tokens[:, :6], cache=cache)
        with pytest.raises(ValueError, match="made for 6 tokens and 7 are needed"):
            decoder(tokens[:, 6:], cache=cache)


def test_a_row_that_is_padded_gives_the_same_tokens_as_alone(calls):
    torch.manual_seed(0)
    decoder = Decoder(tiny_config()).bfloat16()
    prompts = [[5, 6, 7, 8, 9, 10], [11, 12], [13, 14, 15, 16]]
    together = generate(decoder, prompts, max_new_tokens=6)

    assert calls
    assert any(call[-1] is not None for call in calls)
    assert together == [generate(decoder, [prompt], max_new_tokens=6)[0] for prompt in prompts]
