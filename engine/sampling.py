"""What sampling stands on: a cache of ragged paths, keyed random numbers, the distribution.

Shapes: R rows (live episodes), S columns, V vocabulary.
"""
import hashlib

import numpy as np
import torch
from transformers import Cache


class RaggedCache(Cache):
    """Keys and values of R paths of different lengths, each contiguous from column 0.

    keys[layer], values[layer]: [R, key-value heads, capacity, head size]. `place` says where
    the tokens of the next forward pass go; what lies behind a row's own length is garbage
    that the mask hides and the next token overwrites."""

    def __init__(self, keys=(), values=()):
        super().__init__(layers=[])
        self.keys, self.values, self.width = list(keys), list(values), 0

    def place(self, rows, columns, num_rows, width):
        self.rows, self.columns = rows, columns  # [N], [N]
        self.num_rows, self.width = num_rows, int(width)

    def update(self, keys, values, layer_idx, *args, **kwargs):
        """Store [1, heads, N, size] at the places; -> all rows and all columns in use."""
        for store, new in ((self.keys, keys[0]), (self.values, values[0])):
            if len(store) == layer_idx:
                store.append(new.new_zeros(self.num_rows, len(new), 0, new.shape[2]))
            kept = store[layer_idx]
            if kept.shape[2] < self.width:  # room for 64 more columns at a time
                room = (self.width + 63) // 64 * 64 - kept.shape[2]
                kept = torch.cat([kept, kept.new_zeros(*kept.shape[:2], room, kept.shape[3])], 2)
                store[layer_idx] = kept
            kept[self.rows, :, self.columns] = new.transpose(0, 1)  # [N, heads, size]
        return (self.keys[layer_idx][:, :, :self.width], self.values[layer_idx][:, :, :self.width])

    def get_seq_length(self, layer_idx=0):
        return self.width

    @staticmethod
    def fork(sources, lengths):
        """A new cache whose row i copies `sources[i] = (cache, row)`, of which the first
        lengths[i] columns count."""
        width = max(lengths)
        forked = RaggedCache()
        forked.width = width
        by_cache = {}
        for i, (cache, row) in enumerate(sources):
            by_cache.setdefault(cache, []).append((i, row))
        for layer in range(len(sources[0][0].keys)):
            for name in ("keys", "values"):
                like = getattr(sources[0][0], name)[layer]
                room = (width + 63) // 64 * 64
                new = like.new_zeros(len(sources), like.shape[1], room, like.shape[3])
                for cache, pairs in by_cache.items():
                    into, rows = (torch.tensor(x, device=like.device) for x in zip(*pairs))
                    columns = min(width, cache.width)
                    new[into, :, :columns] = getattr(cache, name)[layer][rows, :, :columns]
                getattr(forked, name).append(new)
        return forked


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


def draw(logits, uniforms, temperature):
    """Inverse-CDF sampling. logits [R, V], uniforms [R] -> (ids [R], log-probs [R]) under the
    distribution really sampled from; temperature 0 is greedy (log-probs at temperature 1)."""
    logprobs = torch.log_softmax(logits.float() / (temperature or 1.0), -1)
    if temperature == 0:
        ids = logprobs.argmax(-1)
    else:
        cdf = logprobs.double().exp().cumsum(-1)
        ids = torch.searchsorted(cdf, (uniforms * cdf[:, -1])[:, None], right=True)[:, 0]
        ids = ids.clamp(max=logits.shape[-1] - 1)
    return ids, logprobs.gather(-1, ids[:, None])[:, 0]
