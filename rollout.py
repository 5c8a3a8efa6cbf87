"""Tree rollouts: start any number of episodes at any anchor and play them to their ends.

Both stages of TRACE are one operation, `grow(anchors, counts)`: an anchor is a prompt or a
prefix, and all rollouts are carried on together, turn by turn. A row of the cache holds the
tokens of one path at columns 0, 1, 2, ..., so that forking a path at any earlier turn is to
copy a row and to forget its later columns: nothing is computed twice.

Shapes: R rows (live episodes), T tokens fed at once, S columns, W width, V vocabulary.
"""
import warnings

import numpy as np
import torch

from engine.sampling import RaggedCache, draw, keyed_uniforms, rollout_key
from react_env import action_end, observation_text, split_completion
from tree import Node, leaves, nodes, path, path_ids

MOST_TOKENS = 4096  # of a turn: more would repeat the random numbers of the next one


def prefill(policy, anchors):
    """Compute cache and hidden state of anchors that have none (all roots of the pool). Caches
    beyond `cache_tokens` are not kept: an anchor is fed again if something grows from it."""
    def work(chunk):
        fill(policy, chunk)
        if held_tokens(anchors) > policy.cache_tokens:
            forget_caches(chunk)
        return []
    with policy.sampling():
        in_chunks(policy, [a for a in anchors if a.cache is None], anchors, work)


