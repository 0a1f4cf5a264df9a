"""What lesson 01 says: its sums are the package's, and its figure adds up."""

from dataclasses import replace

import pytest

from minilora.classroom.lessons import lesson_module
from minilora.classroom.pictures.bill import GB, PARTS, bill, bills, largest_trainable, static_bytes
from minilora.llm.architectures import ARCHITECTURES
from minilora.llm.setup import Setup
from minilora.llm.sizes import base_params
from minilora.llm.training_memory import training_bytes

lesson = lesson_module("01")


@pytest.mark.parametrize("model", ["smollm2-135m", "llama-2-7b", "llama-3-70b"])
@pytest.mark.parametrize(("dtype", "width", "master"), [("fp32", 4, 0), ("bf16", 2, 4)])
def test_the_sum_of_the_exercise_is_what_the_package_counts_of_full_training(model, dtype, width, master):
    arch = ARCHITECTURES[model]
    found = training_bytes(arch, Setup(method="full", dtype=dtype))

    ours = static_bytes(base_params(arch), weight=width, gradient=width, moment=4, master=master)

    assert ours == found.weights + found.gradients + found.optimizer + found.master


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_the_parts_of_a_bar_are_all_of_the_training(method):
    setup = Setup(method=method, batch=4, seq=512)
    parts = bill("llama-2-7b", setup)

    assert set(parts) == set(PARTS)
    assert sum(parts.values()) * GB == pytest.approx(training_bytes(ARCHITECTURES["llama-2-7b"], setup).total, abs=1)


def test_the_methods_of_a_figure_differ_in_nothing_else():
    setup = Setup(dtype="fp32", optimizer="sgd", batch=2, seq=256)

    assert bills("gpt2", setup) == {m: bill("gpt2", replace(setup, method=m)) for m in ("full", "lora", "qlora")}


def test_the_largest_model_fits_and_one_parameter_more_does_not():
    for card, width, reserve in ((24, 16, 0.1), (80, 0.516, 0.2), (7.7, 2, 0.0)):
        n = largest_trainable(card, width, reserve)

        assert n * width <= (1 - reserve) * card * GB < (n + 1) * width


def test_the_quoted_figures_are_judged_as_the_lesson_says():
    assert lesson.audit(list(lesson.QUOTED.values())) == [True, False, False, False, True, False]


def test_the_articles_own_words_are_among_the_claims():
    told = {claim.id: claim.settle() for claim in lesson_module("01", "claims").CLAIMS}

    assert told["01.280-gb"].found.startswith("2 + 4 + 4 bytes a parameter are 700 GB")
    assert "1,120 GB" in told["01.560-gb"].found


def test_the_figures_for_70b_that_its_answers_tell():
    arch = ARCHITECTURES["llama-2-70b"]
    n, embeddings = base_params(arch), 2 * arch.vocab * arch.hidden

    assert round((n - embeddings) * 0.516 / GB) == 35  # in 4 bits
    assert round(2 * embeddings / GB) == 1
    assert round(2 * n / GB) == 138
