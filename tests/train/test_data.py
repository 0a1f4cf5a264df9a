"""Tokens, labels and batches."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minilora.train.data import IGNORED, Sample, collate, make_batches, mask_prompt

tokens = st.lists(st.integers(0, 9), min_size=1, max_size=12)


@given(prompt=tokens, answer=tokens, eos=st.integers(0, 9))
def test_the_loss_is_on_the_answer_and_the_eos_and_nowhere_else(prompt, answer, eos):
    sample = mask_prompt(prompt, answer, eos)

    assert sample.tokens == [*prompt, *answer, eos]
    assert sample.labels == [IGNORED] * len(prompt) + [*answer, eos]


def test_eos_is_learnt_even_where_padding_is_eos():
    eos = 2
    batch = collate([mask_prompt([5], [7], eos), mask_prompt([5], [7, 8, 9], eos)], pad=eos)

    assert batch.tokens.tolist() == [[5, 7, eos, eos, eos], [5, 7, 8, 9, eos]]
    assert batch.labels.tolist() == [[IGNORED, 7, eos, IGNORED, IGNORED], [IGNORED, 7, 8, 9, eos]]


def test_a_sample_that_teaches_nothing_is_refused_by_name():
    with pytest.raises(ValueError, match=r"line 12 of data.jsonl has no label that carries loss: all 3 are masked"):
        Sample([1, 2, 3], [IGNORED] * 3, name="line 12 of data.jsonl")


def test_a_label_at_the_first_position_teaches_nothing():
    with pytest.raises(ValueError, match="no label that carries loss"):
        Sample([1, 2, 3], [1, IGNORED, IGNORED])


def test_an_empty_answer_is_refused_by_name():
    with pytest.raises(ValueError, match=r"line 3 has an empty answer"):
        mask_prompt([1, 2], [], eos=0, name="line 3")


def test_tokens_without_labels_are_refused():
    with pytest.raises(ValueError, match=r"line 3 has 2 tokens and 1 labels"):
        Sample([1, 2], [2], name="line 3")


def samples_of(lengths):
    return [mask_prompt([1], [3] * length, eos=2, name=str(i)) for i, length in enumerate(lengths)]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=70), st.integers(1, 9), st.integers(0, 5))
def test_every_sample_is_in_exactly_one_batch(lengths, batch_size, seed):
    batches = make_batches(samples_of(lengths), batch_size, pad=0, seed=seed, window=3)
    rows = [row[row != 0].tolist() for batch in batches for row in batch.tokens]

    assert sorted(rows) == sorted(sample.tokens for sample in samples_of(lengths))
    assert len(batches) == -(-len(lengths) // batch_size)


def test_batches_hold_neighbours_in_length():
    lengths = torch.randint(5, 60, (512,)).tolist()

    def padded(window):
        batches = make_batches(samples_of(lengths), 8, pad=0, seed=0, window=window)
        return sum((batch.tokens == 0).sum().item() for batch in batches)

    assert padded(window=16) < padded(window=1) / 5  # measured: a tenth


def test_a_seed_decides_the_order():
    samples = samples_of(range(1, 50))

    def order(seed):
        return [batch.tokens.tolist() for batch in make_batches(samples, 4, pad=0, seed=seed)]

    assert order(1) == order(1) != order(2)


def test_an_impossible_batch_size_is_refused():
    with pytest.raises(ValueError, match=r"batch_size=0 and window=16: both are at least 1"):
        make_batches(samples_of([1]), 0, pad=0, seed=0)


def test_an_empty_batch_is_refused():
    with pytest.raises(ValueError, match="batch of 0 samples"):
        collate([], pad=0)


def test_a_negative_label_is_refused():
    with pytest.raises(ValueError, match=r"line 3 has the label -1: a label is a token's number, or -100 for no loss"):
        Sample([1, 2, 3], [-100, -1, 3], "line 3")


def test_a_batch_is_cut_into_parts_that_are_as_wide_as_they_need():
    samples = [mask_prompt([1], [2] * n, eos=0) for n in (1, 1, 4)]
    batch = collate(samples, pad=9)
    parts = batch.parts(2)

    assert [tuple(part.tokens.shape) for part in parts] == [(2, 3), (1, 6)]
    assert [part.n_labels for part in parts] == [4, 5] and batch.n_labels == 9
    assert [part.tokens.tolist() for part in batch.parts(7)] == [[sample.tokens] for sample in samples]


def test_the_first_label_of_a_row_is_not_counted():
    assert collate([Sample([1, 2], [1, 2])], pad=0).n_labels == 1
