"""Runs stock llama.cpp's own programs."""

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scripts.stock_llama import executable

THREADS = ("-t", "1", "-tb", "1")
"""Small matrices on a busy machine: threads would wait for each other most of the time."""
EXACT = ("-fa", "off", "-ctk", "f32", "-ctv", "f32")
"""No half-precision in attention: with llama.cpp's defaults differences below 1e-2 are not seen."""

Post = Callable[[str, dict[str, Any]], dict[str, Any]]


class Programs:
    """What scripts/stock_llama built into `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, name: str, *arguments: str | Path, last: str = "") -> str:
        """What llama-`name` says, on both streams; it must end well. Where `last` is given, it is among what it says: the thread
        that prints is not waited for, and on a busy machine the end of it may be lost."""
        for _ in range(20):
            text = said(self.folder / "bin" / executable(name), *arguments)
            if last in text:
                return text
        raise AssertionError(f"llama-{name} does not say {last!r}:\n{text[-4000:]}")

    @contextmanager
    def server(self, model: Path, *arguments: str) -> Iterator[Post]:
        """llama-server with `model`; yields a function that posts JSON to a path and gives the answer."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        program = self.folder / "bin" / executable("server")
        command = [program, "-m", model, *THREADS, *EXACT, "--host", "127.0.0.1", "--port", str(port), *arguments]
        log = model.with_suffix(".log")
        with (
            log.open("w") as out,
            subprocess.Popen(list(map(str, command)), stdout=out, stderr=out, env=environment()) as process,
        ):
            try:
                _wait(f"http://127.0.0.1:{port}/health", process, log)
                yield lambda path, body: _answer(f"http://127.0.0.1:{port}{path}", body)
            finally:
                process.terminate()


def said(*command: str | Path) -> str:
    """What a command says, on both streams; it must end well."""
    done = subprocess.run(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300, env=environment()
    )
    text = done.stdout.decode("utf-8", "replace")
    assert not done.returncode, f"{command} ended with {done.returncode}:\n{text[-4000:]}"
    return text


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(240):
        assert process.poll() is None, f"llama-server ended with {process.returncode}:\n{log.read_text('utf-8')[-4000:]}"
        try:
            _answer(url)
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.25)
        else:
            return
    raise AssertionError(f"llama-server does not answer:\n{log.read_text('utf-8')[-4000:]}")


def _answer(url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            found: dict[str, Any] = json.load(answer)
            return found
    except urllib.error.HTTPError as error:
        if error.code == 503:  # it is loading the model
            raise
        raise AssertionError(f"{url}: {error.code}: {error.read().decode()}") from error