def fill(policy, anchors):
    """Feed whole paths, some at a time: a layer's activations of many long ones are large."""
    longest = max((anchor.length for anchor in anchors), default=1)
    size = max(1, 4 * policy.config.micro_batch_tokens // longest)
    for i in range(0, len(anchors), size):
        some = anchors[i:i + size]
        feed(policy, RaggedCache(), some, [path_ids(a)[:policy.context] for a in some],
             [0] * len(some))


def held_tokens(roots):
    """Cache columns that the trees of these roots hold on to."""
    caches = {node.cache[0] for root in roots for node in nodes(root) if node.cache}
    return sum(cache.keys[0].shape[0] * cache.keys[0].shape[2] for cache in caches)


def forget_caches(roots):
    """Free the memory of trees from which nothing grows any more. A tree is a cycle of
    references: left to Python's garbage collection, its caches would outlive it for long."""
    for root in roots:
        for node in nodes(root):
            node.cache = None


def in_chunks(policy, jobs, roots, work):
    """All that `work(chunk)` returns, over chunks whose caches hold at most `cache_tokens`
    columns. Out of GPU memory, the chunk starts again, all trees without their caches: what is
    needed of them is computed again. If that does not help, at half the size. One job that does
    not fit is an error."""
    def split(jobs):
        size = max(1, policy.cache_tokens // policy.context)
        return [jobs[i:i + size] for i in range(0, len(jobs), size)]
    pending, found, failed = split(jobs), [], None
    while pending:
        try:
            found += work(pending[0])
            del pending[0]
            continue
        except torch.cuda.OutOfMemoryError:
            if failed is pending[0] and len(failed) == 1:
                raise
        # here, since the error held the frames, and they the tensors, of what did not fit
        forget_caches(roots)
        torch.cuda.empty_cache()
        if failed is not pending[0]:
            failed = pending[0]
            continue
        if policy.cache_tokens == policy.planned_tokens:
            warnings.warn("out of GPU memory: halving the number of live episodes")
        policy.cache_tokens = len(failed) // 2 * policy.context
        pending = split([job for chunk in pending for job in chunk])
    return found


def feed(policy, cache, row_nodes, ids, starts):
    """Feed ragged lists of ids, row r from column starts[r] on; sets hidden and cache of
    row_nodes[r]. Rows without ids are idle. -> hidden states at the last ids of the others."""
    ends = np.cumsum([len(row_ids) for row_ids in ids if len(row_ids)])
    hidden = policy.forward(ids, starts, cache)[ends - 1]
    fed = [row for row, row_ids in enumerate(ids) if len(row_ids)]
    for row, values in zip(fed, hidden.float().cpu().numpy()):
        row_nodes[row].hidden, row_nodes[row].cache = values, (cache, row)
    return hidden


def grow(policy, env, anchors, counts, key=(), temperature=None):
    """Start counts[i] rollouts at anchors[i] and play all to their ends -> new leaves.

    `key` = (seed, step): with question and sample number it fixes every random number, so
    that episodes do not depend on how the work is split. Nodes keep their ids and log-probs,
    and where the episode goes on, also the hidden state and the place in the cache (those of
    a chunk are not kept if the trees then hold more than `cache_tokens` columns)."""
    jobs, numbers, grown, roots = [], {}, [], {path(anchor)[0]: None for anchor in anchors}
    for anchor, count in zip(anchors, counts):
        root = path(anchor)[0]
        for _ in range(count):
            if root not in numbers:
                numbers[root] = root.sample + len(leaves(root))
            number, numbers[root] = numbers[root], numbers[root] + 1
            if anchor.length + policy.config.turn_tokens > policy.context:  # no room for a turn
                none = np.zeros(0, np.int32)
                grown.append(Node(none, 0, anchor.state, anchor, none, number, overflowed=True))
            else:
                jobs.append((anchor, number, rollout_key(
                    *key, anchor.state.question.id, number)))

    def work(chunk):
        before = {anchor: len(anchor.children) for anchor, _, _ in chunk}
        fresh = [anchor for anchor in before if anchor.cache is None]
        try:
            fill(policy, fresh)
            found = grow_chunk(policy, env, chunk, temperature)
        except torch.cuda.OutOfMemoryError:
            for anchor, count in before.items():  # forget what was half done
                del anchor.children[count:]
            raise
        if held_tokens(roots) > policy.cache_tokens:
            forget_caches(child for anchor in before for child in anchor.children[before[anchor]:])
            for anchor in fresh:
                anchor.cache = None
        return found
    with policy.sampling():
        return grown + in_chunks(policy, jobs, roots, work)


def grow_chunk(policy, env, jobs, temperature):
    """Play the rollouts of one chunk, [(anchor, number in its tree, key)] -> leaves."""
    temperature = policy.config.temperature if temperature is None else temperature
    row_nodes = [anchor for anchor, _, _ in jobs]
    numbers = [number for _, number, _ in jobs]
    keys = np.array([key for _, _, key in jobs], np.uint64)
    cache = RaggedCache.fork([n.cache for n in row_nodes], [n.length for n in row_nodes])
    hidden = torch.tensor(np.stack([n.hidden for n in row_nodes]), device=policy.device)
    grown = []
    while True:
        live = [r for r, node in enumerate(row_nodes) if not node.is_leaf]
        turns = sample_turn(policy, cache, row_nodes, live, hidden, keys, temperature)
        texts = [policy.text(ids) for ids, _ in turns]
        states = env.step_batch([row_nodes[r].state for r in live],
                                [split_completion(texts[r])[1] for r in live])
        ids, starts = [[]] * len(jobs), [n.length for n in row_nodes]
        for r, state in zip(live, states):
            action, logprobs = turns[r]
            observation, cut = observation_ids(policy, state, texts[r])
            room = policy.context - row_nodes[r].length
            overflowed = len(action) + len(observation) + policy.config.turn_tokens > room
            overflowed = overflowed and not state.done
            if state.done or overflowed:
                observation, cut = [], False
            parent = row_nodes[r]
            row_nodes[r] = node = Node(
                np.array(action + observation, np.int32), len(action), state, parent,
                np.array(logprobs, np.float32), numbers[r], cut_observation=cut,
                overflowed=overflowed)
            if node.is_leaf:
                grown.append(node)
            else:  # the last action token has not been fed yet
                ids[r] = action[-1:] + observation
                starts[r] = parent.length + len(action) - len(action[-1:])
        staying = [r for r, node in enumerate(row_nodes) if not node.is_leaf]
        if not staying:
            return grown
        hidden = feed(policy, cache, row_nodes, ids, starts)
        if len(staying) <= 0.7 * len(jobs):  # finished episodes leave
            if ends := [n.parent for n in row_nodes if n.is_leaf and n.parent.cache[0] is cache]:
                move(ends)
            jobs = [jobs[r] for r in staying]
            row_nodes = [row_nodes[r] for r in staying]
            numbers, keys = [numbers[r] for r in staying], keys[staying]
            cache = move(row_nodes)


def move(row_nodes):
    """Copy the rows in which these nodes end to a cache of their own; -> the cache. All nodes
    that lay in those rows then refer to it: no copy of a path outlives its use."""
    moved = RaggedCache.fork([n.cache for n in row_nodes], [n.length for n in row_nodes])
    for row, node in enumerate(row_nodes):
        old = node.cache[0]
        while node is not None and node.cache and node.cache[0] is old:
            node.cache, node = (moved, row), node.parent
    return moved


def observation_ids(policy, state, text):
    """Ids of an observation, cut at `observation_tokens`; -> (ids, was it cut)."""
    observation = observation_text(state.observation)
    head, tail = observation.rsplit("\n", 1)
    if text.endswith("\n"):  # the last token of the action already broke the line
        head = head.lstrip("\n")
    ids, tail = policy.encode(head), policy.encode("\n" + tail)
    cut = len(ids) > policy.config.observation_tokens
    return ids[:policy.config.observation_tokens] + tail, cut


def sample_turn(policy, cache, row_nodes, live, hidden, keys, temperature):
    """One action for every live row, whose hidden states are given -> [(ids, log-probs)] of all
    rows, both empty for the others."""
    lengths = np.array([n.length for n in row_nodes])
    depths = np.array([n.depth for n in row_nodes])
    turns = [([], []) for _ in row_nodes]
    for t in range(policy.config.turn_tokens):
        uniforms = keyed_uniforms(keys[live], depths[live] * MOST_TOKENS + t)
        drawn = draw(policy.logits(hidden), torch.tensor(uniforms, device=policy.device),
                     temperature)
        ids, going_on = [[]] * len(row_nodes), []
        for r, token, logprob in zip(live, *(x.tolist() for x in drawn)):
            turns[r][0].append(token)
            turns[r][1].append(logprob)
            if not (policy.may_end[token] and ended(policy, turns[r])):
                ids[r] = [token]
                going_on.append(r)
        live = going_on
        if not live or t + 1 == policy.config.turn_tokens:
            return turns
        hidden = policy.forward(ids, lengths + t, cache)


def ended(policy, turn):
    """Has this turn ended? Drops, in place, the tokens behind the end of its action."""
    ids, logprobs = turn
    if ids[-1] in policy.end_ids:
        return True
    end = action_end(policy.text(ids))
    if end is None:
        return False
    while ids and len(policy.text(ids[:-1])) >= end:
        del ids[-1], logprobs[-1]
    return True
