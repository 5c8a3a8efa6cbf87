"""What several processes of one run tell each other (engine/processes.py), by accelerate."""
import os
import signal
import time
from collections import Counter

import numpy as np
import torch
from accelerate import PartialState

from engine.alone import Alone
from engine.caches import forget_caches
from engine.errors import UsageError
from tree import leaves, nodes, path


class Team(Alone):
    """Several processes, connected by accelerate."""

    def __init__(self):
        state = PartialState(cpu=not torch.cuda.is_available())
        self.rank, self.count = state.process_index, state.num_processes
        signal.signal(signal.SIGTERM, end)  # the launcher's, when another process has ended

    def deal(self, anchors, counts):
        """The heaviest first, each to who has least."""
        loads, total = Counter(), np.zeros(self.count)
        for anchor, count in zip(anchors, counts):
            loads[path(anchor)[0]] += count
        for root, load in loads.most_common():  # of equal ones the first comes first
            if root.owner is None:
                root.owner = int(total.argmin())
            total[root.owner] += load
            if root.owner != self.rank:
                forget_caches([root])  # fed here as a part of the pool
        return list(loads)

    def owns(self, node):
        return (path(node)[0].owner or 0) == self.rank

    def exchange(self, roots, rollouts):
        own = {i: root for i, root in enumerate(roots) if self.owns(root)}
        for told in self.gather_without_caches(own):
            for i, tree in told.items():
                if i not in own:
                    adopt(roots[i], tree)
        ends = {root: {leaf.sample: leaf for leaf in leaves(root)} for root in roots}
        for rollout in rollouts:
            rollout.node = ends[path(rollout.anchor)[0]][rollout.sample]

    def gather_without_caches(self, own):
        """What each process has, {i: root}; caches stay where they are."""
        kept = []
        for root in own.values():
            for node in [*nodes(root), *filter(None, [root.preamble])]:
                kept.append((node, node.cache))
                node.cache = None
        told = self.gather(own)
        for node, cache in reversed(kept):  # the first note of a shared preamble is the true one
            node.cache = cache
        return told

    def exchange_states(self, roots):
        own = [(root.hidden, root.middle) for root in self.part(roots)]
        for rank, told in enumerate(self.gather(own)):
            for root, states in zip(roots[rank::self.count], told):
                root.hidden, root.middle = states

    def any(self, value):
        return any(self.gather(bool(value)))

    def first(self, work):
        result = error = None
        if self.rank == 0:
            try:
                result = work()
            except Exception as caught:
                error = caught
        told = [(result, error)]
        self.together(torch.distributed.broadcast_object_list, told)
        result, error = told[0]
        if error is not None:
            raise error
        return result

    def add_up(self, weights, number):
        trained = any(w.grad is not None for w in weights)  # something, here
        grads = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
        flat = torch.cat([*(grad.flatten().float() for grad in grads),
                          torch.tensor([number, trained], device=grads[0].device)])
        self.together(torch.distributed.all_reduce, flat)
        if flat[-1]:  # else there stays no gradient, as with one process
            for w, total in zip(weights, flat[:-2].split([w.numel() for w in weights])):
                w.grad = total.view_as(w).to(w.dtype)
        return flat[-2].item()

    def part_ways(self):
        self.together(torch.distributed.barrier)
        torch.distributed.destroy_process_group()

    def gather(self, thing):
        """What each process has, in order."""
        told = [None] * self.count
        self.together(torch.distributed.all_gather_object, told, thing)
        return told

    def together(self, work, *args):
        """Do what all processes must come to."""
        began = time.perf_counter()
        try:
            work(*args)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # a process is not there any more
            end()
        self.seconds += time.perf_counter() - began


def adopt(root, tree):
    """Put what another process has grown below its copy of the root below ours."""
    if root.state.question.id != tree.state.question.id:
        raise UsageError("the processes do not agree on the prompts of a step: are their machines "
                         "and versions alike?")
    root.hidden, root.middle, root.children = tree.hidden, tree.middle, tree.children
    for child in tree.children:
        child.parent = root


def end(*_):
    """Say so and stop, whatever is being done: it may wait for a process that is no more."""
    os.write(2, b"another process of this run has ended; --resume DIR goes on from its last "
             b"checkpoint, if there is one\n")
    os._exit(1)
