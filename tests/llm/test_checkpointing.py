"""A layer computed again in the backward: the same bits, less memory, and no other random numbers."""

import weakref

import pytest
import torch
from tiny_decoder import tiny_config

from minilora.llm import Decoder, checkpointing
from minilora.llm.model import KVCache
from minilora.qlora import QLoRALinear
from minilora.torch_lora import LoRALinear, inject
from minilora.train.data import Batch
from minilora.train.loss import loss_of

WRAPPERS = {
    "lora": lambda base: LoRALinear(base, r=2, alpha=4),
    "dropout": lambda base: LoRALinear(base, r=2, alpha=4, dropout=0.5),
    "qlora": lambda base: QLoRALinear(base, r=2, alpha=4),
}


def tiny(method):
    torch.manual_seed(0)
    decoder = Decoder(tiny_config()).bfloat16()
    if method != "full":
        inject(decoder, "all-linear", WRAPPERS[method])
        for name, p in decoder.named_parameters():
            if name.endswith(".B"):
                torch.nn.init.normal_(p)
    return decoder.train()


def some_tokens(decoder):
    return torch.randint(0, decoder.config.vocab_size, (2, 7), generator=torch.Generator().manual_seed(1))


def loss_and_gradients(decoder, checkpointed):
    decoder.model.gradient_checkpointing = checkpointed
    decoder.zero_grad()
    torch.manual_seed(2)
    tokens = some_tokens(decoder)
    loss = loss_of(decoder, Batch(tokens, tokens))
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in decoder.named_parameters() if p.requires_grad}
    return {"loss": loss.detach(), "next random number": torch.rand(()), **gradients}


@pytest.mark.parametrize("method", ["full", *WRAPPERS])
def test_every_gradient_has_the_bits_that_it_has_without(method):
    decoder = tiny(method)
    without, with_it = (loss_and_gradients(decoder, checkpointed) for checkpointed in (False, True))

    assert without.keys() == with_it.keys()
    assert any(gradient.any() for name, gradient in without.items() if "layers.0" in name)
    for name, value in without.items():
        assert torch.equal(value, with_it[name]), name


class Kept:
    """What autograd holds in the place of a tensor."""

    def __init__(self, tensor):
        self.tensor = tensor


def test_the_inputs_of_the_layers_are_all_that_is_kept():
    decoder = tiny("qlora")
    weights = {t.data_ptr() for t in (*decoder.parameters(), *decoder.buffers())}
    n_kept = {}
    for checkpointed in (False, True):
        alive = weakref.WeakSet()

        def keep(t, alive=alive):
            kept = Kept(t)
            if t.data_ptr() not in weights:
                alive.add(kept)
            return kept

        decoder.model.gradient_checkpointing = checkpointed
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept.tensor):
            hidden = decoder.model(some_tokens(decoder))
        n_kept[checkpointed] = len(alive)
        del hidden
    last_norm = 2  # its input, and a scale for each token

    assert n_kept[True] == decoder.config.n_layers + last_norm
    assert n_kept[False] > 5 * decoder.config.n_layers


def test_generation_and_evaluation_compute_every_layer_once(monkeypatch):
    decoder = tiny("lora")
    decoder.model.gradient_checkpointing = True
    monkeypatch.setattr("minilora.llm.model.recomputed", lambda *_: pytest.fail("no gradient is wanted"))
    with torch.no_grad():
        decoder(some_tokens(decoder))
        decoder(some_tokens(decoder), cache=KVCache(decoder.config.n_layers, 7))
    decoder(some_tokens(decoder)[:, :1], cache=KVCache(decoder.config.n_layers, 7))


def test_a_weight_changed_before_the_backward_is_refused():
    decoder = tiny("lora")
    decoder.model.gradient_checkpointing = True
    tokens = some_tokens(decoder)
    loss = loss_of(decoder, Batch(tokens, tokens))
    with torch.no_grad():
        next(p for p in decoder.parameters() if p.requires_grad).add_(1)

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_of_gradients_are_refused():
    x = torch.randn(2, 3, requires_grad=True)
    y = checkpointing.recomputed(torch.nn.Linear(3, 3), x)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)

    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_torchs_compiler_and_sympy_stay_out(run_program):
    """Either takes tens of MiB, which is what checkpointing is to save."""
    program = """
        import sys, torch
        from minilora.llm.checkpointing import recomputed
        layer = torch.nn.Linear(4, 4)
        recomputed(layer, torch.ones(2, 4, requires_grad=True)).sum().backward()
        print(layer.weight.grad is not None, [name for name in ("torch._dynamo", "sympy") if name in sys.modules])
    """
    assert run_program(program) == "True []"
