"""The decoder's operations with a backward by hand against their plain twins: values and gradients."""

import weakref

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from tiny_decoder import tiny_config

from minilora.llm import Decoder, autograd, model
from minilora.torch_lora import LoRALinear, inject
from minilora.torch_lora.autograd import lora_linear
from minilora.torch_lora.inject import adapter_layers

SHAPES = [(1, 8), (5, 8), (2, 3, 8), (2, 1, 3, 8)]


def gradients(function, *inputs):
    """The value of a function and the gradients to its inputs, every output weighed differently."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    y = function(*inputs)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape))
    return [y.detach(), *(x.grad for x in inputs)]


def assert_equal(ours, plain, *inputs):
    for mine, theirs in zip(gradients(ours, *inputs), gradients(plain, *inputs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def random(*shape):
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(shape):
    assert_equal(
        lambda x, weight: autograd.rms_norm(x, weight, 1e-5),
        lambda x, weight: F.rms_norm(x, (8,), weight, 1e-5),
        random(*shape),
        random(8),
    )


def test_rms_norm_of_zeros_is_zero():
    y, dx, _ = gradients(lambda x, weight: autograd.rms_norm(x, weight, 1e-5), torch.zeros(2, 8), torch.ones(8))

    assert not y.any()
    assert dx.isfinite().all()


@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu(shape):
    assert_equal(autograd.swiglu, lambda gate, up: F.silu(gate) * up, random(*shape), random(*shape))


@pytest.mark.parametrize("rows", [1, 2])
def test_rotate(rows):
    angles = random(rows, 5, 3)
    cos, sin = tables = torch.cat([angles.cos()] * 2, -1), torch.cat((-angles.sin(), angles.sin()), -1)
    with torch.no_grad():
        x = random(2, 4, 5, 6)
        plain = model.rotate(x, tables)  # no gradient: the plain lines
    y, dx = gradients(lambda x: autograd.rotate(x, cos[:, None], sin[:, None]), x)

    torch.testing.assert_close(y, plain, rtol=1e-12, atol=1e-12)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    torch.testing.assert_close(dx, model.rotate(weights, (cos, -sin)), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: autograd.rotate(x, cos[:, None], sin[:, None]), x.requires_grad_())


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("seq", [0, 1, 2, 4, 9])
def test_causal_attention(heads, seq, monkeypatch):
    monkeypatch.setattr(autograd, "QUERIES_AT_ONCE", 4)
    n_heads, kv_heads = heads
    assert_equal(
        autograd.causal_attention,
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        random(2, n_heads, seq, 4),
        random(2, kv_heads, seq, 4),
        random(2, kv_heads, seq, 4),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes_come_back_as_they_went_in(dtype):
    x, weight = torch.randn(2, 3, 8, dtype=dtype), torch.randn(8, dtype=dtype)
    for results in (
        gradients(lambda x, w: autograd.rms_norm(x, w, 1e-5), x, weight),
        gradients(autograd.swiglu, x, x),
        gradients(lambda x: autograd.rotate(x[:, None], torch.ones(1, 1, 3, 8, dtype=dtype), x[:1, None]), x),
        gradients(autograd.causal_attention, x[:, None], x[:, None], x[:, None]),
    ):
        assert {result.dtype for result in results} == {dtype}


def test_bfloat16_rounds_as_often_as_the_plain_twins_do():
    """Both against float64: by hand no further away than torch's own steps, but for a tenth."""
    torch.manual_seed(0)
    x, y, weight = torch.randn(64, 96), torch.randn(64, 96), torch.randn(96)
    for ours, plain, inputs in (
        (lambda x, w: autograd.rms_norm(x, w, 1e-5), lambda x, w: F.rms_norm(x, (96,), w, 1e-5), (x, weight)),
        (autograd.swiglu, lambda gate, up: F.silu(gate) * up, (x, y)),
    ):
        rounded = [value.bfloat16() for value in inputs]
        exact = gradients(plain, *(value.double() for value in rounded))
        for mine, theirs, right in zip(gradients(ours, *rounded), gradients(plain, *rounded), exact, strict=True):
            assert (mine - right).norm() <= 1.1 * (theirs - right).norm()


