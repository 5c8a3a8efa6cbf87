"""The rollout tree: turns as nodes, paths, targets and credit. Plain data, no torch.

One tree holds all rollouts of one prompt. The root is the prompt. Every other node is one turn:
the ids that the policy sampled, then the ids of the observation. A bare rollout is a chain that
starts at the root. A continuation branches off at a prefix of a bare rollout and shares all that
stands above it, so every token is stored once and trained once. Text that all prompts begin with,
such as the examples, is kept once: the preamble. It stands above every root, in no tree.

Letters as in the paper: V̂(y) is `node.value`, n_y is `node.num_leaves`, Ṽ is `node.predicted`
(allocator.py calls it v).
"""
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

EPSILON = 1e-6  # in divisions by a standard deviation


@dataclass(eq=False, slots=True)
class Node:
    """One turn of an episode; the root (depth 0) holds the prompt."""
    ids: np.ndarray                # int32 [num_tokens]: what the policy wrote, then the observation
    num_sampled: int               # how many of them the policy wrote
    state: Any                     # state of the environment after the turn, immutable
    parent: "Node | None" = None
    logprobs: np.ndarray = None    # float32 [num_sampled], of the distribution sampled from
    sample: int = 0                # number of the rollout in its tree: keys the random numbers
    children: list = field(default_factory=list)
    hidden: np.ndarray = None      # float32 [width] at the last token; None where never fed
    middle: np.ndarray = None      # float32 [width] of a middle layer, mean from `first_read` on
    cache: Any = None              # (cache, row) that holds keys and values of the path
    predicted: float = None        # Ṽ at anchors
    value: float = None            # V̂, set by backup
    num_leaves: int = 0            # n, set by backup
    cut_observation: bool = False  # the observation was longer than allowed
    overflowed: bool = False       # no room for another turn: the episode ends, reward 0
    owner: int = None              # of a root: the process that grows its tree, where many do
    preamble: "Node | None" = None  # of a root: ids in front of all prompts, not in the tree
    depth: int = 0                 # turns from the root
    length: int = 0                # tokens of the path, preamble and this node included

    def __post_init__(self):
        self.length = len(self.ids)
        if self.above is not None:
            self.length += self.above.length
        if self.parent is not None:
            self.depth = self.parent.depth + 1
            self.parent.children.append(self)

    @property
    def above(self):
        """What stands right in front of it: its parent, or the preamble of a root."""
        return self.preamble if self.parent is None else self.parent

    @property
    def first_read(self):
        """Index in `ids` of the first token that was not fed while the turn was sampled: the
        last sampled one. The observation follows it."""
        return max(0, self.num_sampled - 1)

    @property
    def started(self):
        """The first turns of the rollouts that began here: bare ones at a root, else
        continuations. (A rollout that came from above keeps its number.)"""
        found = []
        for child in self.children:
            if not self.depth or child.sample != self.sample:
                found.append(child)
        return found

    @property
    def is_leaf(self):
        """Is this the end of an episode? A root without rollouts is not."""
        return self.depth > 0 and (self.state.done or self.overflowed)

    @property
    def reward(self):
        """Terminal reward of a leaf, 0 or 1."""
        return 0.0 if self.overflowed else float(self.state.reward)


def path(node):
    """Nodes from the root down to `node`, both included."""
    found = []
    while node is not None:
        found.append(node)
        node = node.parent
    return found[::-1]


def full_path(node):
    """The same, behind the preamble where there is one: all that the policy reads."""
    found = path(node)
    return found if found[0].preamble is None else [found[0].preamble, *found]


def path_ids(node):
    """Ids of the full path, int32 [node.length]."""
    return np.concatenate([part.ids for part in full_path(node)])


def nodes(root):
    """All nodes below and including `root`: parents first, children in order of sampling."""
    stack, found = [root], []
    while stack:
        node = stack.pop()
        found.append(node)
        stack.extend(reversed(node.children))
    return found


def leaves(root):
    """The ends of all episodes, in the order of `nodes`."""
    return [node for node in nodes(root) if node.is_leaf]


class Prefix(NamedTuple):
    """A place in a bare rollout from which it may be continued (stage 2)."""
    node: Node
    outcome: float  # r, the reward of the bare rollout


