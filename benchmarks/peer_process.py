"""The other end of a process that runs a peer: asked in JSON lines, and watched, for it may die."""

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from typing import Any


class PeerError(RuntimeError):
    """A peer's process could not do what it was asked."""


class Child:
    """A process that answers a JSON line with a JSON line, and may die at any of them."""

    def __init__(self, command: Sequence[str], threads: int) -> None:
        self._errors = tempfile.TemporaryFile("w+", errors="replace")
        # a session of its own: Ctrl-C is the parent's business, and children of the compiler die with it
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors}
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        self._process = subprocess.Popen(command, text=True, env=environment, start_new_session=True, **pipes)

    def ask(self, request: dict[str, Any], timeout: float) -> dict[str, Any]:
        """The answer.

        Raises:
            PeerError: the process said that it failed, ended, or took too long.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        timer = threading.Timer(timeout, self._kill)
        timer.start()
        try:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(json.dumps(request) + "\n")
                self._process.stdin.flush()
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        answer: dict[str, Any] = json.loads(line or "null") or {"error": self._last_words(timeout)}
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer

    def close(self) -> None:
        """Ends the process and frees the pipes."""
        self._kill()
        self._process.communicate()
        self._errors.close()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _last_words(self, timeout: float) -> str:
        code = self._process.wait()
        if code == -signal.SIGKILL:
            return f"killed: out of memory (try --restart), or no answer within {timeout:.0f} s"
        how = f"exited with {code}" if code >= 0 else f"was ended by {signal.Signals(-code).name}"
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors if line.strip()]
        return f"its process {how}" + (f": {lines[-1][:200]}" if lines else "")
