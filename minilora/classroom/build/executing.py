"""Run a lesson's notebook in a kernel of its own, and look at what would be published."""

import os
import re
import sys
import tempfile
from pathlib import Path

from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

from minilora.classroom.build.lesson import LessonError, Notebook
from minilora.classroom.build.notebooks import KERNEL, LANGUAGE

FIGURE_BYTES = 1_000_000
WIDGET = "application/vnd.jupyter.widget-view+json"
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONHASHSEED": "0",
    "MINILORA_STRICT": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "HF_HUB_OFFLINE": "1",
}


def execute(notebook: Notebook, folder: Path, lessons: Path) -> None:
    """Run a notebook in this Python, in `folder`, and keep its outputs, without widgets.

    Raises:
        LessonError: if a cell fails, or its output cannot be published (lists all such cells).
    """
    manager = AsyncKernelManager(kernel_name=KERNEL["name"])
    manager._kernel_spec = KernelSpec(  # this Python, whatever kernels are registered on the machine
        argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=ERROR"],
        **{key: value for key, value in KERNEL.items() if key != "name"},
    )
    client = NotebookClient(
        notebook,
        km=manager,
        timeout=120,
        record_timing=False,
        store_widget_state=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )
    with tempfile.TemporaryDirectory() as home:
        own = {"MINILORA_HOME": home, "IPYTHONDIR": home, "MINILORA_LESSONS": str(lessons)}
        try:
            client.execute(cleanup_kc=True, env={**os.environ, **ENVIRONMENT, **own}, cwd=str(folder))
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as failure:
            raise LessonError(f"a cell failed:\n{failure}") from failure
    notebook.metadata["language_info"] = LANGUAGE
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", {})]
    problems = output_problems(notebook, folder.parent)
    if problems:
        raise LessonError("the output cannot be published:\n  " + "\n  ".join(problems))


def output_problems(notebook: Notebook, root: Path) -> list[str]:
    """What a published notebook must not hold: paths and addresses of this machine, warnings, figures without a
    description, megabytes of figures."""
    problems, figure_bytes = [], 0
    for number, cell in enumerate(notebook.cells, start=1):
        if cell.cell_type != "code":
            continue
        if cell.execution_count is None and cell.source.strip():
            problems.append(f"cell {number} was not executed")
        for output in cell.outputs:
            data = output.get("data", {})
            figure_bytes += sum(len(value) * 3 // 4 for kind, value in data.items() if kind.startswith("image/"))
            for kind in (kind for kind in data if kind.startswith("image/")):
                if not output.get("metadata", {}).get(kind, {}).get("alt", "").strip():
                    problems.append(
                        f"cell {number} shows a figure without a description: show(figure, alt=…, finding=…)"
                    )
            text = str(output.get("text", "")) + "".join(
                str(value) for kind, value in data.items() if not kind.startswith("image/")
            )
            if output.output_type == "stream" and output.name == "stderr":
                problems.append(f"cell {number} wrote a warning or an error: {text.strip()[:200]}")
            for pattern in (re.escape(str(root)), re.escape(str(Path.home())) + "/", r"/tmp/\S+", r"0x[0-9a-f]{8,}"):
                if found := re.search(pattern, text):
                    problems.append(f"cell {number} shows something of this machine: {found[0]}")
    if figure_bytes > FIGURE_BYTES:
        problems.append(f"the figures take {figure_bytes:,} bytes; {FIGURE_BYTES:,} is the most")
    return problems
