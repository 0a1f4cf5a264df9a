"""Tokens from logits, against the slow way: the whole text read again for every token, without cache, alone."""

import pytest
import torch
from tiny_decoder import tiny_config
from torch import nn

from minilora.llm import Decoder, generate, stream
from minilora.llm.generation import choose


def slowly(model: Decoder, prompt: list[int], n_tokens: int) -> list[int]:
    """Greedy continuation by definition."""
    text = list(prompt)
    with torch.no_grad():
        for _ in range(n_tokens):
            text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
    return text[len(prompt) :]


def random_prompts(lengths: list[int]) -> list[list[int]]:
    return [torch.randint(0, 50, (length,)).tolist() for length in lengths]


def test_greedy_tokens_are_those_of_reading_everything_again(tiny):
    (prompt,) = random_prompts([5])

    assert generate(tiny, [prompt], max_new_tokens=12) == [slowly(tiny, prompt, 12)]


def test_a_row_gives_in_a_batch_what_it_gives_alone(tiny):
    prompts = random_prompts([1, 7, 3, 12, 7])

    assert generate(tiny, prompts, max_new_tokens=10) == [slowly(tiny, prompt, 10) for prompt in prompts]


def test_the_base_model_gives_in_a_batch_what_it_gives_alone(smollm2_135m):
    model, tokenizer = smollm2_135m
    questions = ["Name a color.", "What is the capital of France? Answer in one word.", "Hi"]
    prompts = [tokenizer.encode_chat([{"role": "user", "content": question}]) for question in questions]

    together = generate(model, prompts, max_new_tokens=12, stop_tokens=tokenizer.stop_tokens)

    assert together == [
        generate(model, [prompt], max_new_tokens=12, stop_tokens=tokenizer.stop_tokens)[0] for prompt in prompts
    ]
    assert "Paris" in tokenizer.decode(together[1])


def test_a_row_ends_before_its_first_stop_token_and_the_others_go_on(tiny):
    prompts = random_prompts([4, 6, 5, 3])
    endless = generate(tiny, prompts, max_new_tokens=15)
    stop = endless[1][4]

    answers = generate(tiny, prompts, max_new_tokens=15, stop_tokens=[stop])

    assert answers == [row[: row.index(stop)] if stop in row else row for row in endless]
    assert len(answers[1]) <= 4


def test_rows_that_stopped_leave_the_batch_and_change_nothing_for_the_others(tiny, monkeypatch):
    prompts = random_prompts([4, 6, 5, 3])
    endless = generate(tiny, prompts, max_new_tokens=15)
    stops = {token for row in endless[:3] for token in row} - set(endless[3])
    batches = []
    monkeypatch.setattr(tiny.lm_head, "forward", lambda x, run=tiny.lm_head.forward: batches.append(len(x)) or run(x))

    answers = generate(tiny, prompts, max_new_tokens=15, stop_tokens=stops)

    assert answers[3] == endless[3]
    assert batches[0] == 4
    assert batches[-1] == 1


def test_it_ends_when_all_rows_have_stopped(tiny, monkeypatch):
    calls = []
    monkeypatch.setattr(tiny.lm_head, "forward", lambda x, run=tiny.lm_head.forward: calls.append(len(x)) or run(x))

    assert generate(tiny, random_prompts([4, 6]), max_new_tokens=15, stop_tokens=range(50)) == [[], []]
    assert len(calls) == 1


def test_the_head_is_computed_for_the_last_position_alone(tiny, monkeypatch):
    shapes = []
    monkeypatch.setattr(tiny.lm_head, "forward", lambda x, run=tiny.lm_head.forward: shapes.append(x.shape) or run(x))

    generate(tiny, random_prompts([4, 6]), max_new_tokens=3)

    assert set(shapes) == {(2, 24)}


def test_every_prompt_token_is_read_once(tiny, monkeypatch):
    read = []
    embed = tiny.model.embed_tokens
    monkeypatch.setattr(embed, "forward", lambda x, run=embed.forward: read.append(x.shape[1]) or run(x))

    generate(tiny, random_prompts([6]), max_new_tokens=4)

    assert read == [6, 1, 1, 1]


