"""What `minilora size` prints."""

import argparse
import json
import re

import pytest

from minilora.llm.architectures import ARCHITECTURES
from minilora.llm.memory_report import COLUMNS, _card
from minilora.llm.setup import METHODS, Setup, trained_params
from minilora.llm.size_command import add_size_arguments, run
from minilora.llm.size_report import COMPARED, list_report, size_numbers, size_report
from minilora.llm.training_memory import MARGIN, TrainingBytes, training_bytes

LLAMA_2_7B = ARCHITECTURES["llama-2-7b"]


def printed(capsys: pytest.CaptureFixture[str], words: str) -> str:
    parser = argparse.ArgumentParser()
    add_size_arguments(parser)
    assert run(parser.parse_args(words.split())) == 0
    return capsys.readouterr().out


def test_llama_2_7b_with_adapters_on_all_linear_layers(capsys):
    text = printed(capsys, "llama-2-7b --targets all-linear -r 16")
    assert re.search(r"trainable +39,976,960 +0\.5898 %", text)
    assert re.search(r"in all +6,778,392,576\n", text)
    assert re.search(r"fp32 +159,907,840 bytes \(159\.9 MB\)", text)
    assert re.search(r"bf16 +79,953,920 bytes \(80\.0 MB\)", text)
    assert re.search(r"weights +26\.954 +13\.477 +3\.866\n", text)


def test_without_a_method_all_three_stand_side_by_side(capsys):
    assert re.search(r"\n +full +lora +qlora\n", printed(capsys, "gpt2"))


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("methods", [METHODS, COMPARED, *[(method,) for method in METHODS]], ids="-".join)
def test_the_report_fits_a_terminal_of_100_columns(name, methods):
    """Of the widest numbers that are usual: 900 tokens and 100 virtual ones fit GPT-2's positions."""
    setups = [Setup(method=m, r=64, batch=16, seq=900, n_virtual=100) for m in methods]
    report = size_report(name, ARCHITECTURES[name], setups)
    assert max(len(line) for line in report.splitlines()) <= 100


def test_every_method_has_a_column():
    report = size_report("gpt2", ARCHITECTURES["gpt2"], [Setup(method=method) for method in METHODS])
    heads = [line.split() for line in report.splitlines() if line.startswith(" " * 28)]
    assert [name for head in heads for name in head] == list(METHODS)
    assert max(map(len, heads)) == COLUMNS


@pytest.mark.parametrize("method", METHODS)
def test_the_printed_parts_add_up(method):
    """Each part is rounded to 0.001 GB, so seven parts can be off by 0.0035 and the sum by 0.0005."""
    report = size_report("llama-2-7b", LLAMA_2_7B, [Setup(method=method)])
    memory = report.partition("Memory of training in GB")[2]
    parts = [float(figure) for figure in re.findall(r"^  \w.{25} *([\d.]+)   ", memory, flags=re.MULTILINE)]
    assert len(parts) > 4
    assert sum(parts[:-1]) == pytest.approx(parts[-1], abs=0.004)


@pytest.mark.parametrize("method", sorted({*METHODS} - {"full", "galore"}))
def test_the_parts_of_an_adapter_add_up_to_what_is_trained(method):
    """Exactly: a line for each kind of part, ending in the numbers of all parts of the kind."""
    for name in ("llama-3-8b", "gpt2"):
        report = size_report(name, ARCHITECTURES[name], [Setup(method=method)])
        parts = re.findall(r"^  \S.* × \d+ +([\d,]+)$", report, flags=re.MULTILINE)
        total = trained_params(ARCHITECTURES[name], Setup(method=method))
        assert sum(int(part.replace(",", "")) for part in parts) == total
        assert re.search(rf"trainable +{total:,} ", report)


def test_several_methods_are_counted_side_by_side(capsys):
    text = printed(capsys, "llama-2-7b --method lora,ia3,prefix -r 8 --targets q_proj,v_proj")
    assert re.search(r"lora +4,194,304 +0\.0622 %", text)
    assert re.search(r"ia3 +614,400 +0\.0091 %", text)
    assert re.search(r"prefix +5,242,880 +0\.0777 %", text)
    assert re.search(r"\n +lora +ia3 +prefix\n", text)


