"""Packed rows: each sample as if it stood alone."""

import sys
import weakref
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "llm"))
from tiny_decoder import tiny_config

from minilora.llm import Decoder
from minilora.train.data import IGNORED, Sample, collate, mask_prompt
from minilora.train.loss import loss_of
from minilora.train.packing import make_packed_batches, packed_rows
from minilora.train.trainer import in_parts, whole_batch

LENGTHS = [(3, 2), (1, 1), (4, 5), (2, 1), (1, 6)]


def samples(seed=0):
    generator = torch.Generator().manual_seed(seed)

    def some(count):
        return torch.randint(1, 50, (count,), generator=generator).tolist()

    return [mask_prompt(some(n), some(m), eos=0, name=f"{n}+{m}") for n, m in LENGTHS]


def hidden(model, batch):
    return model.model(batch.tokens, positions=batch.positions, mask=batch.mask)


def test_each_sample_is_in_one_row_and_no_row_is_too_long():
    rows = packed_rows(samples(), 10)

    assert sorted(sample.name for row in rows for sample in row) == sorted(sample.name for sample in samples())
    assert [[sample.name for sample in row] for row in rows] == [["3+2", "1+1"], ["4+5"], ["2+1"], ["1+6"]]


def test_positions_begin_anew_and_nothing_is_seen_of_another_sample():
    (batch,) = make_packed_batches([mask_prompt([5], [6], 0), mask_prompt([7, 8], [9], 0)], 1, 9, pad=0, seed=1)
    (row,) = batch.segments.tolist()
    lengths = [row.count(0), row.count(1)]

    assert batch.positions[0].tolist()[: sum(lengths)] == [*range(lengths[0]), *range(lengths[1])]
    assert not batch.mask[0, lengths[0] :, : lengths[0]].any()
    assert batch.labels[0, 0] == batch.labels[0, lengths[0]] == IGNORED


def test_changing_one_sample_moves_no_others_logits():
    """The leak test: bit for bit, for a masked weight is exactly 0."""
    model = Decoder(tiny_config()).eval()
    before, after = samples(), samples()
    after[0] = Sample([t % 49 + 1 for t in before[0].tokens], before[0].labels, before[0].name)
    (one,), (other,) = (make_packed_batches(them, 1, 99, pad=0, seed=0) for them in (before, after))
    (changed,) = (one.tokens != other.tokens).any(dim=1).nonzero().T
    moved = (one.tokens != other.tokens)[0].nonzero()[:, 0]
    segment = one.segments[0, moved[0]]
    with torch.no_grad():
        a, b = hidden(model, one), hidden(model, other)

    elsewhere = one.segments != segment
    assert len(changed) == 1
    assert torch.equal(a[elsewhere], b[elsewhere])
    assert not torch.equal(a[~elsewhere], b[~elsewhere])


def test_loss_and_gradients_are_those_of_the_samples_side_by_side():
    model = Decoder(tiny_config()).double()
    (packed,) = make_packed_batches(samples(), 2, 17, pad=0, seed=3)
    losses, gradients = [], []
    for batch, way in ((collate(samples(), pad=0), whole_batch), (packed, whole_batch), (packed, in_parts(2))):
        losses.append(way(model, batch))
        gradients.append([p.grad for p in model.parameters()])
        model.zero_grad()

    assert packed.tokens.shape[0] == 2
    assert losses[1:] == pytest.approx([losses[0]] * 2, abs=1e-12)  # float64, sums in another order
    for apart, *together in zip(*gradients, strict=True):
        for gradient in together:
            torch.testing.assert_close(gradient, apart, rtol=0, atol=1e-12)


def test_every_sample_is_seen_once_in_an_order_of_its_seed():
    batches = [make_packed_batches(samples(), 1, 12, pad=0, seed=seed) for seed in (0, 0, 1)]
    orders = [[batch.tokens.tolist() for batch in each] for each in batches]

    assert orders[0] == orders[1] != orders[2]
    assert sum(batch.n_labels for batch in batches[0]) == collate(samples(), pad=0).n_labels


def test_padding_is_nobodys(tmp_path):
    (batch,) = make_packed_batches(samples(), 2, 17, pad=3, seed=0)

    assert (batch.labels[batch.segments < 0] == IGNORED).all() and (batch.tokens[batch.segments < 0] == 3).all()
    assert torch.isfinite(loss_of(Decoder(tiny_config()), batch))


def test_a_text_that_is_learnt_from_its_first_token_learns_nothing_of_the_text_before_it():
    texts = [Sample([n, n + 1, n + 2], [n, n + 1, n + 2]) for n in (1, 11)]
    (batch,) = make_packed_batches(texts, 1, 6, pad=0, seed=0)

    assert batch.n_labels == 4 == collate(texts, pad=0).n_labels


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(ValueError, match=r"4\+5 has 10 tokens, and a row has 9: drop it, or pack wider"):
        packed_rows(samples(), 9)
    with pytest.raises(ValueError, match="cannot pack rows=0 of max_tokens=9"):
        make_packed_batches(samples(), 0, 9, pad=0, seed=0)


def test_a_row_is_filled_as_well_as_can_be():
    sizes = [6, 5, 4, 5, 3, 2]
    texts = [Sample([1] * size, [1] * size) for size in sizes]
    rows = packed_rows(texts, 10)
    assert [[len(sample.tokens) for sample in row] for row in rows] == [[6, 4], [5, 5], [3, 2]]


def test_the_masks_of_a_training_are_not_kept():
    batch = make_packed_batches(samples(), 2, 64, 0, seed=0)[0]
    mask = weakref.ref(batch.mask)
    assert mask() is None
