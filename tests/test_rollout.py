"""Episodes from any anchor: what is sampled, recorded, kept in caches and let go."""
import gc
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import both_logprobs, fresh_policy

from engine.caches import held_tokens
from engine.command_line import run_main
from engine.sampling import RaggedCache, keyed_uniforms, sample_tokens
from predictor import HeadPredictor
from rollout import Rollout, ended, grow, observation_ids, prefill, sample_turn
from trace_mini import Config, State, train_step
from tree import leaves, nodes, path, path_ids, prefixes


@pytest.fixture(scope="module")
def fp32():
    return fresh_policy(False)


# ---------------------------------------------------------------- episodes
def test_recorded_logprobs_are_the_recomputed_ones(policy, trees):
    """Of bare rollouts and of what was forked from them. Bug: a row at a wrong column; the
    log-prob of a token that was cut."""
    for root in trees:
        recorded, recomputed = both_logprobs(policy, root)
        assert np.abs(recorded - recomputed).max() < 1e-4


def test_leaves_come_anchor_by_anchor(policy, data):
    """A continuation stands below its anchor, and samples are numbered on: that keys the random
    numbers."""
    roots = [policy.root(question, data.env) for question in data.train[:3]]
    bare = grow(policy, data.env, roots, [2, 0, 1])
    assert [path(leaf)[0] for leaf in bare] == [roots[0], roots[0], roots[2]]
    anchor = prefixes(roots[0])[-1].node
    found = grow(policy, data.env, [anchor], [2])
    assert all(anchor in path(leaf) for leaf in found)
    assert [leaf.sample for leaf in bare + found] == [0, 1, 0, 2, 3]


def test_greedy_episodes_are_all_the_same(policy, data):
    root = policy.root(data.train[0], data.env)
    found = grow(policy, data.env, [root], [4], greedy=True)
    assert len({path_ids(leaf).tobytes() for leaf in found}) == 1


def test_episodes_do_not_depend_on_the_split(policy, data, monkeypatch):
    """Three rows at a time give the episodes of one large batch, which differ from each other. A
    draw may fall within rounding of a boundary: one episode may not be the same."""
    def episodes(step):
        roots = [policy.root(question, data.env) for question in data.train[:2]]
        found = grow(policy, data.env, roots, [4, 4], (0, step))
        return np.array([path_ids(leaf).tobytes() for leaf in found])
    together, other = episodes(0), episodes(1)
    assert len(set(together)) > 2  # questions
    monkeypatch.setattr(policy, "cache_tokens", 3 * policy.context)
    assert sum(episodes(0) != together) <= 1 < sum(other != together)


# ---------------------------------------------------------------- random numbers
def test_keyed_uniforms_are_splitmix64():
    """The first three numbers that its authors give for seed 0."""
    known = np.array([0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F], np.uint64)
    found = keyed_uniforms(np.zeros(3, np.uint64), np.arange(3))
    assert list(found) == list((known >> np.uint64(11)) * 2.0 ** -53)


def test_inverse_cdf_sampling_follows_the_distribution():
    """20,000 draws: each frequency within 5 sigma, a false alarm in 400,000 runs. A word without
    probability is never drawn, nor anything outside, whatever the uniform."""
    chances = torch.tensor([0.0, 0.5, 0.25, 0.15, 0.1, 0.0])
    uniforms = keyed_uniforms(np.arange(20000, dtype=np.uint64), np.zeros(20000, int))
    uniforms[:2] = 0, 1 - 2.0 ** -53
    ids, _ = sample_tokens(chances.log().expand(20000, 6), torch.tensor(uniforms))
    shares = torch.bincount(ids, minlength=6) / 20000
    assert ((shares - chances).abs() <= 5 * (chances * (1 - chances) / 20000).sqrt()).all()


# ---------------------------------------------------------------- where a turn ends
@pytest.mark.parametrize("written, kept", [
    (" Go.\nAction: Search[Velt (poet)] and more]", " Go.\nAction: Search[Velt (poet)]"),
    (" Hm.\nObservation: I made this up.", " Hm."),
    (" No action at all", " No action at all"),
    ("\nObservation: x", "")])
