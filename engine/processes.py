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


class Alone:
    """The only process of a run."""
    rank, count = 0, 1

    def deal(self, roots, weights):
        """Decide whose each tree is that nobody has yet, by weights [n]."""

    def owns(self, node):
        """Is this node's tree grown and trained here?"""
        return True

    def part(self, items):
        return items[self.rank::self.count]

    def exchange(self, roots):
        """Tell all what has grown below the roots dealt to each, without its caches."""

    def exchange_parts(self, roots, names):
        """Tell all these attributes of the roots, which each process has of its part."""

    def any(self, value):
        """Is it true in one process?"""
        return bool(value)

    def first(self, work):
        """work() in the first process; what comes of it, or its error, is told to all."""
        return work()

    def add_up(self, weights, number):
        """-> the sum over processes of a number, and, in place, that of the gradients."""
        return number


@cache
def team():
    """The processes of this run."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return Alone()
    from engine.launched import Team  # here, since few runs need what it imports

    return Team()
