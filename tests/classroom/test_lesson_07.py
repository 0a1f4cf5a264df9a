"""What lesson 07 says: its pictures' numbers, its exercises' references beside the package, its small trainings."""

from contextlib import suppress
from itertools import pairwise

import numpy as np
import pytest
import torch

from minilora.classroom.exercises import examine
from minilora.classroom.lessons import lesson_module
from minilora.classroom.pictures.json_training import Piece, lines_of, pieces
from minilora.llm import Decoder, ModelConfig
from minilora.train.data import IGNORED, Batch
from minilora.train.loss import loss_of

lesson = lesson_module("07")


def test_the_pieces_of_a_row_say_what_each_token_is_and_whether_it_carries_loss():
    row = pieces(["q", "e", "a", "b", "e", "e"], [-100, -100, 5, 6, 2, -100], n_prompt=2, n_answer=2)

    assert [piece.kind for piece in row] == ["prompt", "prompt", "answer", "answer", "end", "padding"]
    assert [piece.carries for piece in row] == [False, False, True, True, True, False]


@pytest.mark.parametrize(("labels", "n_answer"), [([-100], 0), ([-100, 3], 2)])
def test_a_row_that_is_no_sample_is_refused(labels, n_answer):
    with pytest.raises(ValueError, match="one label for each token of a whole row"):
        pieces(["a", "b"], labels, n_prompt=1, n_answer=n_answer)


def test_lines_hold_every_piece_once_and_none_is_too_long():
    rng = np.random.default_rng(0)
    row = [Piece("x" * int(n), "prompt", False) for n in rng.integers(1, 9, size=50)]
    lines = lines_of(row, columns=20)

    assert [piece for line in lines for _, piece in line] == row
    assert all(line[-1][0] + len(line[-1][1].text) <= 20 for line in lines)
    assert all(b == a + len(piece.text) + 1 for line in lines for (a, piece), (b, _) in pairwise(line))


def test_the_loss_of_the_exercise_is_the_trainers():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "n_layers": 1, "n_heads": 2, "n_kv_heads": 2}
    model = Decoder(ModelConfig(vocab_size=lesson.N_WORDS, **sizes)).double()
    tokens, labels = lesson.build_labels(**lesson.label_inputs(np.random.default_rng(0)))

    ours = lesson.answer_loss(model(tokens), labels)

    torch.testing.assert_close(ours, loss_of(model, Batch(tokens, labels)), rtol=1e-12, atol=0)


def test_the_labels_of_the_exercise_are_at_the_answer_and_its_end():
    case = lesson.label_inputs(np.random.default_rng(3))
    tokens, labels = lesson.build_labels(**case)

    for row, (prompt, answer) in enumerate(zip(case["prompts"], case["answers"], strict=True)):
        begin, end = len(prompt), len(prompt) + len(answer) + 1
        assert tokens[row, :end].tolist() == [*prompt, *answer, case["eos"]]
        assert (labels[row] != IGNORED).nonzero().flatten().tolist() == list(range(begin, end))


def test_numpy_answers_pass_as_well():
    def with_numpy(prompts, answers, eos, pad):
        width = max(len(p) + len(a) + 1 for p, a in zip(prompts, answers, strict=True))
        tokens, labels = np.full((len(prompts), width), pad), np.full((len(prompts), width), -100)
        for i, (p, a) in enumerate(zip(prompts, answers, strict=True)):
            tokens[i, : len(p) + len(a)] = p + a
            tokens[i, len(p) + len(a)] = eos
            labels[i, len(p) : len(p) + len(a) + 1] = tokens[i, len(p) : len(p) + len(a) + 1]
        return tokens, labels

    assert examine(lesson.LABELS, with_numpy).passed


def test_two_mistakes_at_once_are_not_named_as_one():
    def end_masked_and_prompt_too(prompts, answers, eos, pad):
        tokens, labels = lesson.LABELS.bug("the prompt carries loss")(prompts, answers, eos, pad)
        return tokens, labels.masked_fill(tokens == pad, IGNORED)

    failure = examine(lesson.LABELS, end_masked_and_prompt_too).failure

    assert failure is not None and failure.bug is None


def test_an_answer_that_is_run_is_found_out():
    def with_eval(answers, references):
        for answer in answers:
            with suppress(Exception):
                eval(answer)
        return lesson.json_score(answers, references)

    failure = examine(lesson.SCORE, with_eval).failure

    assert failure is not None and "was run as Python" in failure.returned


def test_the_small_trainings_show_what_the_lesson_says():
    healthy = lesson.toy_course(None)
    _, spelled = lesson.dictionary()

    assert healthy.exact == 1 and healthy.mean_tokens == np.mean([len(letters) for letters in spelled])
    assert lesson.toy_course("the end is masked").mean_tokens == lesson.MOST
    assert lesson.toy_course("shifted twice").exact == 0
    assert lesson.toy_course("padding carries loss").exact == 1


def test_a_recipe_over_the_budget_is_refused_before_training():
    with pytest.raises(ValueError, match="the budget is 36"):
        lesson.run_recipe(targets="all-linear", r=8, alpha=16, lr=1e-3, shape="linear", steps=37)
    with pytest.raises(ValueError, match="choose a smaller r"):
        lesson.run_recipe(targets="all-linear", r=9, alpha=16, lr=1e-3, shape="linear", steps=2)
