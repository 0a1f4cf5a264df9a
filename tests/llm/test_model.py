"""The decoder against itself: every way to the same number gives the same number."""

import pytest
import torch
from tiny_decoder import tiny_config
from torch import nn

from minilora.llm import Decoder, KVCache
from minilora.llm.model import rotate, rotation_of

# The same float64 sums in another order: 50 terms of size 10, each rounded by 1e-16 of itself, three layers deep.
CLOSE = {"atol": 1e-11, "rtol": 0}


def random_tokens(batch: int, seq: int) -> torch.Tensor:
    return torch.randint(0, 50, (batch, seq))


def test_no_token_sees_the_tokens_after_it(tiny):
    tokens = random_tokens(2, 10)
    changed = tokens.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % 50

    assert torch.equal(tiny(tokens)[:, :6], tiny(changed)[:, :6])


@pytest.mark.parametrize("pieces", [[1] * 9, [9], [4, 1, 3, 1], [2, 7]])
def test_a_text_read_in_pieces_gives_the_logits_of_the_whole(tiny, pieces):
    tokens, cache = random_tokens(2, 9), KVCache(n_layers=3, max_tokens=9)

    with torch.no_grad():
        read = torch.cat([tiny(piece, cache=cache) for piece in tokens.split(pieces, dim=1)], dim=1)

    torch.testing.assert_close(read, tiny(tokens).detach(), **CLOSE)


def test_padding_on_the_right_changes_no_logits_before_it(tiny):
    short, long = random_tokens(1, 4), random_tokens(1, 9)
    batch = torch.cat((torch.cat((short, torch.zeros(1, 5, dtype=torch.long)), dim=1), long))

    logits = tiny(batch)

    torch.testing.assert_close(logits[0, :4], tiny(short)[0], **CLOSE)
    torch.testing.assert_close(logits[1], tiny(long)[0], **CLOSE)


def test_two_texts_packed_into_one_row_do_not_meet(tiny):
    first, second = random_tokens(1, 4), random_tokens(1, 5)
    text_of = torch.tensor([0] * 4 + [1] * 5)
    mask = (text_of[:, None] == text_of).tril()[None]
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])

    packed = tiny(torch.cat((first, second), dim=1), mask=mask, positions=positions)

    torch.testing.assert_close(packed, torch.cat((tiny(first), tiny(second)), dim=1), **CLOSE)


def test_only_distances_between_positions_matter(tiny):
    tokens = random_tokens(1, 8)

    moved = tiny(tokens, positions=torch.arange(100, 108)[None])

    torch.testing.assert_close(moved, tiny(tokens), **CLOSE)


def test_a_rotation_keeps_lengths_and_position_0_keeps_everything():
    config, x = tiny_config(), torch.randn(2, 6, 5, 4, dtype=torch.float64)

    turned = rotate(x, rotation_of(config, torch.arange(5)[None], x.dtype))

    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), **CLOSE)
    assert torch.equal(turned[:, :, 0], x[:, :, 0])


def test_a_rotation_is_a_complex_number_times_one_of_length_1():
    config, x = tiny_config(), torch.randn(2, 6, 5, 4, dtype=torch.float64)
    positions = torch.tensor([[0, 3, 4, 9, 100]])
    frequencies = torch.tensor(config.rope_frequencies(), dtype=torch.float64)

    turned = rotate(x, rotation_of(config, positions, x.dtype))

    first, second = x.chunk(2, dim=-1)
    as_complex = torch.complex(first, second) * torch.exp(1j * positions[0, :, None] * frequencies)
    torch.testing.assert_close(turned, torch.cat((as_complex.real, as_complex.imag), dim=-1), **CLOSE)


def test_bfloat16_tells_position_256_from_257():
    cos, _ = rotation_of(tiny_config(), torch.tensor([[256, 257]]), torch.bfloat16)

    assert cos.dtype == torch.bfloat16
    assert not torch.equal(cos[0, 0], cos[0, 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_logits_have_the_dtype_of_the_weights(dtype):
    model = Decoder(tiny_config(qkv_bias=True)).to(dtype)

    logits = model(random_tokens(2, 5))

    assert logits.dtype == dtype
    assert logits.isfinite().all()


def test_the_head_over_chosen_hidden_states_gives_the_chosen_logits(tiny):
    tokens = random_tokens(2, 7)

    chosen = tiny.lm_head(tiny.model(tokens)[:, [2, 5]])

    torch.testing.assert_close(chosen, tiny(tokens)[:, [2, 5]], **CLOSE)


def test_any_projection_may_be_replaced_by_something_that_is_only_callable(tiny):
    class Wrapped(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base = base

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x)

    tokens = random_tokens(2, 7)
    before = tiny(tokens)
    for name, module in list(tiny.named_modules()):
        if isinstance(module, nn.Linear | nn.Embedding):
            parent, _, child = name.rpartition(".")
            setattr(tiny.get_submodule(parent), child, Wrapped(module))

    assert torch.equal(tiny(tokens), before)


def test_a_tied_head_is_the_embedding_and_stays_it_in_another_dtype():
    model = Decoder(tiny_config(tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight

    model.to(torch.bfloat16)

    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert Decoder(tiny_config()).lm_head.weight is not model.model.embed_tokens.weight


def test_a_full_cache_says_so(tiny):
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match="the cache was made for 4 tokens and 5 are needed: make it larger"),
    ):
        tiny(random_tokens(1, 5), cache=KVCache(n_layers=3, max_tokens=4))


def test_a_cache_that_forgot_a_row_goes_on_with_the_others(tiny):
    tokens, cache = random_tokens(3, 6), KVCache(n_layers=3, max_tokens=6)
    with torch.no_grad():
        tiny(tokens[:, :4], cache=cache)
        cache.keep_rows([2, 0])
        logits = tiny(tokens[[2, 0], 4:], cache=cache)

    torch.testing.assert_close(logits, tiny(tokens)[[2, 0], 4:].detach(), **CLOSE)
