"""The parent's side of the workers: one process per library, asked one thing at a time."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

# Several processes share one GPU: none may reserve its memory for itself.
ENVIRONMENT = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


class WorkerError(RuntimeError):
    """A library could not do what it was asked."""


class Worker:
    """A process that serves one library, and stands still when it is not asked anything.

    Idle threads would not be quite idle: PyTorch's spin for a while, waiting for more work.
    """

    def __init__(self, library: str):
        """Starts the process; whether the library is there shows with the first request."""
        self.library = library
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (as long-lived as the process)
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"benchmarks.workers.{library.replace('.', '_')}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=os.environ | ENVIRONMENT,
        )

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Sends one request and waits for the reply.

        Raises:
            WorkerError: with the worker's own traceback, or its log if it died.
        """
        request = json.dumps({"do": do} | arguments)
        self._process.send_signal(signal.SIGCONT)
        try:
            print(request, file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._log.seek(0)
            raise WorkerError(
                f"the worker of {self.library} died on {request}; is everything in "
                f"benchmarks/requirements.txt installed? The end of its log:\n"
                f"{self._log.read()[-2000:]}"
            )
        self._process.send_signal(signal.SIGSTOP)
        reply = json.loads(line)
        if "error" in reply:
            raise WorkerError(f"{self.library} failed on {request}:\n{reply['error']}")
        return reply

    def stop(self) -> None:
        """Ends the process."""
        self._process.send_signal(signal.SIGCONT)
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()


@contextmanager
def workers(libraries: list[str]) -> Iterator[dict[str, Worker]]:
    """Starts one worker per library and stops them in the end."""
    started = {library: Worker(library) for library in libraries}
    try:
        yield started
    finally:
        for worker in started.values():
            worker.stop()