def prefixes(root):
    """Every non-terminal prefix (t >= 1) of every bare rollout of a tree without continuations."""
    found = []
    for leaf in leaves(root):
        for node in path(leaf)[1:-1]:
            found.append(Prefix(node, leaf.reward))
    return found


def sampled_tokens(root):
    """Tokens that the policy sampled for this tree: the unit of cost. What was cut behind an
    action does not count."""
    return sum(node.num_sampled for node in nodes(root))


# ---------------------------------------------------------------- targets
def backup(root):
    """Set value and num_leaves everywhere: V̂(y) = (1/n_y) Σ_c n_c V̂(c), which is the mean
    reward of the leaves under y (step 6 of train_step)."""
    for node in reversed(nodes(root)):
        if node.is_leaf:
            node.value, node.num_leaves = node.reward, 1
        elif node.children:
            total, node.num_leaves = 0.0, 0
            for child in node.children:
                total += child.num_leaves * child.value
                node.num_leaves += child.num_leaves
            node.value = total / node.num_leaves


def all_targets(root):
    """{node: (V̂, n)}: what Ṽ learns, from all leaves below the node, as in the paper."""
    return {y: (y.value, y.num_leaves) for y in nodes(root)}


def fresh_targets(root):
    """{node: (target, leaves behind it)} without the bias of all_targets: stage 2 expands a
    prefix because of its own outcome, so that outcome must not count there.

    Only rollouts that started at the node count: at the root the bare ones, at an expanded
    prefix its continuations. Where none started, it is the outcome of the node's own rollout."""
    reward = {leaf.sample: leaf.reward for leaf in leaves(root)}
    targets = {}
    for y in nodes(root):
        outcomes = [reward[child.sample] for child in y.started] or [reward[y.sample]]
        targets[y] = sum(outcomes) / len(outcomes), len(outcomes)
    return targets


TARGETS = {"all": all_targets, "fresh": fresh_targets}


def has_contrast(root):
    """At least one success and one failure among the leaves (after backup)."""
    return root.num_leaves > 0 and 0.0 < root.value < 1.0


# ---------------------------------------------------------------- credit
# A rule maps a backed-up tree with contrast to {node: advantage} for every node below the root.
# A leaf's reward R reaches a turn through all leaves below it. A turn that several leaves share
# is trained once, with the mean over its leaves. That mean needs only V̂: the mean of
# (R − mean under a) over the leaves of y is V̂(y) − V̂(a).
def grpo(root):
    """(R − mean under root) / std, the same for every turn of a path (Shao et al. 2024)."""
    std = (root.value * (1 - root.value)) ** 0.5  # of rewards that are 0 or 1
    return {y: (y.value - root.value) / (std + EPSILON) for y in nodes(root)[1:]}


def treepo(root):
    """Mean over the ancestors with more than one leaf of (R − mean under the ancestor), scaled
    by the std over all trained tokens of the tree, not centred."""
    credit, tokens = {}, []
    for y in nodes(root)[1:]:
        steps = [y.value - a.value for a in path(y)[:-1] if a.num_leaves > 1]
        credit[y] = sum(steps) / len(steps)
        tokens.append(y.num_sampled)
    tokens, values = np.array(tokens, float), np.array(list(credit.values()))
    mean = (tokens * values).sum() / tokens.sum()
    variance = (tokens * (values - mean) ** 2).sum() / tokens.sum()
    return {y: value / (variance ** 0.5 + EPSILON) for y, value in credit.items()}


def node_value(root):
    """V̂(y) − V̂(parent): credit where the odds change; zero along single-child chains."""
    return {y: y.value - y.parent.value for y in nodes(root)[1:]}


def root_value(root):
    """V̂(y) − V̂(root): grpo without the division by the std (Dr. GRPO)."""
    return {y: y.value - root.value for y in nodes(root)[1:]}


ADVANTAGES = {"grpo": grpo, "treepo": treepo, "node_value": node_value, "root_value": root_value}


def advantages(root, rule):
    """{node: advantage} of one tree by the name of the rule; {} without contrast."""
    return ADVANTAGES[rule](root) if has_contrast(root) else {}
