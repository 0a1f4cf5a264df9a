"""A Jupyter kernel for tests, spoken to over its wire protocol, without a browser."""

import os
import queue
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import KernelManager

from minilora.classroom.build.executing import ENVIRONMENT

Message = dict[str, Any]


class Wire:
    """One kernel: run code, move a widget; each returns the messages that came back for it, in order."""

    def __init__(self, client: BlockingKernelClient) -> None:
        self.client = client

    def run(self, code: str, timeout: float = 120) -> list[Message]:
        """Execute a cell."""
        return self._answers(self.client.execute(code, store_history=True), timeout)

    def move(self, comm_id: str, state: dict[str, Any], timeout: float = 60) -> list[Message]:
        """Tell a widget that its state changed, as the page does when somebody drags a slider."""
        content = {"comm_id": comm_id, "data": {"method": "update", "state": state, "buffer_paths": []}}
        message = self.client.session.msg("comm_msg", content)
        self.client.shell_channel.send(message)
        return self._answers(message["header"]["msg_id"], timeout)

    def _answers(self, msg_id: str, timeout: float) -> list[Message]:
        answers, deadline = [], time.monotonic() + timeout
        while time.monotonic() < deadline:
            try:
                message = self.client.get_iopub_msg(timeout=1)
            except queue.Empty:
                continue
            if message["parent_header"].get("msg_id") != msg_id:
                continue
            if message["msg_type"] == "status" and message["content"]["execution_state"] == "idle":
                return answers
            answers.append(message)
        raise TimeoutError(f"the kernel gave no sign of being done within {timeout} s")


@contextmanager
def kernel(folder: Path) -> Iterator[Wire]:
    """A kernel of this Python in a folder, as the builder starts it; it is shut down at the end."""
    with tempfile.TemporaryDirectory() as home:
        manager = KernelManager(kernel_name="python3")
        manager._kernel_spec = KernelSpec(
            argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=ERROR"],
            display_name="Python 3",
            language="python",
        )
        manager.start_kernel(
            cwd=str(folder), env={**os.environ, **ENVIRONMENT, "MINILORA_HOME": home, "IPYTHONDIR": home}
        )
        client = manager.blocking_client()
        client.start_channels()
        try:
            client.wait_for_ready(timeout=60)
            yield Wire(client)
        finally:
            client.stop_channels()
            manager.shutdown_kernel(now=True)
            manager.cleanup_resources()