def test_each_method_has_its_own_defaults(capsys):
    numbers = json.loads(printed(capsys, "llama-2-7b --method adalora,galore,full --json"))
    told = {m: (s["r"], s["start_r"], s["dtype"]) for m, s in numbers["setups"].items()}
    assert told["adalora"] == (16, 24, "bf16")  # it begins with half as much again
    assert (told["galore"][0], told["galore"][2], told["full"][2]) == (128, "fp32", "fp32")
    assert numbers["trainable"]["adalora"] == 24 * 39_976_960 // 16 + 24 * 224  # and a value for each triplet
    text = printed(capsys, "llama-2-7b --method adalora,galore,full")
    assert "AdaLoRA of rank 24 → 16 beside 224 matrices" in text and "moments of rank 128" in text
    assert re.search(r"dtype of the weights +bf16 +fp32 +fp32\n", text)
    asked = json.loads(printed(capsys, "llama-2-7b --method adalora,galore,full -r 4 --start-r 5 --dtype fp16 --json"))
    assert {(s["r"], s["dtype"]) for s in asked["setups"].values()} == {(4, "fp16")}
    assert asked["trainable"]["adalora"] == 5 * 39_976_960 // 16 + 5 * 224


def test_a_copy_of_the_weights_has_a_row_where_there_is_one(capsys):
    assert "fp32 copy of the weights" not in printed(capsys, "gpt2")
    assert re.search(r"fp32 copy of the weights +0\.498 +–", printed(capsys, "gpt2 --dtype bf16"))


def test_several_methods_in_json_have_a_count_each(capsys):
    numbers = json.loads(printed(capsys, "llama-2-7b --method dora,ia3 --json"))
    assert numbers["trainable"] == {
        method: trained_params(LLAMA_2_7B, Setup(method=method)) for method in ("dora", "ia3")
    }
    assert list(numbers["training_bytes"]) == ["dora", "ia3"]


def test_a_file_of_dora_holds_the_magnitudes(capsys):
    """PEFT's method_comparison counts 9,289,728 numbers for Llama-3.2-3B, r 32 on q and v."""
    text = printed(capsys, "llama-3.2-3b --method dora -r 32 --targets q_proj,v_proj")
    assert f"{4 * 9_289_728:,} bytes" in text


@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_a_file_that_begins_elsewhere_is_a_lora_of_twice_the_rank(method, capsys):
    numbers = json.loads(printed(capsys, f"llama-2-7b --method {method} -r 16 --json"))
    assert numbers["trainable"] == 39_976_960
    assert numbers["adapter_bytes"] == {"fp32": 2 * 159_907_840, "bf16": 2 * 79_953_920}


def test_a_prefix_made_by_a_network_is_written_without_it(capsys):
    """PEFT's prefix_projection=True trains 1,090,867,200 numbers for Llama-2-7B, 20 tokens and 4,096 hidden units."""
    text = printed(capsys, "llama-2-7b --method prefix --virtual-tokens 20 --prefix-mlp 4096")
    assert re.search(r"trainable +1,090,867,200 ", text)
    assert f"{4 * 5_242_880:,} bytes" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--method lora --bottleneck 8", "--bottleneck does nothing for lora: it is an option of houlsby"),
        ("--method ia3,houlsby -r 16", "--r does nothing for ia3, houlsby: it is an option of lora, dora, qlora"),
        (
            "--method full --virtual-tokens 8",
            "--virtual-tokens does nothing for full: it is an option of prefix, prompt",
        ),
        ("--method prompt --targets c_attn", "--targets does nothing for prompt: it is an option of lora"),
        ("--method lora --no-master-weights", "--no-master-weights does nothing for lora: it is an option of full"),
        ("--method full --no-master-weights", "--no-master-weights does nothing in fp32, .*: give --dtype bf16"),
        ("--method lora,dora --start-r 24", "--start-r does nothing for lora, dora: it is an option of adalora"),
        ("--method adalora,galore --start-r 8", "start_r is 8: choose a whole number from r, 16, on"),
        ("--method lora --bottleneck 64", "--bottleneck does nothing for lora"),
        ("--method lora,lisa", "no method is named 'lisa'; there are full, lora, dora"),
    ],
)
def test_an_option_that_nothing_has_a_use_for_is_refused(words, message, capsys):
    with pytest.raises(ValueError, match=message):
        printed(capsys, f"gpt2 {words}")


