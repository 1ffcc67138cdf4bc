"""Static batching, for comparison: a batch forms, runs until its last request ends, and only then the next one forms.

A batch is still forming while none of its requests has sampled a token; its size is bounded by the row limit, the KV
pool and, as a batch closes with the first sampled token, by the token budget: set a budget that holds the prompts.
"""

from __future__ import annotations

from collections.abc import Sequence

from tuili.core.policies import policies
from tuili.core.policies.fcfs import Fcfs
from tuili.core.request import Request


@policies.register("static")
class Static(Fcfs):
    rectangular = True

    def joins(self, running: Sequence[Request]) -> bool:
        return all(request.num_output + request.pending == 0 for request in running)
