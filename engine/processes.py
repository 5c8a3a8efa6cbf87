"""One run on several processes: who does what, and what all must know.

`accelerate launch --num_processes 2 trace_mini.py` starts the processes and connects them, by
gloo on CPUs and by nccl on GPUs. Each holds the whole policy and takes the same decisions from
the same numbers. Prompts are dealt out, a whole tree to one process. Random numbers are keyed by
question, so the episodes are those of one process. Trees are told to all, gradients are added
up, and the first process writes the run folder. Without that launcher a run has one process,
`Alone`, with nothing to share.
"""
import os
from functools import cache

from engine.alone import Alone


@cache
def team():
    """The processes of this run."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return Alone()
    from engine.launched import Team  # here, since few runs need what it imports

    return Team()
