"""Tokens of many paths in one sequence [1, N]: no padding, and in the update nothing twice.

`pack` lays the turns of a forest end to end. Positions count along each path, and attention is
limited to it: every run of turns asks the keys and values of its own path, gathered turn by
turn. So what paths share is computed once, nothing is computed to be masked away, and no mask
of N x N is made. In sampling, too, the tokens of all rows stand end to end; there only the
attention pads. Transformers lets a model be loaded with an attention of one's own: "packed".
"""
import sys
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from tree import path

GROUPED = {"cpu"}  # where SDPA takes fewer key-value heads than heads also with a mask: on CUDA
                   # that is slow, and transformers copies the heads there


class Pack(NamedTuple):
    """T tokens of turns that stand end to end, and where n of them are predicted."""
    ids: np.ndarray        # int64 [T]
    positions: np.ndarray  # int64 [T], along each token's own path
    tree: tuple            # for packed_attention
    columns: list          # [n] the token in front of each one to score: it predicts it
    targets: np.ndarray    # int64 [n] the tokens to score


def pack(rows):
    """rows: [(nodes, owned)] -> Pack. `nodes` holds every parent before its children: a path,
    or any part of a forest; rows know nothing of each other. `owned` are the nodes whose
    sampled tokens are scored, in order."""
    packed, begins, spans, columns = [], [0], [], []
    for nodes, owned in rows:
        number, before = {}, None
        for node in nodes:
            if before is None or node.parent is not before:
                spans.append([0, [number[n] for n in path(node.parent)]])
            number[node], before = len(packed), node
            spans[-1][0] += len(node.ids)
            spans[-1][1].append(number[node])
            packed.append(node)
            begins.append(begins[-1] + len(node.ids))
        for node in owned:
            above, begin = begins[number[node.parent] + 1] - 1, begins[number[node]]
            columns += [above, *range(begin, begin + len(node.ids))][:node.num_sampled]
    positions = [np.arange(n.length - len(n.ids), n.length) for n in packed]
    targets = [n.ids[:n.num_sampled] for _, owned in rows for n in owned]
    ids, positions, targets = (np.concatenate(parts).astype(np.int64) for parts in (
        [n.ids for n in packed], positions, targets))
    return Pack(ids, positions, (np.diff(begins).tolist(), spans), columns, targets)


def packed_attention(module, query, key, value, mask, tree=None, places=None, **kwargs):
    """The attention of N packed tokens, query [1, heads, N, size]; plain without these two:

    tree = (sizes, spans): the tokens of each node, and for each run of nodes in which one is the
    parent of the next, its tokens and the numbers of all nodes on the path to its end. They see
    that path up to themselves.
    places = (rows [N], slots [N]): token n is the slots[n]-th of those that see row rows[n] of a
    cache, keys [R, heads, S, size], as far as the mask [R, 1, T, S] says."""
    if places is not None:
        # [R, T, heads, size]
        padded = query.new_zeros(len(mask), mask.shape[2], *query.shape[1::2])
        padded[places] = query[0].transpose(0, 1)
        found = attend(module, padded.transpose(1, 2), key, value, mask, **kwargs)[0]
        return found[places][None], None
    if tree is None:
        return attend(module, query, key, value, mask, **kwargs)
    sizes, spans = tree
    keys, values, found = key.split(sizes, 2), value.split(sizes, 2), []
    for part, (_, line) in zip(query.split([size for size, _ in spans], 2), spans):
        k, v = (torch.cat([x[i] for i in line], 2) for x in (keys, values))
        mask = lower_right(part, k) if k.shape[2] > part.shape[2] else None
        found.append(attend(module, part, k, v, mask, **kwargs)[0])  # [1, tokens, heads, size]
    return torch.cat(found, 1), None


def attend(module, query, key, value, mask, softcap=None, **kwargs):
    """SDPA; or the model's own attention where it caps its logits (Gemma 2): SDPA cannot."""
    if softcap is not None:
        mask = lower_right(query, key) if mask is None else mask
        added = query.new_zeros(mask.shape).masked_fill(~mask, torch.finfo(query.dtype).min)
        return sys.modules[type(module).__module__].eager_attention_forward(
            module, query, key, value, added, softcap=softcap, **kwargs)
    if query.device.type in GROUPED:
        causal = mask is None and query.shape[2] > 1
        found = scaled_dot_product_attention(query, key, value, mask, is_causal=causal,
                                             enable_gqa=True, scale=kwargs.get("scaling"))
        return found.transpose(1, 2), None
    return sdpa_attention_forward(module, query, key, value, mask, **kwargs)


def lower_right(query, key):
    """The mask [1, 1, T, S] of the last T of S tokens, each of which sees up to itself."""
    T, S = query.shape[2], key.shape[2]
    return torch.ones(1, 1, T, S, dtype=torch.bool, device=key.device).tril(S - T)


AttentionInterface.register("packed", packed_attention)
AttentionMaskInterface.register("packed", sdpa_mask)  # for a plain batch with its padding
