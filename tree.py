"""The rollout tree: turns as nodes, paths, targets and advantages. Plain data, no torch.

One tree holds all rollouts of one prompt. The root is the prompt; every other node is one
turn: the ids the policy sampled, then the ids of the observation. A bare rollout is a child
chain of the root; a continuation branches off at a prefix of a bare rollout and shares
everything above it, so nothing is stored or computed twice.

Letters as in the paper: V̂(y) is `node.value`, n_y is `node.num_leaves`, Ṽ is `node.predicted`.
"""
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(eq=False, slots=True)
class Node:
    """One turn of an episode; the root (depth 0) holds the prompt."""
    ids: np.ndarray                # int32 [num_tokens] the node adds to the path: first the
    num_sampled: int               # ... `num_sampled` ids of the policy, then the observation's
    state: Any                     # immutable environment state after the turn
    parent: "Node | None" = None
    logprobs: np.ndarray = None    # float32 [num_sampled], of the distribution sampled from
    sample: int = 0                # number of the rollout in its tree: keys the random numbers
    children: list = field(default_factory=list)
    hidden: np.ndarray = None      # float32 [width] at the last token; None where never fed
    cache: Any = None              # (cache, row) that holds keys and values of the path
    predicted: float = None        # Ṽ, the predictor's probability of success, at anchors
    value: float = None            # V̂, set by backup
    num_leaves: int = 0            # n, set by backup
    cut_observation: bool = False  # the observation was longer than allowed
    overflowed: bool = False       # the path outgrew the context: ends with reward 0
    depth: int = 0                 # turns from the root
    length: int = 0                # tokens of the path, this node included

    def __post_init__(self):
        if self.parent is not None:
            self.depth, self.length = self.parent.depth + 1, self.parent.length
            self.parent.children.append(self)
        self.length += len(self.ids)

    @property
    def is_leaf(self):
        """A finished episode (its reward is `reward`); a root without rollouts is no leaf."""
        return self.depth > 0 and (self.state.done or self.overflowed)

    @property
    def reward(self):
        """Terminal reward of a leaf, 0 or 1; an overflowed episode gets 0."""
        return 0.0 if self.overflowed else float(self.state.reward)


def path(node):
    """Nodes from the root down to `node`, both included."""
    nodes = []
    while node is not None:
        nodes.append(node)
        node = node.parent
    return nodes[::-1]


def path_ids(node):
    """Ids of the whole path, int32 [node.length]: the concatenation of its nodes' ids."""
    return np.concatenate([n.ids for n in path(node)])


def nodes(root):
    """All nodes below and including `root`, parents first, children in order of sampling."""
    stack, found = [root], []
    while stack:
        node = stack.pop()
        found.append(node)
        stack.extend(reversed(node.children))
    return found


def leaves(root):
    return [node for node in nodes(root) if node.is_leaf]


def prefixes(root):
    """(node, outcome) for every non-terminal prefix (t >= 1) of every bare rollout, before
    expansion; `outcome` is the reward of the bare rollout that owns it. Method, stage 2."""
    return [(node, leaf.reward) for leaf in leaves(root) for node in path(leaf)[1:-1]]


def sampled_tokens(root):
    """Tokens that the policy sampled for this tree, the few that were cut behind an action left
    out: the unit of cost."""
    return sum(node.num_sampled for node in nodes(root))


def backup(root):
    """Set value and num_leaves everywhere: V̂(y) = (1/n_y) Σ_c n_c V̂(c), the mean reward of
    the leaves under y (method, step 6)."""
    for node in reversed(nodes(root)):
        if node.is_leaf:
            node.value, node.num_leaves = node.reward, 1
        elif node.children:
            node.num_leaves = sum(c.num_leaves for c in node.children)
            node.value = sum(c.num_leaves * c.value for c in node.children) / node.num_leaves


def all_targets(root):
    """{node: (V̂, n)}: what Ṽ learns, over all leaves below the node, as in the paper."""
    return {y: (y.value, y.num_leaves) for y in nodes(root)}


def fresh_targets(root):
    """{node: (target, its leaves)} without the bias of all_targets: stage 2 expands a prefix
    because of its own outcome, so that outcome must not count there. Over the rollouts that
    started at the node (at the root the bare ones, at an expanded prefix its continuations);
    where none did, the outcome of the rollout that the node is a turn of."""
    reward, result = {leaf.sample: leaf.reward for leaf in leaves(root)}, {}
    for y in nodes(root):
        started = [c.sample for c in y.children if y is root or c.sample != y.sample] or [y.sample]
        result[y] = sum(reward[sample] for sample in started) / len(started), len(started)
    return result


TARGETS = {"all": all_targets, "fresh": fresh_targets}


def has_contrast(root):
    """At least one success and one failure among the leaves (after backup)."""
    return root.num_leaves > 0 and 0.0 < root.value < 1.0


# ---------------------------------------------------------------- tree credit
# An advantage rule maps a backed-up tree with contrast to {node: advantage} for every node
# below the root. A leaf's reward R reaches a turn through all leaves below it; a turn that
# several leaves share is trained once, with the mean over its leaves. That mean needs only V̂:
# the mean of (R − mean under a) over the leaves of y is V̂(y) − V̂(a).
EPSILON = 1e-6


def _std(node):
    """Standard deviation of the rewards under a node: they are 0 or 1."""
    return (node.value * (1 - node.value)) ** 0.5


def _turns(root):
    return nodes(root)[1:]


def grpo(root):
    """(R − mean under root) / std, the same for every turn of a path (Shao et al. 2024)."""
    return {y: (y.value - root.value) / (_std(root) + EPSILON) for y in _turns(root)}


def tree_grpo(root):
    """grpo, plus the same within the subtree (bare rollout with its continuations)."""
    result = grpo(root)
    for subtree in root.children:
        for y in nodes(subtree):
            result[y] += (y.value - subtree.value) / (_std(subtree) + EPSILON)
    return result


def treepo(root):
    """Mean over the ancestors with more than one leaf of (R − mean under the ancestor),
    scaled by the std over all trained tokens of the tree, not centred."""
    result = {}
    for y in _turns(root):
        groups = [a for a in path(y)[:-1] if a.num_leaves > 1]
        result[y] = sum(y.value - a.value for a in groups) / len(groups) if groups else 0.0
    counts = np.array([y.num_sampled for y in result], float)
    values = np.array(list(result.values()))
    mean = (counts * values).sum() / counts.sum()
    scale = ((counts * (values - mean) ** 2).sum() / counts.sum()) ** 0.5 + EPSILON
    return {y: value / scale for y, value in result.items()}


def node_value(root):
    """V̂(y) − V̂(parent): credit where the odds change; zero along single-child chains."""
    return {y: y.value - y.parent.value for y in _turns(root)}


def root_value(root):
    """V̂(y) − V̂(root): grpo without the division by the standard deviation (Dr. GRPO)."""
    return {y: y.value - root.value for y in _turns(root)}


ADVANTAGES = {rule.__name__: rule for rule in (grpo, tree_grpo, treepo, node_value, root_value)}


def advantages(root, rule):
    """{node: advantage} of one tree by the name of the rule; {} without contrast."""
    return ADVANTAGES[rule](root) if has_contrast(root) else {}
