"""Tree rollouts: start any number of episodes at any anchor and play them to their ends.

Both stages of TRACE are one operation, `grow(anchors, counts)`: an anchor is a prompt or a
prefix, and all rollouts are carried on together, turn by turn. A row of the cache holds the
tokens of one path at columns 0, 1, 2, ..., so that forking a path at any earlier turn is to
copy a row and to forget its later columns: while caches fit, nothing is computed twice.
"""
from dataclasses import dataclass, field

import numpy as np
import torch

from engine.caches import (cached_above, forget_caches, forget_paths, held_tokens,
                           mean_of_read, move, watching)
from engine.memory import halving
from engine.processes import team
from engine.sampling import RaggedCache, keyed_uniforms, rollout_key, sample_tokens
from react_env import action_end, observation_text, split_completion
from tree import Node, leaves, path, path_ids

MOST_TOKENS = 4096  # of a turn: more would repeat the random numbers of the next one
MOST_ROWS = 256     # of a cache: the logits of more would be large
MOST_LIVE = 0.7     # a cache is made smaller when at most this share of its rows is played


@dataclass(slots=True)
class Rollout:
    """One episode that is being played."""
    anchor: Node  # where it starts
    node: Node    # where it stands
    sample: int   # its number in the tree
    key: int      # of its random numbers
    row: int = 0  # of the cache
    ids: list = field(default_factory=list)       # sampled in the present turn
    logprobs: list = field(default_factory=list)  # ... and their log-probs

    @property
    def fed(self):
        """The last node that the policy has been fed, or will be."""
        return self.node.parent if self.node.is_leaf else self.node


def grow(policy, env, anchors, counts, key=(), greedy=False, keep=False, progress=None):
    """Start counts[i] rollouts at anchors[i] and play all to their ends -> their leaves, anchor
    by anchor.

    `key` = (seed, step): with question and sample number it fixes every random number, so that
    episodes do not depend on how the work is split. With `keep` the trees keep their caches, as
    far as there is room, for rollouts that start at their turns later. `progress(n)` is told of
    every n episodes that have ended."""
    num_children = {anchor: len(anchor.children) for anchor in anchors}
    crew = team()
    roots = crew.deal(anchors, counts)

    def work():
        rollouts = start(policy, anchors, counts, key)
        play(policy, env, crew.own(rollouts), greedy, roots if keep else (), progress)
        return rollouts

    def undo():
        forget_caches(roots)  # before the new nodes are cut off, which then still hold each other
        for anchor, count in num_children.items():
            del anchor.children[count:]

    with policy.sampling():
        rollouts = halving(policy, "cache_tokens", policy.context, work, undo)
    crew.exchange(roots, rollouts)
    for root in roots:
        if not keep or all(child.is_leaf for child in root.children):
            forget_caches([root])
    return standing(rollouts)


def start(policy, anchors, counts, key):
    """-> all rollouts, in order. Those for which the context has no room are at their end."""
    rollouts, next_sample = [], {}
    for anchor, count in zip(anchors, counts):
        root = path(anchor)[0]
        if count and root not in next_sample:
            next_sample[root] = root.sample + len(leaves(root))
        for _ in range(count):
            sample, node = next_sample[root], anchor
            next_sample[root] += 1
            if anchor.length + policy.turn_tokens > policy.context:
                none = np.zeros(0, np.int32)
                node = Node(none, 0, anchor.state, anchor, none, sample, overflowed=True)
            number = rollout_key(*key, anchor.state.question.id, sample)
            rollouts.append(Rollout(anchor, node, sample, number))
    return rollouts


