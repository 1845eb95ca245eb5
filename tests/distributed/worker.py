"""One rank that runs all cases, each in a process group of its own, and saves what came of each.

A case that raises is told as the error; the others go on.
"""

from __future__ import annotations

import sys
import time
import traceback
from typing import Any

import torch
from counts import COUNTS
from modes import MODES, ON_FOUR
from rank import Rank
from refusals import REFUSALS


def outcome(case: Any, rank: Rank) -> dict[str, Any]:
    """What a case returned, or the error that it raised; and the seconds that it took."""
    rank.join()
    began = time.perf_counter()
    try:
        found = {"value": case(rank)}
    except Exception as error:
        found = {
            "error": type(error).__name__,
            "message": str(error),
            "trace": traceback.format_exc(),
        }
    rank.leave()
    return {**found, "seconds": time.perf_counter() - began}


def main() -> None:
    rank, results = Rank(), {}
    modes = {name: MODES[name] for name in MODES if rank.size < 4 or name in ON_FOUR}
    cases = {**modes, **COUNTS}
    if rank.size > 1:
        cases |= REFUSALS
    for name, case in cases.items():
        results[name] = outcome(case, rank)
        torch.save(results, sys.argv[1])
    rank.end()


if __name__ == "__main__":
    main()
