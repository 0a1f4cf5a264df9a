"""07 · Teach a real LM to speak JSON

What its notebook leaves out, for it takes transformers: a collator's labels, what a callback sees, arguments that have
gone.
"""

import dataclasses
import logging
import tempfile
import warnings
from typing import Any

from minilora.classroom.claims import FAMILY, MATHEMATICS, REVOLUTION, Claim, Finding, Unsettled
from minilora.classroom.comparison import best_rate

WORDS = ["<s>", "</s>", "extract", "as", "json", "response", "{", "}", "name", ":", "ada"]


def collator_labels() -> Finding:
    """Its text, tokenizer settings and collator, on a tokenizer that adds no end token: as Llama's adds none."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    raw = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<s>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    tokenizer.pad_token = tokenizer.eos_token
    collate = transformers.DataCollatorForLanguageModeling(tokenizer=tokenizer, mlm=False)

    def labels(text: str) -> list[int]:
        encoded = tokenizer(text, truncation=True, max_length=16, padding="max_length")
        return collate([dict(encoded)])["labels"][0].tolist()

    text = "extract as json : ada response : { name : ada }"
    stops = [tokenizer.eos_token_id in labels(each) for each in (text, f"{text} </s>")]
    return Finding(
        cases={"the answer's are meant": WORDS.index("}") in labels(text), "its end's are meant": any(stops)},
        found="its texts end without the end token; and where one is appended by hand, its label is −100 like the "
        f"padding's (transformers {transformers.__version__})",
    )


def trained_with(callback: Any) -> None:
    """Two steps of transformers' Trainer on a Llama of 16 features, with a callback."""
    import torch
    import transformers

    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=16, num_key_value_heads=2, **sizes))
    rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)} for _ in range(2)]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
        arguments = transformers.TrainingArguments(folder, max_steps=2, per_device_train_batch_size=1, **options)
        trainer = transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[callback])
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()


def sum_of_squares(model: Any) -> float:
    """The sum that the article's callback takes the root of."""
    return sum(float(p.grad.norm(2)) ** 2 for p in model.parameters() if p.grad is not None)


