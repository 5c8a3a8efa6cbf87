"""Feeding caches, and which trees hold on to them: a node's `cache` is (RaggedCache, row)."""
from contextlib import contextmanager

import numpy as np
import torch

from engine.sampling import RaggedCache
from tree import nodes


def feed_cache(body, ids, rows, starts, cache):
    """Feed lists of ids, ids[i] to row rows[i] of the cache from column starts[i] on -> last
    hidden states [N, W] of all N tokens, list by list. R rows, T tokens of the longest list, S
    columns."""
    counts, device = list(map(len, ids)), body.device
    slots = np.concatenate([np.arange(count) for count in counts])  # of a token in its list
    columns = np.repeat(starts, counts) + slots
    width = max(cache.width, columns.max() + 1)
    first = np.zeros(cache.num_rows, int)  # of each row, the first column that is fed
    first[rows] = starts
    packed_rows = np.repeat(rows, counts)
    first, packed_rows, slots, columns, ids = (
        torch.as_tensor(x, device=device)
        for x in (first, packed_rows, slots, columns, np.concatenate(ids)))
    cache.place(packed_rows, columns, width)
    latest = first[:, None] + torch.arange(max(counts), device=device)  # [R, T]
    mask = torch.arange(width, device=device) <= latest[:, None, :, None]
    return body(input_ids=ids[None], position_ids=columns[None], use_cache=True,
                attention_mask=mask,  # [R, 1, T, S]
                places=(packed_rows, slots), cache=cache).last_hidden_state[0]


def middle_layer(body):
    """The layer halfway up a transformer."""
    num = body.config.num_hidden_layers
    layers = next(module for module in body.modules()
                  if isinstance(module, torch.nn.ModuleList) and len(module) == num)
    return layers[num // 2]


@contextmanager
def watching(layer):
    """A list that gets what the layer computes in each forward pass, hidden states [N, W]."""
    seen = []

    def note(layer, inputs, output):
        seen.append((output[0] if isinstance(output, tuple) else output)[0])
    hook = layer.register_forward_hook(note)
    try:
        yield seen
    finally:
        hook.remove()


def mean_of_read(states, nodes, ends):
    """Of states [N, W] of tokens that were fed, the mean over what each node read, from
    `first_read` to where it ends in them -> float32 [nodes, W]"""
    means = []
    for node, end in zip(nodes, ends):
        means.append(states[end - len(node.ids) + node.first_read:end].mean(0))
    return torch.stack(means).float().cpu().numpy()


def cached_above(node):
    """The nearest node on the way up whose path is in a cache, or None."""
    while node is not None and node.cache is None:
        node = node.above
    return node


def move(rollouts):
    """Copy the paths of these rollouts into a cache of their own, row by row: what they added to
    their trees lies there from now on, so that no copy outlives its use. -> the cache"""
    moved = RaggedCache.fork([rollout.fed for rollout in rollouts])
    for row, rollout in enumerate(rollouts):
        node, rollout.row = rollout.fed, row
        old = node.cache[0]
        while node is not rollout.anchor and node.cache and node.cache[0] is old:
            node.cache = moved, row
            node = node.parent
    return moved


def held_tokens(roots):
    """Cache columns that the trees of these roots hold on to."""
    caches = set()
    for root in roots:
        caches.update(node.cache[0] for node in nodes(root) if node.cache)
    return sum(cache.num_columns() for cache in caches)


def forget_caches(roots):
    """Free the caches of trees from which nothing grows soon. A tree is a cycle of references:
    left to Python's garbage collection, its caches would outlive it for long."""
    for root in roots:
        for node in nodes(root):
            node.cache = None


def forget_paths(rollouts):
    """Free the caches of what these rollouts have added to their trees."""
    for rollout in rollouts:
        node = rollout.node
        while node is not rollout.anchor:
            node.cache = None
            node = node.parent
