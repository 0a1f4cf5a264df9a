"""`minilora merge`: fold an adapter into its base model, and leave a model folder that transformers opens.

Weights are read, merged and written one after the other, so that the merged model is never whole in memory; the base
stays on the disk where its dtype is the file's. What rounding took is printed, and stands in the folder's README.md.

Read before: torch_lora/merging, llm/save, train/adapted.
"""

import argparse
import json
from pathlib import Path
from typing import cast

import torch

from minilora.llm.load import model_folder
from minilora.llm.model import Origin
from minilora.llm.save import refuse_taken, save_model
from minilora.torch_lora.merging import MergeReport, merged_state, warn_if_erased
from minilora.train.adapted import DTYPES, load_mergeable, stored_dtype
from minilora.train.templates import MODEL, trained_template


def run(args: argparse.Namespace) -> int:
    """Merge as the options of cli say: `base`, `adapter`, `out`, `dtype` (of DTYPES), `method` and `template`.

    An adapter that was trained over 4 bits is merged into what these say: the base is rounded to 4 bits first.

    Raises:
        ValueError: if the base or the adapter is impossible, or they do not fit.
        FileExistsError: if there is something at `out` already.
    """
    adapter, out = Path(args.adapter), Path(args.out)
    report = merge_to_folder(args.base, adapter, out, DTYPES[args.dtype], args.method, args.template)
    title, *_, all_layers = str(report).splitlines()
    print(f"{title}\n{all_layers}\nmodel  {args.out}   (Hugging Face's layout; README.md has every layer)")
    return 0


def merge_to_folder(
    base: str, adapter: Path, out: Path, dtype: torch.dtype, method: str | None = None, template: str = MODEL
) -> MergeReport:
    """Write the folder, and report; as merge_model and save_model, whose errors and warning these are.

    `method` and `template` are load_mergeable's. The model ends its answers as the adapter has learnt to.

    Raises:
        ValueError: if the base is a GGUF file, which has no tokenizer files to copy.
    """
    if base.endswith(".gguf"):
        raise ValueError(f"{base} is a GGUF file, already rounded for answering: merge into the model it was made from")
    refuse_taken(out)  # if this cannot be, better now than after loading
    folder = model_folder(base)
    model, tokenizer = load_mergeable(base, adapter, stored_dtype(base), method, template)
    report = MergeReport(str(dtype).removeprefix("torch."), {})
    its_own = template == MODEL and trained_template(adapter) is None
    learnt = tokenizer.with_learnt_end()
    save_model(
        out,
        folder,
        merged_state(model, dtype, report),
        lambda: card(out.name, model.origin, adapter.resolve().name, report),
        None if its_own else tokenizer.settings["chat_template"],
        None if learnt is tokenizer else (learnt.settings["eos_token"], cast(int, learnt.eos)),
    )
    warn_if_erased(report)
    return report


def card(name: str, origin: Origin, adapter: str, report: MergeReport) -> str:
    """The text of README.md: what was merged into what, under which licence, and what rounding took."""
    licence = [f"license: {json.dumps(origin.license.lower())}"] if origin.license else []
    head = ["---", f"base_model: {json.dumps(origin.name)}", *licence, "---", f"# {name}", ""]
    said = [
        f"{origin.name} with the LoRA adapter {adapter} merged into its weights, as {report.stored_as}, by minilora."
    ]
    said += [f"Base: {origin.attribution}."] if origin.attribution else []
    table = ["", "What rounding took, beside the adapter's effect:", "", "```", str(report), "```", ""]
    return "\n".join([*head, *said, *table])
