"""A run that cannot fit is refused before anything is loaded, with the options that would make it fit."""

from dataclasses import replace

import pytest

from minilora.llm.architectures import ARCHITECTURES
from minilora.llm.setup import METHODS, Setup
from minilora.llm.training_memory import training_bytes
from minilora.train.fits import GIB, bytes_needed, check_fits, smaller

LLAMA = ARCHITECTURES["llama-2-7b"]
SETUP = Setup(method="lora", r=16, batch=8, seq=1024)


def test_what_is_needed_is_the_count_and_a_tenth():
    assert bytes_needed(LLAMA, SETUP) == int(1.1 * training_bytes(LLAMA, SETUP).total)


def test_a_model_that_turns_into_4_bits_was_loaded_first():
    """Llama-2-7B: 13.48 GB in bfloat16, and beside it what QLoRA keeps, 3.87 GB; the step itself takes less."""
    setup = Setup(method="qlora", r=16, batch=1, seq=64)

    assert bytes_needed(LLAMA, setup) == 2 * 6_738_415_616 + training_bytes(LLAMA, setup).weights
    assert bytes_needed(LLAMA, setup) > 1.1 * training_bytes(LLAMA, setup).total


def test_a_run_that_fits_to_the_byte_is_not_refused():
    check_fits(LLAMA, SETUP, bytes_needed(LLAMA, SETUP))

    with pytest.raises(MemoryError):
        check_fits(LLAMA, SETUP, bytes_needed(LLAMA, SETUP) - 1)


def test_every_way_that_is_told_fits_and_the_fewest_changes_come_first():
    free = 22 * GIB
    with pytest.raises(MemoryError) as refused:
        check_fits(LLAMA, SETUP, free)
    head, *ways = str(refused.value).splitlines()

    assert head == f"this run needs {bytes_needed(LLAMA, SETUP) / GIB:.2f} GiB and 22.00 are free; what would fit:"
    ways_by_options = {" ".join(options): other for options, other in smaller(SETUP)}
    told = [way.rsplit(maxsplit=2)[0].strip() for way in ways]
    assert told
    assert all(bytes_needed(LLAMA, ways_by_options[options]) <= free for options in told)
    assert [text.count("--") for text in told] == sorted(text.count("--") for text in told)
    fewest = min(len(options) for options, other in smaller(SETUP) if bytes_needed(LLAMA, other) <= free)
    assert told[0].count("--") == fewest


@pytest.mark.parametrize("method", ["full", "galore", "adalora", "pissa"])
def test_4_bits_are_proposed_with_what_they_have_where_nothing_is_said(method):
    """Nothing was said of r and dtype: so --method qlora has r 16 and bf16, whatever the method's own are."""
    asked = Setup(method=method, batch=1, seq=1024)
    (other,) = (other for options, other in smaller(asked) if options == ["--method qlora"])
    assert bytes_needed(LLAMA, other) == bytes_needed(LLAMA, Setup(method="qlora", r=16, dtype="bf16", seq=1024))
    (other,) = (
        other for options, other in smaller(replace(asked, r=64, dtype="fp32")) if options == ["--method qlora"]
    )
    assert bytes_needed(LLAMA, other) == bytes_needed(LLAMA, Setup(method="qlora", r=64, dtype="fp32", seq=1024))


def test_where_nothing_would_fit_it_says_the_least():
    least = min(bytes_needed(LLAMA, other) for _, other in smaller(SETUP))

    with pytest.raises(MemoryError, match=rf"it is {least / GIB:.2f}: choose .* longest, line 7, has 1,024 tokens"):
        check_fits(LLAMA, SETUP, GIB, "line 7")


def test_smaller_setups_keep_what_is_saved_already():
    saving = replace(SETUP, method="qlora", checkpointing=True, batch=1, optimizer="adamw-8bit")

    assert list(smaller(saving)) == []
    with pytest.raises(MemoryError, match="with every option that saves memory it is"):
        check_fits(LLAMA, saving, GIB)
    assert all(other != SETUP for _, other in smaller(SETUP))
    assert {other.batch for _, other in smaller(SETUP)} == {8, 4, 2, 1}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_told_ways_that_it_has(method):
    """A way that Setup refuses would raise here. Of 4 bits there is none for what stands over whole layers."""
    ways = [options for options, _ in smaller(replace(SETUP, method=method))]

    told = {option.split()[0] for options in ways for option in options}
    assert ("--checkpointing" in told) == (method != "prefix")
    alone = any(options == ["--optimizer adamw-8bit"] for options in ways)
    assert alone == (method != "galore")
    assert ("--method" in told) == (method in ("full", "galore", "lora", "dora", "adalora", "pissa", "olora"))
