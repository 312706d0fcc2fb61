"""Runs the parts until one ends or the user has had enough, then ends the rest.

Honcho does the running. It is small, kept, pure Python, and has just the rules that a foreground stack needs: every
part leads a process group of its own, when one ends the others get TERM and, five seconds later, KILL. Supervisord and
its like restart what dies, which would hide what a newcomer has to see, and want a configuration file and a socket.

Added here: readiness, one log per part, a stop that is asked for before all have started, and leaving nothing behind,
neither children of a part that is gone nor parts whose supervisor was killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import json
import shlex
import signal
import ssl
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from honcho.manager import Manager
from honcho.process import Popen, Process

from deploy.local.parts import Part

PR_SET_PDEATHSIG = 1  # prctl(2)
POLL_SECONDS = 0.5
PATIENCE_SECONDS = 30  # between two lines that say what is still starting
TROUBLE = ("error", "exception", "fatal", "panic")


def say(line: str) -> None:
    print(f"fingerpost: {line}", flush=True)


def ask(url: str) -> None:
    """Get `url`, past any proxy that the environment names; another status than 200 is an `HTTPError`."""
    trusting = ssl.create_default_context()
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE  # it was started here, whatever it is called
    handlers = (urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=trusting))
    urllib.request.build_opener(*handlers).open(url, timeout=5).close()


def is_ready(part: Part) -> bool:
    """Whether all its addresses answer 200."""
    try:
        for url in part.ready:
            ask(url)
    except (OSError, http.client.HTTPException):  # refused, closed, or another status
        return False
    return True


def waits_for(part: Part) -> str:
    """What a part that runs says it is waiting for, in brackets; nothing when it does not say."""
    try:
        ask(part.ready[-1])
    except urllib.error.HTTPError as answer:
        with answer, contextlib.suppress(ValueError, KeyError, TypeError):
            return f" (waiting for {', '.join(json.load(answer)['not_ready'])})"
    except (OSError, http.client.HTTPException):
        pass
    return ""


def last_words(log: Path) -> str:
    """The last line of a log that speaks of trouble, or else its last line."""
    lines = [line.strip() for line in log.read_bytes()[-65536:].decode(errors="replace").splitlines() if line.strip()]
    telling = [line for line in lines if any(word in line.lower() for word in TROUBLE)]
    return (telling or lines or ["(empty)"])[-1][:200]


def die_with_parent(signum: int) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signum)


class Watched(Process):  # type: ignore[misc]
    """Honcho's process: a fork of the supervisor that starts a part and waits for it. Neither outlives its parent."""

    def run(self, events: Any = None, ignore_signals: bool = False) -> None:
        die_with_parent(signal.SIGKILL)
        self._child_ctor = partial(Popen, preexec_fn=partial(die_with_parent, signal.SIGTERM))
        super().run(events, ignore_signals)


class Silent:
    """Honcho's printer; the supervisor prints lines of its own."""

    width = 0

    def write(self, message: object) -> None:
        pass


class Supervisor(Manager):  # type: ignore[misc]
    """Honcho's manager: `loop()` runs the parts, and `died` then says which ended by themselves, with their status."""

    def __init__(self, parts: Sequence[Part], logs: Path, welcome: str) -> None:
        super().__init__(printer=Silent())
        self.parts, self.logs, self.welcome = parts, logs, welcome
        self.died: dict[str, int] = {}
        self.stopping = False
        self._process_ctor = Watched
        logs.mkdir(parents=True, exist_ok=True)
        for part in parts:
            log = self._log(part.name)
            if log.exists():
                log.replace(log.with_suffix(".log.1"))  # the run before this one; older ones are gone
            self.add_process(part.name, f"exec {shlex.join(part.command)} </dev/null >{shlex.quote(str(log))} 2>&1")

    def loop(self) -> None:
        super().loop()
        for part in self._processes.values():
            self._procmgr.kill(part["pid"])  # the group: children that a part left behind

    def terminate(self) -> None:
        """Ask all parts to stop. Called when a part has ended, and by the handler of INT and TERM."""
        if not self.stopping:
            self.stopping = True
            self.died = {name: part["returncode"] for name, part in self._processes.items() if "returncode" in part}
            for name, status in self.died.items():
                print(obituary(name, status, self._log(name)), file=sys.stderr, flush=True)
            say("stopping")
        if self._all_started():  # else a later round of the loop does it: honcho does not know all of them yet
            super().terminate()

    def _any_stopped(self) -> bool:
        """Whether it is time to end: here, a stop that was asked for counts, too."""
        return self.stopping or super()._any_stopped()

    def _start(self) -> None:
        super()._start()
        threading.Thread(target=self._await_ready, daemon=True).start()  # after the forks, which threads do not survive

    def _await_ready(self) -> None:
        started = time.monotonic()
        patience = started + PATIENCE_SECONDS
        waiting = list(self.parts)
        say(f"starting {', '.join(part.name for part in waiting)}; logs in {self.logs}/")
        while waiting and not self.stopping:
            for part in [part for part in waiting if is_ready(part) and not self.stopping]:
                waiting.remove(part)
                say(f"{part.name} is ready after {time.monotonic() - started:.1f} s")
            if waiting and time.monotonic() > patience:
                patience += PATIENCE_SECONDS
                say(f"still starting {', '.join(part.name + waits_for(part) for part in waiting)}")
            time.sleep(POLL_SECONDS)
        if not self.stopping:
            say(self.welcome)

    def _log(self, name: str) -> Path:
        return self.logs / f"{name}.log"


def obituary(name: str, status: int, log: Path) -> str:
    """One line on a part that ended by itself. Who was killed had no time to say why."""
    if status < 0:
        return f"{name} was killed by {signal.Signals(-status).name}; its log is {log}"
    return f"{name} ended with exit status {status}; its log is {log}: {last_words(log)}"