def test_a_turn_ends_with_its_action(policy, written, kept):
    """What stands behind an action is cut, an observation of the policy's own too. The end token
    ends a turn as well, and is trained, though it is the padding."""
    end = policy.tokenizer.pad_token_id
    rollout = Rollout(None, None, 0, 0)
    for token in [*policy.encode(written), end]:
        rollout.ids.append(token)
        rollout.logprobs.append(0.0)
        if ended(policy, rollout):
            break
    assert policy.text(rollout.ids) == kept and len(rollout.ids) == len(rollout.logprobs)
    assert (end in rollout.ids) == ("No action" in written)


def test_a_long_observation_is_cut(policy, monkeypatch):
    """What comes next is still asked for. A line that the action broke is not broken again."""
    state = SimpleNamespace(observation="Velt was a poet. He was born in Ona. He sang.")
    whole, cut = observation_ids(policy, state, "Action: Search[Velt]")
    assert policy.text(whole) == f"\nObservation: {state.observation}\nThought:" and not cut
    behind, _ = observation_ids(policy, state, "Action: Search[Velt]\n")
    assert "\n" + policy.text(behind) == policy.text(whole)
    monkeypatch.setattr(policy, "observation_tokens", 9)
    assert observation_ids(policy, state, "") == (whole[:9] + policy.encode("\nThought:"), True)


@pytest.mark.parametrize("room", [-1, 0, 60])
def test_a_path_never_outgrows_the_context(policy, data, room, monkeypatch):
    """`room`: tokens that the context holds beside the prompt and a turn. An episode ends, with
    reward 0, before a turn for which there is none; with -1 that is the first."""
    root = policy.root(data.train[0], data.env)
    monkeypatch.setattr(policy, "context", root.length + policy.turn_tokens + room)
    found = grow(policy, data.env, [root], [8])
    assert any(leaf.overflowed for leaf in found)
    for leaf in found:
        assert leaf.length <= policy.context or room < 0
        assert (leaf.num_sampled == 0) == (room < 0) and (leaf.depth == 1 or room > 0)
        assert leaf.state.done or leaf.reward == 0 and len(leaf.ids) == leaf.num_sampled


# ---------------------------------------------------------------- caches
def played(policy, data):
    """Rollouts, then continuations, with caches kept -> (roots, ids of all paths)."""
    roots = [policy.root(question, data.env) for question in data.train[:4]]
    prefill(policy, roots)
    grow(policy, data.env, roots, [3] * 4, keep=True)
    anchors = [prefix.node for root in roots for prefix in prefixes(root)]
    grow(policy, data.env, anchors, [2] * 6 + [0] * (len(anchors) - 6), keep=True)
    return roots, np.array([path_ids(leaf).tobytes() for root in roots for leaf in leaves(root)])


@pytest.fixture(scope="module")
def usual(fp32, data):
    return played(fp32, data)


def test_caches_are_kept_within_the_plan(fp32, data, usual, monkeypatch):
    """What was let go is computed again where an episode goes on from there, to the same end."""
    monkeypatch.setattr(fp32, "cache_tokens", 2 * fp32.context)
    roots, found = played(fp32, data)
    assert held_tokens(roots) <= fp32.cache_tokens < held_tokens(usual[0])
    assert sum(found != usual[1]) <= 1


