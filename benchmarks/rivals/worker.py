"""The process in which one arm runs: ``python worker.py RIVAL WIDTH MODEL THREADS``, JSON lines on stdin and stdout.

It loads, makes one token, says ``{"ready": seconds since it was told to begin}``, then answers every
``{"prompts": [[id, ...], ...], "new": n}`` with ``{"timed": [[[id, seconds], ...], ...]}`` or ``{"error": ...}``.
What the engine itself prints goes to stderr. Runs in the rival's environment: standard library only.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import TextIO

#: A prompt whose first token says that the engine is up.
HELLO = list(range(300, 316))


def main() -> None:
    package = str(Path(__file__).resolve().parents[1])
    sys.path[0] = package
    import rivals.rival

    # The folder holds files named like real packages (vllm.py, openvino.py): off the path again.
    sys.path.remove(package)
    give_way()
    answers = private_stdout()
    module, width, model, threads = sys.argv[1:]
    try:
        session = rivals.rival.rival(module).load(Path(model), width, int(threads))
        session.generate([HELLO], 1)
    except Exception as error:
        answer(answers, {"error": f"{type(error).__name__}: {error}"})
        raise
    answer(answers, {"ready": time.time()})
    for line in sys.stdin:
        try:
            request = json.loads(line)
            answer(answers, {"timed": session.generate(request["prompts"], request["new"])})
        except Exception as error:
            traceback.print_exc()
            answer(answers, {"error": f"{type(error).__name__}: {error}"})
    # Engines with threads and child processes of their own do not all end by themselves.
    os._exit(0)


def give_way() -> None:
    """If memory runs out, this process is to go, not those that it is measured beside; and it ends with its harness,
    even while it is stopped."""
    Path("/proc/self/oom_score_adj").write_text("800")
    set_death_signal = 1
    ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)


def private_stdout() -> TextIO:
    """The real stdout, while everything that prints goes to stderr."""
    mine = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return mine


def answer(out: TextIO, message: dict[str, object]) -> None:
    out.write(json.dumps(message) + "\n")
    out.flush()


if __name__ == "__main__":
    main()
