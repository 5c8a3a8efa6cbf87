"""What several processes of one run tell each other (engine/processes.py), by accelerate."""
import io
import os
import pickle
import signal

import numpy as np
import torch
from accelerate import PartialState

from engine.processes import Alone, team
from engine.sampling import RaggedCache
from tree import path


class Team(Alone):
    """Several processes, connected by accelerate."""

    def __init__(self):
        state = PartialState(cpu=not torch.cuda.is_available())
        self.rank, self.count = state.process_index, state.num_processes
        signal.signal(signal.SIGTERM, end)  # the launcher's, when another process has ended

    def deal(self, roots, weights):
        """The heaviest first, each to who has least."""
        load = np.zeros(self.count)
        for i in np.argsort(-np.asarray(weights), kind="stable"):
            if roots[i].owner is None:
                roots[i].owner = int(load.argmin())
            load[roots[i].owner] += weights[i]

    def owns(self, node):
        return (path(node)[0].owner or 0) == self.rank

    def exchange(self, roots):
        own = {i: root for i, root in enumerate(roots) if self.owns(root)}
        for told in self.gather(without_caches(own)):
            for i, tree in Unpickler(io.BytesIO(told)).load().items():
                if i not in own:
                    roots[i].hidden, roots[i].middle = tree.hidden, tree.middle
                    roots[i].children = tree.children
                    for child in tree.children:
                        child.parent = roots[i]

    def exchange_parts(self, roots, names):
        own = [[getattr(root, name) for name in names] for root in self.part(roots)]
        for rank, told in enumerate(self.gather(own)):
            for root, values in zip(roots[rank::self.count], told):
                for name, value in zip(names, values):
                    setattr(root, name, value)

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
        together(torch.distributed.broadcast_object_list, told)
        result, error = told[0]
        if error is not None:
            raise error
        return result

    def add_up(self, weights, number):
        grads = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
        flat = torch.cat([*(grad.flatten().float() for grad in grads),
                          torch.tensor([number], device=grads[0].device)])
        together(torch.distributed.all_reduce, flat)
        for w, total in zip(weights, flat[:-1].split([w.numel() for w in weights])):
            w.grad = total.view_as(w).to(w.dtype)
        return flat[-1].item()

    def gather(self, thing):
        """What each process has, in order."""
        told = [None] * self.count
        together(torch.distributed.all_gather_object, told, thing)
        return told


class Pickler(pickle.Pickler):
    """Leaves out caches, and where in them a path lies."""

    def persistent_id(self, thing):
        in_cache = isinstance(thing, tuple) and thing and isinstance(thing[0], RaggedCache)
        return "a place in a cache" if in_cache else None


class Unpickler(pickle.Unpickler):
    def persistent_load(self, name):
        return None


def without_caches(trees):
    """-> bytes"""
    Pickler(stream := io.BytesIO()).dump(trees)
    return stream.getvalue()


def together(work, *args):
    """Do what all processes must come to."""
    try:
        work(*args)
    except RuntimeError:
        end()


def end(*_):
    """In one line, whatever is being done: it may wait for a process that is no more."""
    os.write(2, f"process {team().rank}: another process of this run has ended; --resume DIR goes "
             "on from its last checkpoint\n".encode())
    os._exit(1)
