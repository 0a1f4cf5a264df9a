"""What is counted as right, as JSON, and as perplexing."""

import pytest
import torch
from torch import nn

from minilora.llm import smollm2
from minilora.llm.config import ModelConfig
from minilora.llm.model import Decoder
from minilora.llm.tokenizer import load_tokenizer
from minilora.train.evaluate import (
    english_text,
    exact_match,
    explain_miss,
    generate_answers,
    parse_object,
    perplexity,
    valid_json,
)
from minilora.train.extraction import Example


class Uniform(nn.Module):
    """A model that hesitates between all of 16 tokens."""

    def forward(self, tokens):
        return torch.zeros(*tokens.shape, 16, dtype=torch.bfloat16)


class Bigram(nn.Module):
    """A model that knows one fixed distribution after each token."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(16, 16))

    def forward(self, tokens):
        return self.table[tokens]


def test_who_knows_nothing_hesitates_between_all_tokens():
    assert perplexity(Uniform(), list(range(16)) * 4, seq_len=8) == pytest.approx(16, rel=1e-6)


def test_perplexity_is_the_geometric_mean_over_predicted_tokens():
    model, tokens = Bigram(), torch.randint(0, 16, (40,)).tolist()
    p = model.table.softmax(dim=1)
    predicted = [
        p[a, b] for start in (0, 20) for a, b in zip(tokens[start:], tokens[start + 1 : start + 20], strict=False)
    ]

    expected = 1 / torch.stack(predicted).double().log().mean().exp().item()
    assert len(predicted) == 38
    assert perplexity(model, tokens, seq_len=20) == pytest.approx(expected, rel=1e-6)


def test_a_rest_that_fills_no_window_is_left_out():
    tokens = torch.randint(0, 16, (47,)).tolist()
    model = Bigram()

    assert perplexity(model, tokens, seq_len=20) == perplexity(model, tokens[:40], seq_len=20)


@pytest.mark.parametrize(("n_tokens", "seq_len"), [(7, 8), (8, 1), (8, 0), (0, 8)])
def test_too_little_text_is_refused(n_tokens, seq_len):
    with pytest.raises(ValueError, match=rf"cannot cut {n_tokens} tokens into windows of seq_len={seq_len}"):
        perplexity(Uniform(), [1] * n_tokens, seq_len=seq_len)


def test_there_is_english_enough():
    assert len(english_text()) > 100_000
    assert "the" in english_text().split()


@pytest.mark.parametrize(
    ("answer", "is_json"),
    [
        ('{"a": 1}', True),
        (' {"a": {"b": []}}\n', True),
        ('{"a": 1} ', True),
        ('{"a": 1', False),
        ('{"a": 1} and more', False),
        ("[1]", False),
        ("null", False),
        ("", False),
        ("[" * 100_000, False),
    ],
)
def test_json_is_one_object_and_nothing_else(answer, is_json):
    assert (parse_object(answer) is not None) == is_json
    assert valid_json([answer]) == is_json


def test_an_answer_must_be_right_to_the_letter():
    assert exact_match(['{"a": 1}', '{"a":1}', '{"a": 1}\n'], ['{"a": 1}'] * 3) == pytest.approx(2 / 3)


def test_as_many_answers_as_references_are_needed():
    with pytest.raises(ValueError, match="cannot compare 1 answers with 2 references"):
        exact_match(["a"], ["a", "b"])
    with pytest.raises(ValueError, match="cannot compare 0 answers"):
        exact_match([], [])
    with pytest.raises(ValueError, match="0 answers"):
        valid_json([])


ROY = Example("…", name="Ana Roy", city="Oslo", quantity=14, date="2021-03-05", shape="…")


@pytest.mark.parametrize(
    ("right", "wrong", "problems"),
    [
        ("", "", []),
        ("Ana", "Anna", ["miscopied name"]),
        ('"Ana Roy"', "null", ["miscopied name"]),
        ("Oslo", "Olso", ["miscopied city"]),
        ("14", "41", ["wrong number"]),
        ("14", '"14"', ["number in quotes"]),
        ("2021-03-05", "2021-05-03", ["wrong date"]),
        ("2021-03-05", "5 March 2021", ["wrong date format"]),
        ('"2021-03-05"', "20210305", ["wrong date format"]),
        ('"city"', '"town"', ["other keys"]),
        ("}", ', "more": 1}', ["other keys"]),
        ("}", "", ["not JSON"]),
        (",", ", ", ["right facts, written otherwise"]),
    ],
)
def test_a_miss_is_told_by_its_kind(right, wrong, problems):
    assert explain_miss(ROY.answer.replace(right, wrong) if right else ROY.answer, ROY) == problems


def test_a_miss_tells_all_that_is_wrong():
    answer = ROY.answer.replace("Ana", "Ann").replace("Oslo", "O").replace("14", "15").replace("2021", "2022")

    assert explain_miss(answer, ROY) == ["miscopied name", "miscopied city", "wrong number", "wrong date"]


def test_answers_stand_in_the_order_of_their_prompts_and_are_those_given_alone():
    tokenizer = load_tokenizer(smollm2.fetch())
    config = ModelConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, n_layers=2, n_heads=2, n_kv_heads=1
    )
    model = Decoder(config).double()  # so that no rounding decides which token is the most probable
    prompts = [torch.randint(100, 5000, (length,)).tolist() for length in (9, 2, 5, 13, 3)]

    together = generate_answers(model, tokenizer, prompts, max_new_tokens=6, batch_size=2)
    alone = [generate_answers(model, tokenizer, [prompt], max_new_tokens=6)[0] for prompt in prompts]

    assert together == alone
    assert len(set(alone)) == 5
