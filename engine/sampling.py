"""What sampling stands on: a cache of ragged paths, keyed random numbers, the distribution.

Shapes: R rows (paths), S columns, V vocabulary.
"""
import hashlib
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from transformers import Cache

WORD = 64  # columns of room that are added at a time


class RaggedCache(Cache):
    """Keys and values of R paths of different lengths, each contiguous from column 0.

    keys[layer], values[layer]: [R, key-value heads, capacity, head size]. `place` says where
    the tokens of the next forward pass go. What lies behind a row's own length is garbage that
    the mask hides and that the next token overwrites."""

    def __init__(self, num_rows):
        super().__init__(layers=[])
        self.keys, self.values = [], []
        self.num_rows, self.width = num_rows, 0

    def place(self, rows, columns, width):
        """The next N tokens go to these rows [N] and columns [N]; `width` columns are in use."""
        self.rows, self.columns, self.width = rows, columns, int(width)

    def update(self, keys, values, layer_idx, *args, **kwargs):
        """Store [1, heads, N, size] at the places; -> all rows and all columns in use."""
        for store, new in ((self.keys, keys[0]), (self.values, values[0])):
            if len(store) == layer_idx:
                store.append(new.new_zeros(self.num_rows, len(new), 0, new.shape[2]))
            store[layer_idx] = widened(store[layer_idx], self.width)
            store[layer_idx][self.rows, :, self.columns] = new.transpose(0, 1)  # [N, heads, size]
        return (self.keys[layer_idx][:, :, :self.width], self.values[layer_idx][:, :, :self.width])

    def get_seq_length(self, layer_idx=0):
        return self.width

    def num_columns(self):
        """Columns that this cache holds in memory, of all rows."""
        return self.num_rows * self.keys[0].shape[2]

    @staticmethod
    def fork(standing):
        """A new cache with a copy of the path of each of these nodes, a row for each; the row of a
        None is empty."""
        forked, by_cache = RaggedCache(len(standing)), {}
        for i, node in enumerate(standing):
            if node is not None:
                cache, row = node.cache
                by_cache.setdefault(cache, []).append((i, row))
                forked.width = max(forked.width, node.length)
        if not by_cache:
            return forked
        first = next(iter(by_cache))
        copies = [(cache, *torch.tensor(pairs, device=first.keys[0].device).T)
                  for cache, pairs in by_cache.items()]
        for name, layers in (("keys", first.keys), ("values", first.values)):
            for layer, like in enumerate(layers):
                new = like.new_zeros(len(standing), like.shape[1], 0, like.shape[3])
                new = widened(new, forked.width)
                for cache, into, rows in copies:
                    columns = min(forked.width, cache.width)
                    stored = getattr(cache, name)[layer]
                    new[into, :, :columns] = stored[rows, :, :columns]
                getattr(forked, name).append(new)
        return forked


def widened(stored, width):
    """`stored` [R, heads, capacity, size] with room for `width` columns."""
    missing = width - stored.shape[2]
    if missing <= 0:
        return stored
    room = -(-width // WORD) * WORD - stored.shape[2]
    shape = (*stored.shape[:2], room, stored.shape[3])
    return torch.cat([stored, stored.new_zeros(shape)], 2)


def rollout_key(*parts):
    """64-bit key of one rollout from (seed, step, question id, sample, ...)."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def keyed_uniforms(keys, positions):
    """Uniforms in [0, 1) that depend on (key, position) alone, whatever the batch: the
    counter-based generator splitmix64 (Steele et al. 2014). uint64 [R], int [R] -> float64."""
    with np.errstate(over="ignore"):
        z = keys + (positions.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) * 2.0 ** -53


def sample_tokens(logits, uniforms, greedy=False):
    """Inverse-CDF sampling. logits [R, V], uniforms [R] -> (ids [R], log-probs [R])."""
    logprobs = torch.log_softmax(logits.float(), -1)
    if greedy:
        ids = logprobs.argmax(-1)
    else:
        cdf = logprobs.double().exp().cumsum(-1)
        ids = torch.searchsorted(cdf, (uniforms * cdf[:, -1])[:, None], right=True)[:, 0]
        ids = ids.clamp(max=logits.shape[-1] - 1)
    return ids, logprobs.gather(-1, ids[:, None])[:, 0]


@contextmanager
def sampling_mode(model, layers, dtype):
    """eval() and no gradients, but the 4-bit layers stay in training mode: on some CPUs their
    first forward pass in eval mode repacks the weights for inference, and from then on no
    gradient reaches the layers below. They hold no dropout, so nothing else changes.

    The adapted `layers` compute with matrices W + BA, made once, instead of unpacking W and
    adding BA at every token. They are thrown away: nothing is merged into the 4-bit weights, and
    the update computes through the layers as they are."""
    from peft.utils.integrations import dequantize_module_weight
    model.eval()
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.train()
    with torch.no_grad():
        try:
            for module in layers:
                weight = (dequantize_module_weight(module.base_layer).float()
                          + module.get_delta_weight("default").float())
                module.forward = partial(torch.nn.functional.linear, weight=weight.to(dtype),
                                         bias=module.base_layer.bias)
            yield
        finally:
            for module in layers:
                module.__dict__.pop("forward", None)
