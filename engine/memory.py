"""How much fits at once, and what happens when it does not."""
import ctypes
import gc
import sys
import warnings
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch

from engine.sampling import RaggedCache

PLAIN_SHARE = 0.5       # of free memory: matrices that fit in this are held in plain to sample
MOST_COLUMNS = 131072   # of the cache, however large the memory
CPU_BYTES = 2 ** 32     # memory that is planned with where there is no GPU
OPTIMIZER_BYTES = 12    # per trained weight: its gradient and two moments
KEPT = 2                # numbers that the update keeps per input and output of an adapted layer


class MemoryPlan(NamedTuple):
    cache_tokens: int    # columns of the episodes that are sampled together
    column_bytes: int    # of one token in the cache
    checkpointing: bool  # the update computes activations again instead of keeping them
    plain: bool          # sampling computes with matrices W + BA instead of with W in 4 bits


def plan_memory(policy, plain=None):
    """-> MemoryPlan, from what is free and from what a token takes; `plain` is decided here where a
    run has not decided it before.

    Matrices W + BA for sampling are made where they take at most half of what is free: to unpack 4
    bits at every token takes longer than the product. The rest is cut in three: caches of live
    rollouts, of ended ones, and copies while a cache is made anew. By the time of the update all
    that is gone.
    Qwen2.5-1.5B in NF4 on 8 GB: 1.2 GB of weights (a third of them the 151,936 words in 16 bits),
    0.3 GB of LoRA with its optimiser, 0.5 GB of CUDA itself; 6 GB remain. Plain matrices take 2.6
    GB. A token takes 2 x 28 layers x 2 heads x 128 numbers of 16 bits in the cache, 29 kB: 39,000
    fit into 1.1 GB. The update of 4,096 tokens would keep 28 x 165 kB each, 19 GB. With gradient
    checkpointing it is 28 x 3 kB, and one layer at a time: 0.95 GB, and 0.6 GB of logits."""
    ids = np.zeros(64, np.int64)
    cache, config = RaggedCache(1), policy.config
    with policy.sampling():
        policy.forward([ids], [0], [0], cache)
    stored = sum(tensor.nbytes for tensor in cache.keys + cache.values)
    column_bytes = stored // cache.num_columns()
    free = free_bytes(policy.device)
    free -= OPTIMIZER_BYTES * sum(weight.numel() for weight in policy.trained)
    kept = plain_bytes = 0  # of one token; of all matrices
    for layer in policy.layers:
        kept += KEPT * (layer.in_features + layer.out_features) * policy.head.weight.itemsize
        plain_bytes += layer.in_features * layer.out_features * policy.head.weight.itemsize
    longest = max(config.micro_batch_tokens, policy.context)
    if plain is None:
        plain = plain_bytes <= PLAIN_SHARE * free and all(map(can_be_plain, policy.layers))
    left = free - plain_bytes if plain else free
    columns = min(MOST_COLUMNS, int(left / 3 / column_bytes))
    return MemoryPlan(config.cache_tokens or max(columns, policy.context), column_bytes,
                      longest * kept > free / 2, plain)


def describe_memory(policy):
    """What fits, in one line."""
    size = policy.cache_tokens * policy.plan.column_bytes / 1e9
    return (f"memory: a cache of {policy.cache_tokens:,} tokens ({size:.1f} GB) for live episodes "
            f"of at most {policy.context:,}, sampling with "
            f"{'plain matrices' if policy.plan.plain else 'layers as they are'}, micro-batches of "
            f"{policy.config.micro_batch_tokens:,} tokens, gradient "
            f"checkpointing {'on' if policy.plan.checkpointing else 'off'}")


def adapted_layers(body):
    return [module for module in body.modules() if hasattr(module, "base_layer")]


def can_be_plain(layer):
    """GPT-2 has a kind of its own, and so have files that are quantised otherwise."""
    return type(layer.base_layer).__name__ in ("Linear", "Linear4bit")


def best_device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def free_bytes(device):
    """Memory that PyTorch may still take on the device."""
    if device.type != "cuda":
        return CPU_BYTES
    free, total = torch.cuda.mem_get_info(device)
    most = torch.cuda.get_per_process_memory_fraction(device) * total
    most = min(free + torch.cuda.memory_reserved(device), most)
    return most - torch.cuda.memory_allocated(device)


def halving(policy, room, least, work, undo):
    """work(); out of GPU memory, undo() and again with half of the policy's `room`, the name of its
    cache_tokens or micro_batch_tokens. If even the `least` does not fit, that is an error."""
    while True:
        try:
            return work()
        except torch.OutOfMemoryError:
            if getattr(policy, room) <= least:
                raise
        # here, since the error held the frames, and they the tensors, of what did not fit
        undo()
        torch.cuda.empty_cache()
        setattr(policy, room, max(least, getattr(policy, room) // 2))
        warnings.warn(f"out of GPU memory: halving {room}, now {getattr(policy, room):,}")


@contextmanager
def settled():
    """What is there by now stays to the end: the garbage collector need not look at it. (To look
    at it took a quarter of a second in every step, on two busy cores.)"""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def trim_memory():
    """Give the last step's memory back. Trees are cycles of references, which Python frees late,
    and glibc keeps the pieces: without this a run grew by 15 MB a step."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim:
        trim(0)