def play(policy, env, rollouts, greedy, kept, progress):
    """Play rollouts to their ends, each turn of all live ones at once. As many are live as the
    cache has room for. When one ends, the next one starts at the following turn. The trees of the
    roots `kept` keep the caches of what has ended."""
    waiting, live, finished, cache = unfinished(rollouts), [], [], None
    while live or waiting:
        size = num_that_fit(policy, standing(live + waiting))
        if size != len(live) or len(live) <= MOST_LIVE * cache.num_rows:
            put_away(policy, finished, live, kept)
            finished = []
            cache, live, waiting = seat(policy, live, waiting, size)
        sample_turn(policy, cache, live, greedy)
        for rollout in live:
            text = policy.text(rollout.ids)
            action = split_completion(text)[1]
            end_turn(policy, rollout, text, env.step(rollout.node.state, action))
        done = [rollout for rollout in live if rollout.node.is_leaf]
        live, finished = unfinished(live), finished + done
        if progress:
            progress(len(done))
        if live:
            feed(policy, cache, live)
    put_away(policy, finished, live, kept)


def num_that_fit(policy, nodes):
    """How many of the paths to these nodes the cache holds, side by side, with room for a turn of
    each; at least one."""
    room, longest = policy.turn_tokens + policy.observation_tokens, 0
    for i, node in enumerate(nodes):
        longest = max(longest, min(node.length + room, policy.context))
        if i and (i == MOST_ROWS or (i + 1) * longest > policy.cache_tokens):
            return i
    return len(nodes)


def seat(policy, live, waiting, size):
    """Give the first `size` of all a cache together. The others wait; what a live one that must
    wait has added is fed again later. -> (cache, live, waiting)"""
    forget_paths(live[size:])
    live, waiting = (live + waiting)[:size], (live + waiting)[size:]
    fill(policy, [node for node in dict.fromkeys(standing(live)) if node.cache is None])
    cache, awaited = move(live), set(standing(waiting))
    for rollout in live:
        if rollout.anchor not in awaited:  # nothing starts there any more
            rollout.anchor.cache = None
    return cache, live, waiting


def put_away(policy, finished, live, kept):
    """Move finished rollouts out of the live cache; forget their caches where there is no room."""
    added = [rollout for rollout in finished if rollout.fed is not rollout.anchor]
    if kept and live and added:
        move(added)
    used = live[0].node.cache[0].num_columns() if live else 0
    if not kept or held_tokens(kept) - used > policy.cache_tokens:
        forget_paths(added)


def unfinished(rollouts):
    return [rollout for rollout in rollouts if not rollout.node.is_leaf]


def standing(rollouts):
    """The nodes where they stand."""
    return [rollout.node for rollout in rollouts]


def sample_turn(policy, cache, rollouts, greedy):
    """Sample a turn of each rollout, token by token."""
    live, hidden = rollouts, np.stack([rollout.node.hidden for rollout in rollouts])
    hidden = torch.tensor(hidden, device=policy.device)
    for rollout in rollouts:
        rollout.ids, rollout.logprobs = [], []
    for t in range(policy.turn_tokens):
        keys = np.array([rollout.key for rollout in live], np.uint64)
        depths = np.array([rollout.node.depth for rollout in live])
        uniforms = keyed_uniforms(keys, depths * MOST_TOKENS + t)
        tokens, logprobs = sample_tokens(
            policy.logits(hidden), torch.tensor(uniforms, device=policy.device), greedy)
        going_on = []
        for rollout, token, logprob in zip(live, tokens.tolist(), logprobs.tolist()):
            rollout.ids.append(token)
            rollout.logprobs.append(logprob)
            if not ended(policy, rollout):
                going_on.append(rollout)
        live = going_on
        if not live or t + 1 == policy.turn_tokens:
            return
        ids, rows, starts = [], [], []
        for rollout in live:
            ids.append(rollout.ids[-1:])
            rows.append(rollout.row)
            starts.append(rollout.node.length + t)
        hidden = policy.forward(ids, rows, starts, cache)


def ended(policy, rollout):
    """Has this turn ended? Drops the tokens behind the end of its action."""
    ids = rollout.ids
    if not policy.may_end[ids[-1]]:
        return False
    if ids[-1] in policy.end_ids:
        return True
    end = action_end(policy.text(ids))
    if end is None:
        return False
    while ids and len(policy.text(ids[:-1])) >= end:
        del ids[-1], rollout.logprobs[-1]
    return True


