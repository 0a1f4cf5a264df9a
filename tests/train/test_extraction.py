"""The extraction set: what is held out is held out, and every answer is the one right answer."""

import json
import re
from datetime import date

import pytest

from minilora.train.extraction import (
    CITIES,
    FIRST_NAMES,
    KEYS,
    LAST_NAMES,
    MONTHS,
    SHAPES,
    THINGS,
    make_extraction,
    spellings,
)

SEEDS = [0, 1, 2]


@pytest.mark.parametrize("seed", SEEDS)
def test_no_word_of_a_test_name_occurs_in_any_training_sentence(seed):
    data = make_extraction(seed, n_train=2000, n_test=300)
    words = {word for example in data.train for word in re.findall(r"[^\s.,:?]+", example.sentence)}

    names = {word for example in data.test for word in example.name.split()}

    assert names & words == set()
    assert len(names) > 150  # nor is that so because the test has few


@pytest.mark.parametrize("seed", SEEDS)
def test_no_test_sentence_has_a_shape_of_training(seed):
    data = make_extraction(seed, n_train=2000, n_test=300)

    assert {example.shape for example in data.train} & {example.shape for example in data.test} == set()


def test_every_name_of_the_test_is_a_real_one():
    names = {word for example in make_extraction(0, 0, 300).test for word in example.name.split()}

    assert names <= {*FIRST_NAMES, *LAST_NAMES}


def test_no_sentence_occurs_twice():
    data = make_extraction(0, n_train=3000, n_test=500)
    sentences = [example.sentence for example in data.train + data.test]

    assert len(set(sentences)) == len(sentences) == 3500


def test_a_seed_decides_everything():
    assert make_extraction(3, 50, 50) == make_extraction(3, 50, 50)
    assert make_extraction(3, 50, 50) != make_extraction(4, 50, 50)


def test_neither_set_depends_on_the_size_of_the_other():
    assert make_extraction(3, 50, 10).train == make_extraction(3, 50, 200).train
    assert make_extraction(3, 10, 50).test == make_extraction(3, 200, 50).test


def test_an_answer_is_json_with_the_four_facts():
    for example in make_extraction(0, 200, 200).test:
        facts = json.loads(example.answer)

        assert tuple(facts) == KEYS
        assert (facts["name"], facts["city"], facts["quantity"]) == (example.name, example.city, example.quantity)
        assert date.fromisoformat(facts["date"]).isoformat() == facts["date"]


def test_a_sentence_says_each_fact_once():
    for example in make_extraction(1, 500, 500).train:
        assert example.sentence.count(example.name) == 1
        assert example.sentence.count(example.city) == 1
        assert len(re.findall(rf"\b{example.quantity} ({'|'.join(THINGS)})\b", example.sentence)) == 1


@pytest.mark.parametrize("day", [date(2021, 3, 1), date(2021, 3, 12), date(1999, 12, 22), date(2004, 10, 23)])
def test_every_way_to_write_a_date_names_day_month_and_year(day):
    for text in spellings(day):
        numbers = [int(digits) for digits in re.findall(r"\d+", text)]

        assert day.year in numbers and day.day in numbers
        assert MONTHS[day.month - 1][:3] in text or text == day.isoformat()


def test_ordinals_are_english():
    days = (1, 2, 3, 4, 11, 12, 13, 21, 22, 23, 30, 31)

    assert " ".join(spellings(date(2021, 1, day))[2].split()[0] for day in days) == (
        "1st 2nd 3rd 4th 11th 12th 13th 21st 22nd 23rd 30th 31st"
    )


def test_the_lists_hold_hundreds_of_different_names_and_nothing_else_is_called_so():
    names = FIRST_NAMES + LAST_NAMES
    other = {word for text in CITIES + SHAPES + THINGS + MONTHS for word in re.findall(r"\w+", text)}

    assert len(FIRST_NAMES) > 400 and len(LAST_NAMES) > 400
    assert len(set(names)) == len(names)
    assert set(names) & other == set()


def test_a_negative_count_is_refused():
    with pytest.raises(ValueError, match=r"n_train=-1 and n_test=2 sentences: counts are 0 or more"):
        make_extraction(0, -1, 2)
