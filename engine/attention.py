"""Tokens of many paths in one sequence [1, N]: no padding, and in the update nothing twice.

`pack` lays the turns of a forest end to end, behind the preamble that all prompts share. Positions
count along each path, and attention is limited to it: a span of turns asks the keys and values of
its own path, gathered turn by turn. So what paths share is computed once, nothing is computed to be
masked away, and no mask of N x N is made. In sampling the tokens of all rows stand end to end too;
there only the attention pads. Transformers lets a model be loaded with an attention of one's own:
"packed".
"""
import sys
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from tree import full_path

torch.backends.cuda.enable_cudnn_sdp(False)  # slow where every call has another length
GROUPED = {"cpu"}  # where SDPA takes fewer key-value heads than heads also with a mask: on CUDA
                   # that is slow, and transformers copies the heads there


@dataclass
class Span:
    """Turns that stand end to end, each the parent of the next."""
    line: list           # numbers of all turns on the path to its end
    num_tokens: int = 0  # of its own


class Pack(NamedTuple):
    """T tokens of turns that stand end to end, and where n of them are predicted."""
    ids: np.ndarray        # int64 [T]
    positions: np.ndarray  # int64 [T] along each token's own path
    sizes: list            # tokens of each turn
    spans: list            # [Span]
    columns: list          # [n] the token in front of each one to score: it predicts it
    targets: np.ndarray    # int64 [n] the tokens to score


def pack(nodes, scored):
    """`nodes`: a part of a forest, everything behind what stands above it. `scored`: those of
    them whose sampled tokens are scored, in order."""
    number = {node: i for i, node in enumerate(nodes)}
    sizes = [len(node.ids) for node in nodes]
    begins = np.cumsum([0, *sizes])
    spans, before = [], None
    for node in nodes:
        if before is None or node.above is not before:
            spans.append(Span([number[part] for part in full_path(node)[:-1]]))
        spans[-1].line.append(number[node])
        spans[-1].num_tokens += len(node.ids)
        before = node
    columns = []
    for node in scored:
        columns.append(begins[number[node.parent] + 1] - 1)  # the last token before the turn
        begin = begins[number[node]]
        columns.extend(range(begin, begin + node.num_sampled - 1))
    ids = np.concatenate([node.ids for node in nodes])
    positions = np.concatenate([np.arange(node.length - len(node.ids), node.length)
                                for node in nodes])
    targets = np.concatenate([node.ids[:node.num_sampled] for node in scored])
    return Pack(ids.astype(np.int64), positions, sizes, spans, columns, targets.astype(np.int64))


def packed_attention(module, query, key, value, mask, tree=None, places=None, **kwargs):
    """The attention of N packed tokens, query [1, heads, N, size]: over the Pack `tree`, over
    the rows of a cache at `places`, or plain without these two."""
    if places is not None:
        return attend_cache(module, query, key, value, mask, places, **kwargs), None
    if tree is not None:
        return attend_tree(module, query, key, value, tree, **kwargs), None
    return attend(module, query, key, value, mask, **kwargs)


def attend_cache(module, query, key, value, mask, places, **kwargs):
    """places = (rows [N], slots [N]): token n is the slots[n]-th of those that see row rows[n] of
    a cache, keys [R, heads, S, size], as far as the mask [R, 1, T, S] and the window say."""
    _, heads, _, size = query.shape
    if (window := kwargs.get("sliding_window")) and window < mask.shape[-1]:
        oldest = mask.sum(-1, keepdim=True) - window  # [R, 1, T, 1]
        mask = mask & (torch.arange(mask.shape[-1], device=mask.device) >= oldest)
    padded = query.new_zeros(len(mask), mask.shape[2], heads, size)  # [R, T, heads, size]
    padded[places] = query[0].transpose(0, 1)
    found, _ = attend(module, padded.transpose(1, 2), key, value, mask, **kwargs)
    return found[places][None]


def attend_tree(module, query, key, value, tree, **kwargs):
    """Each span sees the turns on its path, up to each of its own tokens, or the last of them where
    the layer has a sliding window."""
    keys, values, found = key.split(tree.sizes, 2), value.split(tree.sizes, 2), []
    window = kwargs.get("sliding_window") or sum(tree.sizes)
    parts = query.split([span.num_tokens for span in tree.spans], 2)
    for part, span in zip(parts, tree.spans):
        path_keys = torch.cat([keys[i] for i in span.line], 2)
        path_values = torch.cat([values[i] for i in span.line], 2)
        T, S = part.shape[2], path_keys.shape[2]
        mask = lower_right(part, path_keys, window) if S > min(T, window) else None
        found.append(attend(module, part, path_keys, path_values, mask, **kwargs)[0])
    return torch.cat(found, 1)  # [1, N, heads, size]


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


def lower_right(query, key, window=2 ** 31):
    """The mask [1, 1, T, S] of the last T of S tokens: each sees `window` tokens, up to itself."""
    T, S = query.shape[2], key.shape[2]
    seen = torch.ones(1, 1, T, S, dtype=torch.bool, device=key.device).tril(S - T)
    return seen.triu(S - T - window + 1)


AttentionInterface.register("packed", packed_attention)
AttentionMaskInterface.register("packed", sdpa_mask)  # for a plain batch with its padding