def test_estimates_are_called_estimates():
    report = size_report("gpt2", ARCHITECTURES["gpt2"], [Setup()])
    assert "activations (estimate)" in report
    assert "logits, loss (estimate)" in report


def test_a_small_model_is_printed_in_mb():
    report = size_report("smollm2-135m", ARCHITECTURES["smollm2-135m"], [Setup(method="qlora", seq=64)])
    assert "Memory of training in MB" in report


def test_two_layers_that_share_a_last_part_have_a_line_each(capsys):
    text = printed(capsys, "gpt2 --targets c_proj")
    assert re.search(r"attn\.c_proj +768 → 768 .*\n +mlp\.c_proj +3,072 → 768 ", text)
    assert "beside 24 matrices" in text


def test_targets_are_a_list_with_commas(capsys):
    assert "8,388,608" in printed(capsys, "llama-2-7b --targets q_proj,v_proj -r 16")
    assert "8,388,608" in printed(capsys, "llama-2-7b --targets=q_proj,v_proj -r 16")


def test_full_fine_tuning_has_no_adapter(capsys):
    text = printed(capsys, "gpt2 --method full")
    assert re.search(r"trainable +124,439,808 +100 %", text)
    assert "Adapter" not in text


def test_json_has_the_numbers_of_the_report(capsys):
    numbers = json.loads(printed(capsys, "llama-2-7b -r 16 --json"))
    assert numbers["trainable"] == 39_976_960
    assert numbers["total"] == 6_778_392_576
    assert round(numbers["trainable_percent"], 4) == 0.5898
    assert numbers["adapter_bytes"] == {"fp32": 159_907_840, "bf16": 79_953_920}
    assert list(numbers["training_bytes"]) == ["full", "lora", "qlora"]
    assert numbers["training_bytes"]["qlora"]["total"] == training_bytes(LLAMA_2_7B, Setup(method="qlora", r=16)).total


def test_every_option_reaches_the_numbers(capsys):
    words = "gpt2 --method full --dtype fp16 --optimizer adamw-8bit --batch 3 --seq 100 --checkpointing --json"
    setup = Setup(
        method="full", dtype="fp16", optimizer="adamw-8bit", batch=3, seq=100, checkpointing=True, master_weights=False
    )
    expected = size_numbers("gpt2", ARCHITECTURES["gpt2"], [setup])
    assert json.loads(printed(capsys, f"{words} --no-master-weights")) == json.loads(json.dumps(expected))


def test_the_list_has_every_name():
    names = [line.split()[0] for line in list_report().splitlines()[1:] if "·" in line]
    assert names == list(ARCHITECTURES)


def test_no_model_is_refused_with_a_way_out(capsys):
    with pytest.raises(ValueError, match=r"which model.*minilora size --list"):
        printed(capsys, "")


def test_a_card_has_room_for_the_margin_and_for_cuda():
    def using(n_bytes: float) -> TrainingBytes:
        return TrainingBytes(
            weights=int(n_bytes), adapter=0, gradients=0, optimizer=0, master=0, activations=0, logits=0
        )

    assert _card(using((24 * 2**30 - 800e6) / MARGIN - 1)) == "24 GiB"
    assert _card(using((24 * 2**30 - 800e6) / MARGIN + 2)) == "32 GiB"
    assert _card(using(1e12)) == "> 141 GiB"