def end_turn(policy, rollout, text, state):
    """The rollout stands at the node of the turn that it has sampled."""
    above, written = rollout.node, rollout.ids  # the thought and the action
    observation, cut = observation_ids(policy, state, text)
    length = above.length + len(written) + len(observation)
    overflowed = not state.done and length + policy.turn_tokens > policy.context
    if state.done or overflowed:  # nobody will read it
        observation, cut = [], False
    rollout.node = Node(
        np.array(written + observation, np.int32), len(written), state, above,
        np.array(rollout.logprobs, np.float32), rollout.sample, cut_observation=cut,
        overflowed=overflowed)


def observation_ids(policy, state, text):
    """Ids of an observation, cut at `observation_tokens`; -> (ids, was it cut)."""
    observation = observation_text(state.observation)
    head, tail = observation.rsplit("\n", 1)
    if text.endswith("\n"):  # the last token of the action already broke the line
        head = head.lstrip("\n")
    ids = policy.encode(head)
    cut = len(ids) > policy.observation_tokens
    return ids[:policy.observation_tokens] + policy.encode("\n" + tail), cut


# ---------------------------------------------------------------- feeding
def feed(policy, cache, rollouts):
    """Feed what of each rollout's last turn is not in the cache yet: its last sampled token and
    the observation."""
    ids, starts, rows = [], [], []
    for rollout in rollouts:
        node = rollout.node
        ids.append(node.ids[node.first_read:])
        starts.append(node.parent.length + node.first_read)
        rows.append(rollout.row)
    remember(policy, cache, standing(rollouts), ids, starts, rows)


def fill(policy, nodes):
    """Feed the paths to these nodes, each from the nearest node above that is in a cache, some
    at a time: a layer's activations of many long ones are large."""
    preamble = policy.preamble
    if preamble and nodes and preamble.cache is None and nodes != [preamble]:
        fill(policy, [preamble])
    known, ids, starts = list(map(cached_above, nodes)), [], []
    for node, above in zip(nodes, known):
        starts.append(above.length if above else 0)
        ids.append(path_ids(node)[starts[-1]:])
    longest = max(map(len, ids), default=1)
    size = max(1, 4 * policy.micro_batch_tokens // longest)  # no gradients: four times
    for i in range(0, len(nodes), size):
        some = slice(i, i + size)
        remember(policy, RaggedCache.fork(known[some]), nodes[some], ids[some], starts[some],
                 list(range(len(nodes[some]))))


def remember(policy, cache, fed, ids, starts, rows):
    """Feed ids[i] to row rows[i], from column starts[i] on; the nodes `fed` keep what the predictor
    reads, and their place in the cache."""
    ends = np.cumsum(list(map(len, ids)))
    with watching(policy.middle) as seen:
        hidden = policy.forward(ids, rows, starts, cache)[ends - 1]
    hidden, middle = hidden.float().cpu().numpy(), mean_of_read(seen[0], fed, ends)
    for i, node in enumerate(fed):
        node.hidden, node.middle, node.cache = hidden[i], middle[i], (cache, rows[i])


def prefill(policy, roots):
    """Compute cache and hidden state of roots that have none: the whole pool of a step. Caches
    beyond `cache_tokens` are not kept: a root is fed again if something grows from it."""
    def work():
        waiting = [root for root in team().part(roots) if root.hidden is None]
        while waiting:
            size = num_that_fit(policy, waiting)
            some, waiting = waiting[:size], waiting[size:]
            fill(policy, some)
            if held_tokens(roots) > policy.cache_tokens:
                forget_caches(some)

    with policy.sampling():
        halving(policy, "cache_tokens", policy.context, work, lambda: forget_caches(roots))
    team().exchange_states(roots)