def logged_gradient() -> Finding:
    """The sum of the article's loop, at two moments of a step."""
    import transformers

    seen: dict[str, list[float]] = {"on_step_end": [], "on_pre_optimizer_step": []}

    class GradNormCallback(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen["on_step_end"].append(sum_of_squares(model) ** 0.5)

        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            seen["on_pre_optimizer_step"].append(sum_of_squares(model) ** 0.5)

    trained_with(GradNormCallback())
    assert len(seen["on_step_end"]) == 2 and min(seen["on_pre_optimizer_step"]) > 0
    return Finding(
        cases=min(seen["on_step_end"]) > 0,
        found="it logs 0 at every step: the gradients are cleared before on_step_end; on_pre_optimizer_step sees them "
        f"(transformers {transformers.__version__})",
    )


def bare_callback() -> Finding:
    """A class with on_step_end and nothing else."""
    import transformers

    class GradNormCallback:
        def on_step_end(self, args, state, control, model=None, **kwargs): ...

    try:
        trained_with(GradNormCallback())
        error = ""
    except AttributeError as caught:
        error = str(caught)
    return Finding(
        cases=not error,
        found=f"the Trainer of transformers {transformers.__version__} raises AttributeError ({error}): "
        "it calls every event, so a TrainerCallback must be its base",
    )


def trainer_arguments() -> Finding:
    """The fields of TrainingArguments as installed."""
    import transformers

    fields = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    gone = [name for name in ("evaluation_strategy", "group_by_length", "warmup_ratio") if name not in fields]
    there = [name for name in ("eval_strategy", "train_sampling_strategy", "warmup_steps") if name in fields]
    return Finding(
        cases=not gone,
        found=f"transformers {transformers.__version__} has no {', '.join(gone)}; it has {', '.join(there)}",
    )


# TRL is not among this repository's packages. Names in its trainer/sft_trainer.py (parameters of SFTTrainer) and
# trainer/sft_config.py (fields of SFTConfig's own, at 016013e), as read in 2026.
SFT_TRAINER = """
    model args data_collator train_dataset eval_dataset processing_class compute_loss_func compute_metrics callbacks
    optimizers optimizer_cls_and_kwargs preprocess_logits_for_metrics quantization_config peft_config formatting_func
"""
SFT_CONFIG = """
    model_init_kwargs chat_template_path dataset_text_field dataset_kwargs dataset_num_proc eos_token max_length
    truncation_mode shuffle_dataset packing packing_strategy padding_free pad_to_multiple_of eval_packing
    completion_only_loss assistant_only_loss loss_type activation_offloading pad_token
"""


def sft_arguments() -> Finding:
    """Its arguments, looked up in TRL's signature."""
    used = (
        "model",
        "args",
        "train_dataset",
        "eval_dataset",
        "tokenizer",
        "max_seq_length",
        "dataset_text_field",
        "packing",
    )
    gone = [name for name in used if name not in SFT_TRAINER.split()]
    moved = [name for name in gone if name in SFT_CONFIG.split()]
    return Finding(
        cases=not gone,
        found=f"by TRL's trainer/sft_trainer.py (2026) it takes no {', '.join(gone)}: the tokenizer is "
        f"processing_class; {' and '.join(moved)} are SFTConfig's, as is max_length",
    )


def sft_config() -> Finding:
    """The one name of its SFTConfig that is TRL's own and about length."""
    return Finding(
        cases="max_seq_length" in SFT_CONFIG.split(),
        found="by TRL's trainer/sft_config.py at 016013e the field is max_length",
    )


WALKTHROUGH = f"{REVOLUTION}, “Practical Walkthrough”"


def ten_times_the_rate() -> Finding:
    """The rates that benchmarks/methods.py found, each with a worse one on either side."""
    lora, full = best_rate("lora"), best_rate("full")
    return Finding(
        cases={
            "the ratio is meant": 10 / 3 <= lora / full <= 30,
            "those rates are": 1e-4 <= lora <= 3e-4 and 1e-5 <= full <= 3e-5,
        },
        found=f"SmolLM2-135M on orders, rates a factor 3 apart: {lora:g} is best for LoRA (r = 16, alpha = 2 r) and "
        f"{full:g} where all trains, {lora / full:.0f} times (benchmarks/methods.py)",
    )


CLAIMS = [
    Claim(
        id="07.collator-labels",
        fact="With pad_token = eos_token, DataCollatorForLanguageModeling(mlm=False) makes the labels of a text.",
        source=WALKTHROUGH,
        settle=collator_labels,
        verdict="holds when",
    ),
    Claim(
        id="07.logged-gradient",
        fact="A callback that sums p.grad in on_step_end logs the gradient's norm.",
        source=f"{MATHEMATICS}, “Monitoring Training Health”",
        settle=logged_gradient,
        verdict="does not hold",
    ),
    Claim(
        id="07.bare-callback",
        fact="A class of its own with on_step_end is a callback for the Trainer.",
        source=f"{MATHEMATICS}, “Monitoring Training Health”",
        settle=bare_callback,
        verdict="does not hold",
    ),
    Claim(
        id="07.trainer-arguments",
        fact="TrainingArguments takes evaluation_strategy, group_by_length and warmup_ratio.",
        source=f"{FAMILY}, its QLoRA pipeline",
        settle=trainer_arguments,
        verdict="does not hold",
    ),
    Claim(
        id="07.sft-arguments",
        fact="SFTTrainer takes tokenizer, max_seq_length, dataset_text_field and packing.",
        source=f"{FAMILY}, its QLoRA pipeline",
        settle=sft_arguments,
        verdict="does not hold",
    ),
    Claim(
        id="07.sft-config",
        fact="SFTConfig takes max_seq_length.",
        source=f"{MATHEMATICS}, “Training with SFTTrainer”",
        settle=sft_config,
        verdict="does not hold",
    ),
    Claim(
        id="07.ten-times-the-rate",
        fact="LoRA wants about ten times the learning rate of full fine-tuning: 1e-4 to 3e-4 against 1e-5 to 3e-5.",
        source=f"{MATHEMATICS}, “Learning Rate Calibration”",
        settle=ten_times_the_rate,
        verdict="holds when",
    ),
]
UNSETTLED = [
    Unsettled(
        id="07.model-name",
        fact="The hub has a model named meta-llama/Llama-3-8B.",
        source=f"{FAMILY}, its QLoRA pipeline",
        needs="one request to the hub; another of these articles writes meta-llama/Meta-Llama-3-8B",
    ),
]