def test_attention_keeps_q_k_and_v_alone():
    q, k = torch.randn(1, 4, 9, 8, requires_grad=True), torch.randn(1, 2, 9, 8, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        autograd.causal_attention(q, k, k)

    assert kept == [q.shape, k.shape, k.shape]


@pytest.mark.parametrize("function", [autograd.swiglu, lambda x, y: autograd.rms_norm(x, y[0, 0], 1e-5)])
def test_a_lora_layer_does_not_keep_what_can_be_made_again(function):
    x, other, A, B = (random(*shape).requires_grad_() for shape in [(2, 3, 8), (2, 3, 8), (2, 8), (5, 2)])
    base = torch.nn.Linear(8, 5, bias=False, dtype=torch.float64).requires_grad_(False)
    results = []
    for again in (False, True):
        y = function(x, other)
        out = lora_linear(y if again else y.view(y.shape), A, B, 2.0, base, base.weight)
        storage = weakref.ref(y.untyped_storage())
        del y
        assert (storage() is None) == again
        results.append(torch.autograd.grad(out.square().sum(), (x, other, A, B)))

    for plain, remade in zip(*results, strict=True):
        assert torch.equal(plain, remade)


def test_layers_over_one_norm_share_what_the_first_made_again(monkeypatch):
    made, scaled = [], autograd._scaled
    monkeypatch.setattr(autograd, "_scaled", lambda *saved: made.append(weakref.ref(y := scaled(*saved))) or y)
    x, weight, A, B = (random(*shape).requires_grad_() for shape in [(2, 3, 8), (8,), (2, 8), (5, 2)])
    base = torch.nn.Linear(8, 5, bias=False, dtype=torch.float64).requires_grad_(False)
    y = autograd.rms_norm(x, weight, 1e-5)
    outs = [lora_linear(y, A, B, 2.0, base, base.weight) for _ in range(3)]
    node = y.grad_fn
    del y
    for _ in range(2):
        sum(outs).sum().backward(retain_graph=True)

    assert len(made) == 1 + 2  # in the forward, and once for all three layers in each backward
    assert node.again.made is None
    assert all(result() is None for result in made)


@pytest.mark.parametrize("changed", ["an adapter", "a norm's weight"])
def test_a_weight_changed_before_the_backward_is_refused(changed):
    decoder = Decoder(tiny_config())
    inject(decoder, "all-linear", lambda base: LoRALinear(base, r=2, alpha=4))
    loss = decoder(torch.zeros(1, 3, dtype=torch.long)).sum()
    layer = decoder.model.layers[1]
    with torch.no_grad():
        (layer.mlp.gate_proj.A if changed == "an adapter" else layer.input_layernorm.weight).add_(1)

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_torchs_own_checkpoint_works_around_a_layer():
    decoder = Decoder(tiny_config()).double()
    inject(decoder, "all-linear", lambda base: LoRALinear(base, r=2, alpha=4))
    layer, x = decoder.model.layers[1], random(2, 5, decoder.config.hidden_size).requires_grad_()
    rotation = model.rotation_of(decoder.config, torch.arange(5)[None], x.dtype)
    A = layer.self_attn.q_proj.A
    plain = torch.autograd.grad(layer(x, rotation, None, None).square().sum(), (x, A))
    y = torch.utils.checkpoint.checkpoint(layer, x, rotation, None, None, use_reentrant=False)

    for mine, theirs in zip(torch.autograd.grad(y.square().sum(), (x, A)), plain, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("size_of_q", [1, 3])
def test_attention_in_bfloat16_is_at_most_three_times_as_far_from_exact_as_torchs(size_of_q):
    """Scores of size s are rounded by up to s · 2⁻⁹, and p by that share; in torch's kernel they are float32."""

    def torchs(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    torch.manual_seed(0)
    shapes = [(2, 6, 200, 96), (2, 2, 200, 96), (2, 2, 200, 96)]  # two blocks of queries
    rounded = [torch.randn(shape).bfloat16() for shape in shapes]
    rounded[0] *= size_of_q
    exact = gradients(torchs, *(t.double() for t in rounded))
    ours, theirs = gradients(autograd.causal_attention, *rounded), gradients(torchs, *rounded)

    for mine, other, right in zip(ours, theirs, exact, strict=True):
        assert (mine - right).norm() <= 3 * (other - right).norm()


def test_the_decoder_uses_them_where_gradients_flow_and_gives_the_same():
    torch.manual_seed(0)
    decoder = Decoder(tiny_config()).bfloat16()
    tokens = torch.randint(0, decoder.config.vocab_size, (2, 7))
    with torch.no_grad():
        plain = decoder(tokens)
    names = set()
    pending = [decoder(tokens).grad_fn]
    while pending:
        node = pending.pop()
        if node is not None and node not in names:
            names.add(node)
            pending += [parent for parent, _ in node.next_functions]
    kinds = {type(node).__name__ for node in names}

    assert {"_RMSNormBackward", "_RotateBackward", "_SwiGLUBackward", "_CausalAttentionBackward"} <= kinds
    assert (decoder(tokens) - plain).norm() < 0.01 * plain.norm()  # a few roundings to 8 bits apart
    decoder.double()
    with torch.no_grad():
        plain = decoder(tokens)
    torch.testing.assert_close(decoder(tokens), plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bytes_of_a_number", [2, 8], ids=["torch's attention", "attention by hand"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_every_gradient_of_the_decoder_is_that_of_the_plain_lines(monkeypatch, bytes_of_a_number, method):
    torch.manual_seed(0)
    monkeypatch.setattr(model, "MOST_BYTES_A_NUMBER", bytes_of_a_number)
    decoder = Decoder(tiny_config()).double()
    if method == "lora":
        inject(decoder, "all-linear", lambda base: LoRALinear(base, r=2, alpha=4))
        decoder.double()
        for layer in adapter_layers(decoder).values():
            torch.nn.init.normal_(layer.B)
    tokens = torch.randint(0, decoder.config.vocab_size, (2, 7))

    def all_gradients():
        decoder.zero_grad()
        decoder(tokens).square().sum().backward()
        return {name: p.grad.clone() for name, p in decoder.named_parameters() if p.requires_grad}

    by_hand = all_gradients()
    monkeypatch.setattr(model, "trains_on_cpu", lambda x: False)
    for name, gradient in all_gradients().items():
        torch.testing.assert_close(by_hand[name], gradient, rtol=1e-11, atol=1e-12, msg=name)


def test_gradients_of_gradients_are_refused():
    x = torch.randn(2, 3, 8, requires_grad=True)
    for y in (
        autograd.rms_norm(x, torch.ones(8), 1e-5),
        autograd.swiglu(x, x),
        autograd.rotate(x[:, None], torch.ones(1, 1, 3, 8), torch.ones(1, 1, 3, 8)),
        autograd.causal_attention(x[:, None], x[:, None], x[:, None]),
    ):
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            dx.sum().backward()


def test_autocast_takes_the_plain_lines():
    decoder = Decoder(tiny_config())
    tokens = torch.randint(0, decoder.config.vocab_size, (2, 7))
    exact = decoder(tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = decoder(tokens)
    logits.float().square().sum().backward()

    assert logits.dtype == torch.bfloat16
    assert (logits - exact).norm() < 0.05 * exact.norm()


def test_rows_without_tokens():
    decoder = Decoder(tiny_config())
    assert decoder(torch.zeros(2, 0, dtype=torch.long)).shape == (2, 0, decoder.config.vocab_size)


def test_a_cache_fills_with_gradients_enabled():
    decoder, cache = Decoder(tiny_config()), model.KVCache(3, 10)
    tokens = torch.randint(0, decoder.config.vocab_size, (2, 7))
    with torch.no_grad():
        whole = decoder(tokens)
    read = [decoder(part, cache=cache) for part in tokens.split([4, 3], dim=1)]

    torch.testing.assert_close(torch.cat(read, dim=1), whole, rtol=1e-4, atol=1e-5)
