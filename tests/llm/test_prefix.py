"""What all rows begin with is computed once, and every value and gradient is what it is without sharing."""

import pytest
import torch
from tiny_decoder import tiny_config

from minilora.llm import Decoder
from minilora.llm.model import KVCache
from minilora.llm.prefix import apart, together
from minilora.torch_lora import LoRALinear, inject
from minilora.train.data import Batch, Sample, collate
from minilora.train.loss import loss_of

ROWS, SEQ = 3, 7


def tiny(method="lora", dropout=0.0):
    torch.manual_seed(0)
    decoder = Decoder(tiny_config()).double().train()
    if method == "lora":
        inject(decoder, "all-linear", lambda base: LoRALinear(base, r=2, alpha=4, dropout=dropout))
        for name, p in decoder.double().named_parameters():
            if name.endswith(".B"):
                torch.nn.init.normal_(p)
    return decoder


def some_batch(shared, rows=ROWS):
    tokens = torch.randint(0, 50, (rows, SEQ), generator=torch.Generator().manual_seed(1))
    tokens[:, :shared] = tokens[:1, :shared]
    if shared < SEQ:
        tokens[:, shared] = torch.arange(rows)
    return Batch(tokens, tokens)


def tokens_of_a_layer(decoder, batch):
    """How many tokens go through the MLP for this batch."""
    seen = []
    handle = decoder.model.layers[1].mlp.register_forward_pre_hook(
        lambda _, given: seen.append(given[0].shape[:2].numel())
    )
    loss_of(decoder, batch)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("shared", [0, 1, 4, SEQ])
def test_rows_that_begin_alike_lie_together_and_apart_again(shared):
    x = torch.randn(ROWS, SEQ, 5)
    x[:, :shared] = x[:1, :shared]
    joined = together(x, shared)

    assert joined.shape == (1, shared + ROWS * (SEQ - shared), 5)
    assert torch.equal(apart(joined, ROWS, shared), x)


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("shared", [1, 4, SEQ])
def test_values_and_gradients_are_those_without_sharing(method, checkpointing, shared):
    """Each number is the same sum in another order: 1e-12 in float64."""
    decoder, tokens = tiny(method), some_batch(shared).tokens
    decoder.model.gradient_checkpointing = checkpointing
    found = []
    for n in (0, shared):
        decoder.zero_grad()
        hidden = decoder.model(tokens, shared=n)
        (hidden * torch.linspace(-1, 1, hidden.numel()).view(hidden.shape)).sum().backward()  # other in each row
        found.append([hidden.detach(), *(p.grad.clone() for p in decoder.parameters() if p.grad is not None)])

    assert len(found[0]) == len(found[1]) > 9
    for plain, other in zip(*found, strict=True):
        torch.testing.assert_close(other, plain, rtol=1e-12, atol=1e-12)


def test_rows_with_other_positions_a_mask_or_a_cache_share_nothing():
    decoder, tokens = tiny(), some_batch(4).tokens
    for given in (
        {"positions": torch.arange(SEQ)[None]},
        {"mask": torch.ones(ROWS, SEQ, SEQ, dtype=torch.bool)},
        {"cache": KVCache(2, SEQ)},
    ):
        with pytest.raises(ValueError, match="rows share tokens only where all are read at the same place"):
            decoder.model(tokens, shared=4, **given)


@pytest.mark.parametrize(
    ("rows", "shared"),
    [([[1, 2, 3], [1, 2, 4]], 2), ([[1, 2], [1, 2, 0]], 2), ([[1, 2], [3, 2]], 0), ([[5, 6]], 2), ([[1, 2]] * 2, 2)],
)
def test_a_batch_says_with_how_many_tokens_its_rows_begin_alike(rows, shared):
    assert collate([Sample(row, row) for row in rows], pad=9).shared == shared


def test_the_loss_and_its_gradients_share_what_is_alike():
    batch, apart_batch = some_batch(4), some_batch(4)
    apart_batch.__dict__["shared"] = 0
    decoder, found = tiny(), []
    for one in (batch, apart_batch):
        decoder.zero_grad()
        loss = loss_of(decoder, one)
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in decoder.parameters() if p.grad is not None)])

    assert tokens_of_a_layer(decoder, batch) == 4 + ROWS * (SEQ - 4)
    assert tokens_of_a_layer(decoder, apart_batch) == ROWS * SEQ
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_in_bfloat16_sharing_costs_no_more_than_rounding_does():
    """As far from exact as without it, where attention, norms and products are those of bfloat16 on this machine."""
    decoder, tokens = tiny(), some_batch(4, rows=8).tokens.repeat(1, 8)
    tokens[:, 4:] = torch.randint(0, 50, (8, 52), generator=torch.Generator().manual_seed(2))

    def gradient(model, shared):
        model.zero_grad()
        model.model(tokens, shared=shared).square().sum().backward()
        return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])

    exact = gradient(decoder, 0)
    plain, other = (gradient(decoder.bfloat16(), shared) for shared in (0, 4))

    assert (other - exact).norm() <= 1.5 * (plain - exact).norm()


class Noisy(torch.nn.Module):
    """A layer of someone else's, with a rate named as theirs are."""

    def __init__(self, base, **rate):
        super().__init__()
        self.base = base
        self.__dict__.update(rate)

    def forward(self, x):
        return self.base(x)


@pytest.mark.parametrize(
    "layer", [torch.nn.Dropout(0.1), torch.nn.AlphaDropout(0.1), Noisy(torch.nn.Identity(), dropout=0.1)]
)
def test_nothing_is_shared_with_any_layer_that_drops(layer):
    decoder = tiny()
    decoder.model.layers[0].mlp.down_proj = torch.nn.Sequential(decoder.model.layers[0].mlp.down_proj, layer.train())

    assert tokens_of_a_layer(decoder, some_batch(4)) == ROWS * SEQ
    layer.eval()
    assert tokens_of_a_layer(decoder, some_batch(4)) < ROWS * SEQ


def test_nothing_is_shared_where_it_saves_little_or_where_rows_drop_numbers_of_their_own():
    assert tokens_of_a_layer(tiny(), some_batch(0)) == ROWS * SEQ
    assert tokens_of_a_layer(tiny(), some_batch(4, rows=1)) == SEQ
    assert tokens_of_a_layer(tiny(dropout=0.5), some_batch(4)) == ROWS * SEQ
    assert tokens_of_a_layer(tiny(dropout=0.5).eval(), some_batch(4)) < ROWS * SEQ
    wide = torch.arange(34).repeat(2, 1)
    wide[:, 2] = torch.arange(2)  # of 68 tokens two are saved: less than a sixteenth
    assert tokens_of_a_layer(tiny(), Batch(wide, wide)) == 68