def test_positions_are_counted_from_the_first_real_token(tiny, monkeypatch):
    """Only distances matter, but other positions round differently: its last bits would not be those it has alone."""
    seen = []
    read = tiny.model.forward
    monkeypatch.setattr(tiny.model, "forward", lambda x, **more: seen.append(more["positions"]) or read(x, **more))

    generate(tiny, random_prompts([2, 4]), max_new_tokens=3)

    assert [positions.tolist() for positions in seen] == [[[0, 0, 0, 1], [0, 1, 2, 3]], [[2], [4]], [[3], [5]]]


def test_nothing_is_asked_and_nothing_is_answered(tiny):
    assert generate(tiny, [], max_new_tokens=5) == []
    assert generate(tiny, [[1, 2]], max_new_tokens=0) == [[]]


def test_a_stream_gives_the_same_tokens_one_by_one(tiny):
    (prompt,) = random_prompts([5])
    tokens = stream(tiny, prompt, max_new_tokens=8)

    first = next(tokens)

    assert [first, *tokens] == generate(tiny, [prompt], max_new_tokens=8)[0]


def test_drawn_tokens_repeat_with_the_seed_and_differ_without_it(tiny):
    def draw(seed: int) -> list[list[int]]:
        dice = torch.Generator().manual_seed(seed)
        return generate(tiny, [[1, 2, 3]], max_new_tokens=20, temperature=1.0, generator=dice)

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)


def test_tokens_are_drawn_as_often_as_their_probability_says():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(100_000, -1)

    drawn = choose(logits, temperature=2.0, top_p=1.0, generator=torch.Generator().manual_seed(0))

    expected = (logits[0] / 2.0).softmax(dim=0)
    share = torch.bincount(drawn, minlength=4) / 100_000
    five_sigma = 5 * (expected * (1 - expected) / 100_000).sqrt()
    assert ((share - expected).abs() < five_sigma).all()


def test_top_p_draws_from_the_fewest_tokens_that_reach_it():
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.9, 0.05, 0.03, 0.02]]).log()

    drawn = choose(
        logits.repeat(1000, 1), temperature=1.0, top_p=0.65, generator=torch.Generator().manual_seed(0)
    ).reshape(1000, 2)

    assert set(drawn[:, 0].tolist()) == {1, 3}
    assert set(drawn[:, 1].tolist()) == {0}


def test_dropout_is_off_meanwhile_and_on_again_after():
    model = Decoder(tiny_config())
    model.model.layers[0].mlp.down_proj = nn.Sequential(model.model.layers[0].mlp.down_proj, nn.Dropout(0.5))
    model.train()

    first = generate(model, [[1, 2, 3]], max_new_tokens=10)

    assert first == generate(model, [[1, 2, 3]], max_new_tokens=10)
    assert model.training
    assert model.model.layers[0].mlp.down_proj[1].training


def test_a_stream_left_half_way_puts_the_model_back(tiny):
    tiny.train()
    tokens = stream(tiny, [1, 2, 3], max_new_tokens=10)
    next(tokens)
    assert not tiny.training

    tokens.close()

    assert tiny.training


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"prompts": [[1], []]}, "prompt 1 is empty: begin it with at least one token"),
        ({"prompts": [[1, 50]]}, r"prompt 0 has a token outside 0\.\.49: it is of another vocabulary"),
        ({"prompts": [[-1]]}, r"prompt 0 has a token outside 0\.\.49"),
        ({"temperature": -1.0}, r"temperature is -1\.0: use 0 for the most probable token"),
        ({"top_p": 0.0}, r"top_p is 0\.0: use a share of the probability"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1: use 0 or more"),
        ({"max_new_tokens": 2048}, "prompt 0 has 1 tokens, with 2048 new ones more than the model's 2048"),
    ],
)
def test_what_cannot_be_generated_is_refused(tiny, arguments, reason):
    with pytest.raises(ValueError, match=f"cannot generate: {reason}"):
        generate(tiny, **({"prompts": [[1]], "max_new_tokens": 5} | arguments))


def test_every_module_gets_its_own_mode_back():
    model = Decoder(tiny_config()).train()
    model.model.layers[0].eval()
    generate(model, [[1, 2]], max_new_tokens=1)

    assert model.training
    assert model.model.layers[1].training
    assert not model.model.layers[0].training


@pytest.mark.parametrize("temperature", [float("nan"), float("inf"), -1.0])
def test_a_temperature_that_is_no_number_to_divide_by_is_refused(temperature):
    with pytest.raises(ValueError, match="temperature is"):
        generate(Decoder(tiny_config()), [[1, 2]], max_new_tokens=1, temperature=temperature)
