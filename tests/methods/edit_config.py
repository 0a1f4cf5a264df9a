"""Change an adapter's config as another program would: its tensors then name no config that they were written with."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file


def edit_config(folder: Path, **changes: Any) -> None:
    config, tensors = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    save_file(load_file(tensors), tensors, {"format": "pt"})
