"""GPTCache as a system: a process of its own environment, spoken to in JSON lines. What it takes is timed there."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from pathlib import Path
from typing import IO, Any, cast

from bench.cache.system import CannotRun, Request, Served, Work

PYTHON = Path(".venv-gptcache/bin/python")
WORKER = Path(__file__).with_name("gptcache_worker.py")
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "PIP_NO_INDEX": "1",
    "SQLALCHEMY_SILENCE_UBER_WARNING": "1",
}
END_SECONDS = 60


class GPTCache:
    name = "GPTCache"

    def __init__(self, work: Work) -> None:
        """Raises CannotRun."""
        if not PYTHON.exists():
            raise CannotRun(f"{PYTHON} is missing; `make bench-cache` installs it")
        texts, kept = work.folder / "texts.json", work.folder / "gptcache"
        texts.write_text(json.dumps(work.texts), encoding="utf-8")
        self.seconds = 0.0
        self._log = work.folder / "gptcache.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [PYTHON, "-P", WORKER, kept, texts, work.vectors],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, **ENVIRONMENT},
                text=True,
            )
        self._questions, self._answers = cast(IO[str], self._process.stdin), cast(IO[str], self._process.stdout)
        self.versions: dict[str, str] = self._line()

    def ask(self, request: Request) -> Served | None:
        found = self._say({"get": request.text})
        self.seconds = found["seconds"]
        return None if found["answer"] is None else Served(int(found["answer"]), 0.0)

    def store(self, request: Request) -> None:
        """The number of the request is what is stored as its answer: a hit then says whose answer it is."""
        self._say({"put": request.text, "answer": str(request.number)})

    def clear(self) -> None:
        self._say({"clear": True})

    def close(self) -> None:
        """The end of its input is the end of the process."""
        with contextlib.suppress(BrokenPipeError):
            self._questions.close()
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._answers.close()

    def _say(self, request: dict[str, Any]) -> dict[str, Any]:
        with contextlib.suppress(BrokenPipeError):  # it has ended: then there is no answer to read either
            self._questions.write(json.dumps(request) + "\n")
            self._questions.flush()
        return self._line()

    def _line(self) -> dict[str, Any]:
        if line := self._answers.readline():
            answer: dict[str, Any] = json.loads(line)
            return answer
        self.close()
        raise CannotRun(f"GPTCache ended: {self._log.read_text(errors='replace')[-2000:]}")
