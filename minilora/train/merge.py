"""`minilora merge`: fold an adapter into its base model, and leave a model folder that transformers opens.

Weights are read, merged and written one after the other, so that the merged model is never whole in memory; the base
stays on the disk where its dtype is the file's. What rounding took is printed, and stands in the folder's README.md.

Read before: torch_lora/merging, llm/save.
"""

import argparse
import contextlib
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from minilora.llm.load import load_model, model_folder
from minilora.llm.model import Origin
from minilora.llm.save import refuse_taken, save_model
from minilora.methods import layer_for
from minilora.qlora import NF4Linear
from minilora.torch_lora import load_adapter
from minilora.torch_lora.merging import MergeReport, merged_state, warn_if_erased
from minilora.train.templates import trained_template

STORED = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}  # safetensors' names
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
METHODS: Mapping[str, Callable[[nn.Module], nn.Module]] = {"lora": lambda base: base, "qlora": NF4Linear}  # of bases


def run(args: argparse.Namespace) -> int:
    """Merge as the options of cli say: `base`, `adapter`, `out`, `dtype` (of DTYPES) and `method` (of METHODS).

    With the method qlora the base is rounded to 4 bits first, because that is what such an adapter was trained over.

    Raises:
        ValueError: if the base or the adapter is impossible, or they do not fit.
        FileExistsError: if there is something at `out` already.
    """
    report = merge_to_folder(args.base, Path(args.adapter), Path(args.out), DTYPES[args.dtype], METHODS[args.method])
    title, *_, all_layers = str(report).splitlines()
    print(f"{title}\n{all_layers}\nmodel  {args.out}   (Hugging Face's layout; README.md has every layer)")
    return 0


def merge_to_folder(
    base: str, adapter: Path, out: Path, dtype: torch.dtype, stored: Callable[[nn.Module], nn.Module] = METHODS["lora"]
) -> MergeReport:
    """Write the folder, and report; as merge_model and save_model, whose errors and warning these are.

    `stored` gives each layer of the base as the adapter was trained over it: NF4Linear for one of QLoRA.

    Raises:
        ValueError: if the base is a GGUF file, which has no tokenizer files to copy.
    """
    if base.endswith(".gguf"):
        raise ValueError(f"{base} is a GGUF file, already rounded for answering: merge into the model it was made from")
    refuse_taken(out)  # if this cannot be, better now than after loading
    folder = model_folder(base)
    model, _ = load_model(base, dtype=stored_dtype(folder))
    layer = layer_for(adapter)

    def wrap(base: nn.Module, *, r: int, alpha: float, dropout: float, use_rslora: bool) -> nn.Module:
        return layer(stored(base), r=r, alpha=alpha, dropout=dropout, use_rslora=use_rslora)

    load_adapter(model, adapter, wrap, base_sha256=model.origin.sha256)
    report = MergeReport(str(dtype).removeprefix("torch."), {})
    weights = merged_state(model, dtype, report)
    save_model(
        out,
        folder,
        weights,
        lambda: card(out.name, model.origin, adapter.resolve().name, report),
        trained_template(adapter),
    )
    warn_if_erased(report)
    return report


def stored_dtype(folder: Path) -> torch.dtype:
    """The narrowest dtype that holds all floats of a model folder as they are stored.

    A file that cannot be read is passed over: load_model tells what is wrong with it.
    """
    dtypes = set()
    for path in folder.glob("*.safetensors"):
        with contextlib.suppress(SafetensorError), safe_open(path, framework="pt") as file:
            names = {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
            dtypes |= {STORED[name] for name in names & STORED.keys()}
    return functools.reduce(torch.promote_types, dtypes) if dtypes else torch.float32


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
