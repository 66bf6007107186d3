"""The worker's side: one library in a process of its own, told what to do over stdin and stdout.

A request is one line of JSON with a key "do"; the reply is one line of JSON, with a key "error" if
it failed. A module in `benchmarks.workers` calls `serve` with what its library can do.

    describe                          -> versions, device
    prepare   case, variant, path     -> what compilation cost, whether the results are right
    compile   candidate, kind         -> seconds, of doing it once more
    measure   candidate, kind, repeats, warm_up -> seconds
    release                           -> forget all candidates
"""

import json
import os
import sys
import traceback
from collections.abc import Callable
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from benchmarks import problem
from benchmarks.clock import time_calls


class Call(NamedTuple):
    """One thing to time: `run` returns when its work is done.

    What compiles says how long that took, and can do it again.
    """

    run: Callable[[], Any]
    compile_s: float | None = None
    compile_again: Callable[[], float] | None = None
    temp_bytes: int | None = None


class Candidate(NamedTuple):
    """A library's way to compute one case.

    Attributes:
        calls: "forward", and "gradient" where there is one.
        outputs: what "forward" returned -> outputs [B, T, H].
        input_gradient: what "gradient" returned -> the loss's derivative by the inputs [B, T, D].
        math: which reference the outputs are held against; None: none.
    """

    calls: dict[str, Call]
    outputs: Callable[[Any], np.ndarray] = np.asarray
    input_gradient: Callable[[Any], np.ndarray] = np.asarray
    math: str | None = "reference"


class Library(NamedTuple):
    """What a module in `benchmarks.workers` provides.

    Attributes:
        build: (cell, variant, problem) -> candidate.
        versions: package name -> version.
        device: what it computes on.
    """

    build: Callable[[str, str, problem.Problem], Candidate]
    versions: dict[str, str]
    device: str


def serve(library: Library) -> None:
    """Answers requests until stdin closes."""
    # Libraries print to stdout as they please; the replies keep a descriptor of their own.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    desk = _Desk(library)
    for line in sys.stdin:
        try:
            request = json.loads(line)
            reply = getattr(desk, request.pop("do"))(**request)
        except Exception:
            reply = {"error": traceback.format_exc()}
        print(json.dumps(reply), file=replies, flush=True)


class _Desk:
    """One method per request."""

    def __init__(self, library: Library):
        self.library = library
        self.release()

    def describe(self) -> dict:
        return {"versions": self.library.versions, "device": self.library.device}

    def prepare(self, case: str, variant: str, path: str) -> dict:
        if path != self.path:
            self.path, self.problem = path, problem.load(path)
        candidate = self.library.build(case, variant, self.problem)
        reply: dict[str, Any] = {"calls": {}}
        for kind, call in candidate.calls.items():
            result = call.run()
            if kind == "forward" and candidate.math is not None:
                reference = getattr(self.problem, candidate.math)
                error = np.abs(candidate.outputs(result) - reference).max()
                reply |= {"math": candidate.math, "output_error": float(error)}
            if kind == "gradient":
                gradient = candidate.input_gradient(result).astype(np.float64)
                reply["input_gradient_norm"] = float(np.linalg.norm(gradient))
            del result
            start = perf_counter()
            call.run()
            reply["calls"][kind] = {
                "estimate_s": perf_counter() - start,
                "compile_s": call.compile_s,
                "temp_bytes": call.temp_bytes,
            }
        self.candidates.append(candidate)
        reply["candidate"] = len(self.candidates) - 1
        return reply

    def compile(self, candidate: int, kind: str) -> dict:
        return {"seconds": self.candidates[candidate].calls[kind].compile_again()}

    def measure(self, candidate: int, kind: str, repeats: int, warm_up: bool) -> dict:
        call = self.candidates[candidate].calls[kind]
        return {"seconds": time_calls(call.run, repeats, warm_up)}

    def release(self) -> dict:
        self.candidates: list[Candidate] = []
        self.path, self.problem = None, None
        return {}