def test_a_path_is_kept_once(fp32, data):
    """Bug: rows are copied whenever a third of the episodes has ended, and the copies add up."""
    roots = [fp32.root(question, data.env) for question in data.train[:4]]
    prefill(fp32, roots)
    before = held_tokens(roots)
    found = grow(fp32, data.env, roots, [6] * 4, keep=True)
    depths = [leaf.depth for leaf in found]
    assert max(depths) > 1 + min(depths)
    fed = sum(leaf.parent.length // 64 * 64 + 64 for leaf in found)  # room comes in 64 columns
    assert held_tokens(roots) - before <= 1.25 * fed  # rows of one cache are equally wide


def test_the_update_finds_no_caches(fp32, data, monkeypatch):
    """Bug: prompts of the pool that got no rollout, and trees without a prefix, kept theirs."""
    config, found = Config(budget=300, pool_size=16), []

    def num_caches():
        return sum(isinstance(thing, RaggedCache) for thing in gc.get_objects())

    def update(credits, learning_rate):
        found.append(num_caches())
        return {"update_skipped": 0}
    monkeypatch.setattr(fp32, "update", update)
    gc.collect()
    before = num_caches()
    train_step(config, State.begin(config, data), fp32, HeadPredictor(fp32), data)
    assert found == [before]


def test_a_free_place_is_taken_at_the_next_turn(fp32, data, monkeypatch):
    """Bug: a batch waits for its slowest episode. Four paths always fit, short ones more."""
    roots, sizes = [fp32.root(question, data.env) for question in data.train[:4]], []

    def count(policy, cache, live, greedy):
        sizes.append((len(live), 24 - sum(map(len, map(leaves, roots)))))  # those not at their end
        return sample_turn(policy, cache, live, greedy)
    monkeypatch.setattr("rollout.sample_turn", count)
    monkeypatch.setattr(fp32, "cache_tokens", 4 * fp32.context)
    grow(fp32, data.env, roots, [6] * 4)
    assert all(live >= min(4, left) for live, left in sizes)
    assert sizes[0][0] > 4 and any(live < left for live, left in sizes[1:])


# ---------------------------------------------------------------- out of memory
def test_out_of_memory_halves_and_goes_on(fp32, data, usual, monkeypatch):
    """More than three rows fail, but for the first calls: then fewer episodes live at once, no
    half-played one stays in a tree, and the episodes are the same."""
    forward, calls = fp32.forward, []

    def failing(ids, *rest):
        calls.append(ids)
        if len(calls) > 40 and len(ids) > 3:
            raise torch.OutOfMemoryError
        return forward(ids, *rest)
    monkeypatch.setattr(fp32, "forward", failing)
    monkeypatch.setattr(fp32, "cache_tokens", 12 * fp32.context)
    with pytest.warns(UserWarning, match="halving"):
        roots, found = played(fp32, data)
    assert fp32.cache_tokens == fp32.context and sum(found != usual[1]) <= 1
    for root in roots:
        assert all(node.is_leaf or node.children for node in nodes(root))


def test_out_of_memory_lets_go_of_the_cache(fp32, data, monkeypatch):
    """Bug: half-played turns were cut off before their caches were forgotten. They refer to one
    another, so the caches lived until Python's collector came by, and memory was short again."""
    forward, used, alive = fp32.forward, [], []

    def failing(ids, rows, starts, cache):
        used.append(weakref.ref(cache))
        if len(used) == 60:
            raise torch.OutOfMemoryError
        return forward(ids, rows, starts, cache)
    monkeypatch.setattr(fp32, "forward", failing)
    monkeypatch.setattr(fp32, "cache_tokens", fp32.cache_tokens)
    monkeypatch.setattr("torch.cuda.empty_cache",
                        lambda: alive.append(sum(ref() is not None for ref in used)))
    roots = [fp32.root(question, data.env) for question in data.train[:4]]
    gc.collect()
    gc.disable()
    try:
        with pytest.warns(UserWarning, match="halving"):
            grow(fp32, data.env, roots, [3] * 4)
    finally:
        gc.enable()
    assert alive == [0] and any(node.children for node in nodes(roots[0])[1:])


def test_one_episode_out_of_memory_is_an_error(fp32, data, monkeypatch, capsys):
    """Of the command, which says what may be made smaller. Bug: halving for ever."""
    room = [4, 2, 1]  # episodes

    def failing(*arguments):
        assert fp32.cache_tokens == room.pop(0) * fp32.context
        raise torch.OutOfMemoryError
    monkeypatch.setattr(fp32, "forward", failing)
    monkeypatch.setattr(fp32, "cache_tokens", 4 * fp32.context)
    with pytest.warns(UserWarning, match="halving"):
        assert run_main("program", lambda: played(fp32, data)) == 2
    assert "--micro-batch-tokens" in capsys.readouterr().err
