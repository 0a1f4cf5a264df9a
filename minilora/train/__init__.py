"""Running it for real: data, the loop, evaluation. Model and optimizer come from the caller."""

from minilora.train.data import Batch, Sample, collate, make_batches, mask_prompt
from minilora.train.evaluate import exact_match, generate_answers, perplexity, valid_json
from minilora.train.extraction import Example, Extraction, make_extraction
from minilora.train.listeners import progress_bar
from minilora.train.trainer import Step, Training, train, warmup_then_decay

__all__ = [
    "Batch",
    "Example",
    "Extraction",
    "Sample",
    "Step",
    "Training",
    "collate",
    "exact_match",
    "generate_answers",
    "make_batches",
    "make_extraction",
    "mask_prompt",
    "perplexity",
    "progress_bar",
    "train",
    "valid_json",
    "warmup_then_decay",
]
