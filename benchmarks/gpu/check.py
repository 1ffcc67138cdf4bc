"""`make gpu-check`: is the CUDA backend right on this card, and how near does it come to what the card can do?

    python benchmarks/gpu/check.py [--only NAME] [--budget-minutes M] [--out FOLDER] [--tiny]

The pieces (``pieces.py``) run in processes of their own, the weightiest first; each notes what it found as soon as it
has it. A piece that fails or runs late is recorded and the next begins; what the budget has no room for is left out and
named. Writes ``check.json``, ``check.md`` and ``roofline.png`` to ``benchmarks/results/gpu/<card>/``; ``report.py``
makes the last two again from the first. Needs a CUDA device; ``--tiny`` shows on a CPU, by Triton's interpreter, that
all of it works, and measures nothing.

Exits with 1 where something is wrong, with 2 where there is no card.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
# The package's folder must not stay on the path: others would take our modules for theirs.
sys.path[:] = [str(HERE.parent), *(p for p in sys.path if Path(p or ".").resolve() != HERE)]
import gpu  # noqa: E402

sys.path.remove(str(HERE.parent))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="pieces whose name contains this (several: separated by commas)")
    parser.add_argument("--budget-minutes", type=float, default=7.5, help="after this nothing more begins")
    parser.add_argument("--out", type=Path, help="folder of the results; default: by the card's name")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes on the CPU, interpreted: shows that it works")
    parser.add_argument("--list", action="store_true", help="name the pieces and end")
    parser.add_argument("--piece", help=argparse.SUPPRESS)  # the driver's way to start one
    parser.add_argument("--seconds", type=float, default=float("inf"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    options = arguments()
    os.environ["TRITON_INTERPRET"] = "1" if options.tiny else "0"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # transformers asks the hub for kernels: nothing is to be fetched
    if options.piece:
        return run_piece(options)
    import torch

    from gpu.pieces import PIECES

    wanted = [name for name in options.only.split(",") if name]
    pieces = [p for p in PIECES if not wanted or any(name in p.name for name in wanted)]
    if options.list:
        print("\n".join(f"{p.name:26} {p.seconds:4.0f} s" for p in pieces))
        return 0
    if not options.tiny and not torch.cuda.is_available():
        print(f"gpu-check needs an NVIDIA GPU, and torch {torch.__version__} sees none. Without one, the kernels are")
        print("tested by Triton's interpreter (make test) and compiled by benchmarks/gpu/compiled.py.")
        return 2
    from tuili.ops import triton

    about = triton.describe()
    if not about.usable:
        print(f"gpu-check: {about.why}")
        return 2
    from tuili.ops.triton.tuning import slug

    out = options.out or (HERE.parent / "results" / "gpu" / (slug(about.card) or "tiny"))
    from gpu.driver import Driver

    driver = Driver(out, options.tiny, options.budget_minutes * 60)
    driver.run(pieces)
    from gpu.report import write_report

    print(write_report(out / "check.json"))
    return 1 if driver.failures() else 0


def run_piece(options: argparse.Namespace) -> int:
    """One piece, in this process."""
    from gpu.driver import AGAIN
    from gpu.pieces import PIECES
    from gpu.place import Place, Poisoned

    piece = next(p for p in PIECES if p.name == options.piece)
    place = Place("cpu" if options.tiny else "cuda", options.tiny, options.out, time.monotonic() + options.seconds)
    try:
        piece.run(place)
    except Poisoned:
        return AGAIN
    return 0


if __name__ == "__main__":
    assert gpu.__file__
    sys.exit(main())
