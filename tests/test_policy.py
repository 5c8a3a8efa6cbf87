"""The engine against the plain computation, with the real tiny model, in 4 bits and not."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import fresh_policy

from engine.sampling import draw, keyed_uniforms, truncated_logprobs
from policy import load_policy, token_losses
from rollout import ended, grow, prefill
from trace_mini import HERE, Config
from tree import Node, advantages, backup, leaves, nodes, path, path_ids, prefixes
from world.questions import load_data


def grown(policy, data, num=4, count=4, seed=0):
    roots = [policy.root(question, data.env) for question in data.train[:num]]
    return roots, grow(policy, data.env, roots, [count] * num, (seed, 0))


def recomputed(policy, leaf):
    """As the update computes them: through 4-bit layers and adapters, not as sampled."""
    policy.model.train()
    with torch.no_grad():
        return policy.logprobs([(path(leaf), path(leaf)[1:])]).cpu().numpy()


def plain(policy, node):
    """The same by the model as it comes: one path, causal attention, all logits."""
    ids = torch.tensor(path_ids(node)[None].astype(np.int64))
    logprobs = policy.model(input_ids=ids).logits[0, :, :policy.num_words].log_softmax(-1)
    columns = torch.arange(node.num_sampled) + node.parent.length
    return logprobs[columns - 1, ids[0, columns]]


def recorded(leaf):
    return np.concatenate([node.logprobs for node in path(leaf)[1:]])


def test_recorded_logprobs_are_the_recomputed_ones(policy, data):
    _, found = grown(policy, data)
    for leaf in found:
        assert np.abs(recorded(leaf) - recomputed(policy, leaf)).max() < 1e-4


def test_plain_matrices_are_the_layers(policy):
    """Sampling with W + BA gives the hidden states of the layers, and leaves no trace of itself."""
    ids = torch.arange(300, 340)[None]
    policy.model.train()
    with torch.no_grad():
        layers = policy.body(input_ids=ids).last_hidden_state
        with policy.sampling():
            assert policy.plain and all("forward" in vars(m) for m in policy.plain)
            plain = policy.body(input_ids=ids).last_hidden_state
        assert not any("forward" in vars(m) for m in policy.plain)
    assert (plain - layers).abs().max() < 1e-4


def test_gpt2_samples_through_its_own_layers(tmp_path):
    """Its layers hold their matrices transposed: no plain ones there, and right log-probs."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel
    tokenizer = AutoTokenizer.from_pretrained(str(HERE / "world" / "tiny"))
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=64, n_layer=2, n_head=4,
                               n_positions=2048, eos_token_id=0, bos_token_id=0,
                               resid_pdrop=0.3)).save_pretrained(tmp_path)  # we switch it off
    tokenizer.save_pretrained(tmp_path)
    policy = fresh_policy(False, model=str(tmp_path), context=1024, turn_tokens=12)
    assert not policy.plain
    data = load_data(Config(eval_questions=2))
    for leaf in grown(policy, data, num=2, count=2)[1]:
        policy.model.train()
        assert np.abs(recorded(leaf) - recomputed(policy, leaf)).max() < 1e-4


def test_continuations_start_from_the_prefix(policy, data):
    """Same Node objects above, byte for byte the parent's ids, and right log-probs below."""
    roots, _ = grown(policy, data)
    anchors = [node for root in roots for node, _ in prefixes(root)][:8]
    before = [path_ids(node).tobytes() for node in anchors]
    found = grow(policy, data.env, anchors, [2] * len(anchors), (0, 0))
    assert len(found) == 2 * len(anchors)
    for anchor, ids in zip(anchors, before):
        below = [leaf for leaf in found if anchor in path(leaf)]
        assert len(below) >= 2
        for leaf in below:
            assert path_ids(leaf).tobytes().startswith(ids)
            assert np.abs(recorded(leaf) - recomputed(policy, leaf)).max() < 1e-4


def test_forked_equals_prefilled(policy, data):
    """The hidden state kept at a prefix is that of a fresh prefill of its ids: logits to 1e-4."""
    roots, _ = grown(policy, data)
    anchors = [node for root in roots for node, _ in prefixes(root)][:12]
    fresh = [Node(path_ids(node), 0, node.state) for node in anchors]
    prefill(policy, fresh)
    with torch.no_grad():
        for kept, again in zip(anchors, fresh):
            a, b = (policy.logits(torch.tensor(node.hidden)) for node in (kept, again))
            assert (a - b).abs().max() < 1e-4


def test_episodes_do_not_depend_on_the_split(policy, data):
    """Keyed uniforms: three rows at a time give the episodes of one large batch."""
    _, together = grown(policy, data, num=2)
    policy.cache_tokens, kept = 3 * policy.context, policy.cache_tokens
    _, apart = grown(policy, data, num=2)
    policy.cache_tokens = kept
    ids = [sorted(path_ids(leaf).tobytes() for leaf in found) for found in (together, apart)]
    assert sum(a != b for a, b in zip(*ids)) <= 1  # a draw may fall within rounding of a boundary
    assert grown(policy, data, num=2)[1][0].ids.tolist() == together[0].ids.tolist()
    other = grown(policy, data, num=2, seed=1)[1]
    assert any(a.ids.tolist() != b.ids.tolist() for a, b in zip(together, other))


def test_gradients_before_and_after_sampling(data):
    """Guards the 4-bit layers' silent repacking in eval mode on CPUs with AVX512-BF16."""
    policy = fresh_policy()
    roots, found = grown(policy, data)

    def gradients():
        policy.model.train()
        policy.model.zero_grad()
        policy.logprobs([(path(leaf), path(leaf)[1:]) for leaf in found[:4]]).sum().backward()
        return [p.grad.clone() for p in policy.trained]

    fresh = fresh_policy()
    rows = [(path(leaf), path(leaf)[1:]) for leaf in found[:4]]
    fresh.model.train()
    fresh.logprobs(rows).sum().backward()
    for after, never_sampled in zip(gradients(), [p.grad for p in fresh.trained]):
        torch.testing.assert_close(after, never_sampled, rtol=1e-5, atol=1e-6)
    assert all(p.grad.abs().sum() > 0 for p in policy.trained)


def test_only_sampled_tokens_get_gradient(policy, data):
    """The loss reads the last hidden states in front of sampled tokens and nowhere else: prompt
    and observation tokens are predicted by no term of it."""
    _, found = grown(policy, data, num=1, count=1)
    kept = []
    hook = policy.body.register_forward_hook(
        lambda module, args, output: output.last_hidden_state.retain_grad()
        or kept.append(output.last_hidden_state))
    policy.model.train()
    policy.logprobs([(path(found[0]), path(found[0])[1:])]).sum().backward()
    hook.remove()
    touched = kept[0].grad[0].abs().sum(-1).nonzero()[:, 0]
    own = [node.length - len(node.ids) + i for node in path(found[0])
           for i in range(node.num_sampled)]
    assert (touched + 1).tolist() == own
    text = policy.text(path_ids(found[0])[own])
    assert "Observation:" not in text and "Question:" not in text and "Action:" in text


def test_stop_rules(policy):
    """Text after the action is cut; an observation of the policy's own ends the turn."""
    cases = [(" Go.\nAction: Search[Velt]", " Go.\nAction: Search[Velt]"),
             (" Go.\nAction: Search[Velt (poet)] and more]", " Go.\nAction: Search[Velt (poet)]"),
             (" Hm.\nObservation: I made this up.", " Hm."),
             (" No action at all", " No action at all"),
             ("\nObservation: x", "")]
    for written, kept in cases:
        turn = ([], [])
        for token in policy.encode(written):
            turn[0].append(token)
            turn[1].append(0.0)
            if policy.may_end[token] and ended(policy, turn):
                break
        assert policy.text(turn[0]) == kept
        assert len(turn[0]) == len(turn[1])


def test_end_token_stops_a_turn_even_where_it_is_the_padding(policy):
    end = policy.tokenizer.eos_token_id
    assert end == policy.tokenizer.pad_token_id
    turn = ([policy.encode(" I")[0], end], [0.0, 0.0])
    assert policy.may_end[end] and ended(policy, turn) and turn[0][-1] == end


def test_inverse_cdf_sampling_follows_the_distribution():
    """20,000 draws; each frequency within 5 sigma (false alarm about 3e-6 in all), and top-p
    keeps the smallest set of words that reaches p, renormalised."""
    probabilities = torch.tensor([0.5, 0.25, 0.15, 0.1])
    uniforms = torch.tensor(keyed_uniforms(np.arange(20000, dtype=np.uint64), np.zeros(20000, int)))
    for top_p, expected in ((1.0, probabilities), (0.6, torch.tensor([2 / 3, 1 / 3, 0, 0]))):
        ids, logprobs = draw(probabilities.log().expand(20000, 4), uniforms, 1.0, top_p)
        shares = torch.bincount(ids, minlength=4) / 20000
        assert ((shares - expected).abs() <= 5 * (expected * (1 - expected) / 20000).sqrt()).all()
        torch.testing.assert_close(logprobs.exp(), expected[ids])


def test_a_sampled_word_stays_in_the_nucleus():
    """Outside by rounding or after an update, its log-prob would be -inf, its ratio nan."""
    logits = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()
    kept = truncated_logprobs(logits, 1.0, 0.6, torch.tensor([[3]]))[0].exp()
    torch.testing.assert_close(kept, torch.tensor([0.5, 0.25, 0, 0.1]) / 0.85)


def expanded(policy, data, num=2):
    """Backed-up trees with continuations, so that paths share prefixes. Their rewards are set by
    hand, alternately: there is contrast whatever the policy can do."""
    roots, _ = grown(policy, data, num=num, count=3)
    anchors = [node for root in roots for node, _ in prefixes(root)]
    grow(policy, data.env, anchors, [1] * len(anchors), (0, 0))
    for root in roots:
        for i, leaf in enumerate(leaves(root)):
            leaf.state = replace(leaf.state, reward=float(i % 2))
        backup(root)
    return roots


def gradient_of(policy):
    return torch.cat([p.grad.flatten() for p in policy.trained])


def test_packed_equals_path_by_path(policy, data):
    """One sequence gives the log-probs and gradients of its paths, each alone through the model's
    own causal attention."""
    root = max(expanded(policy, data), key=lambda root: root.num_leaves)
    policy.model.train()
    policy.model.zero_grad()
    packed = policy.logprobs([(nodes(root), nodes(root)[1:])])
    packed.sum().backward()
    gradient = gradient_of(policy)
    policy.model.zero_grad()
    alone = torch.cat([plain(policy, node) for node in nodes(root)[1:]])
    alone.sum().backward()
    assert (packed - alone).abs().max() < 1e-4
    assert (gradient - gradient_of(policy)).norm() / gradient.norm() < 1e-4


def test_a_capped_attention_in_a_pack(tmp_path):
    """Gemma 2 caps the logits of its attention, which SDPA cannot: sampled, packed and alone."""
    from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM
    tokenizer = AutoTokenizer.from_pretrained(str(HERE / "world" / "tiny"))
    torch.manual_seed(0)
    Gemma2ForCausalLM(Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, attn_logit_softcapping=0.01,
        initializer_range=0.3)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    policy = fresh_policy(False, model=str(tmp_path), context=1024, turn_tokens=12)
    data = load_data(Config(eval_questions=2))
    root = grown(policy, data, num=1, count=3)[0][0]
    turns = nodes(root)[1:]
    with torch.no_grad():
        packed = policy.logprobs([(nodes(root), turns)]).numpy()
        policy.model.set_attn_implementation("eager")
        alone = torch.cat([plain(policy, node) for node in turns]).numpy()
    sampled = np.concatenate([node.logprobs for node in turns])
    assert max(np.abs(packed - alone).max(), np.abs(sampled - alone).max()) < 1e-4


@pytest.mark.parametrize("rule, tokens", [
    ("grpo", 10 ** 9), pytest.param("grpo", 1, marks=pytest.mark.long), ("node_value", 400)])
def test_update_is_the_gradient_of_the_stated_loss(policy, data, rule, tokens, monkeypatch):
    """The update's gradient equals autograd on the formula, node by node, each node once: in one
    pack, path by path, and in packs that cut trees in two."""
    monkeypatch.setattr(policy.config, "micro_batch_tokens", tokens)
    credits = [c for c in (advantages(root, rule) for root in expanded(policy, data)) if c]
    total = sum(node.num_sampled for credit in credits for node in credit)
    policy.model.train()
    policy.model.zero_grad()
    for credit in credits:
        for node, advantage in credit.items():
            if advantage:
                (-advantage * policy.logprobs([(path(node), [node])]).sum() / total).backward()
    want = gradient_of(policy)
    seen = {}
    monkeypatch.setattr(policy.optimizer, "step", lambda: seen.update(grad=gradient_of(policy)))
    monkeypatch.setattr(policy.config, "max_grad_norm", 1e9)
    result = policy.update(credits)
    assert result["loss_tokens"] == total and not result["update_skipped"]
    assert (seen["grad"] - want).norm() / want.norm() < 1e-4


def test_token_losses_by_hand():
    """Ratios 2, 2, 1/2, 1/2 and 1.1, clip 0.2: the smaller of A·ratio and A·clipped counts, and
    only where that is A·ratio there is a gradient, −A·ratio. k3 of ratio 2: 1/2 − ln(1/2) − 1."""
    behaviour = torch.log(torch.tensor([0.1, 0.1, 0.4, 0.4, 0.5]))
    logprobs = torch.log(torch.tensor([0.2, 0.2, 0.2, 0.2, 0.55])).requires_grad_()
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0])
    losses = token_losses(logprobs, behaviour, advantage, 0.2)
    losses.sum().backward()
    torch.testing.assert_close(losses, torch.tensor([-1.2, 2.0, -0.5, 0.8, -2.2]))
    torch.testing.assert_close(logprobs.grad, torch.tensor([0.0, 2.0, -0.5, 0.0, -2.2]))
    with_kl = token_losses(logprobs, behaviour, advantage, 0.2, behaviour, 0.1)
    k3 = torch.tensor([0.5, 0.5, 2.0, 2.0, 1 / 1.1])
    torch.testing.assert_close(with_kl - losses, 0.1 * (k3 - k3.log() - 1))


def test_kl_pulls_towards_the_policy_before_training(data):
    """Without advantages only the KL term is left. Its gradient is that of the formula by paths,
    with a policy that was never trained as the reference: its adapter is zero."""
    policy, start = fresh_policy(kl=0.3), load_policy(Config())
    credits = [dict.fromkeys(nodes(root)[1:], 0.0) for root in expanded(policy, data, num=1)]
    scored = [node for credit in credits for node in credit]
    total = sum(node.num_sampled for node in scored)
    policy.model.train()
    value = 0.0
    for node in scored:
        with torch.no_grad():
            reference = start.logprobs([(path(node), [node])])
        gap = reference - policy.logprobs([(path(node), [node])])
        loss = 0.3 * (gap.exp() - gap - 1).sum() / total
        loss.backward()
        value += loss.item()
    want, seen = gradient_of(policy), {}
    policy.optimizer.step = lambda: seen.update(grad=gradient_of(policy))
    policy.config.max_grad_norm = 1e9
    assert policy.update(credits)["loss"] == pytest.approx(value, rel=1e-3) and value > 0
    assert (seen["grad"] - want).norm() / want.norm() < 1e-3


def test_a_second_update_sees_ratios_and_clips_them(data, monkeypatch):
    """The first finds the recorded log-probs, ratio 1; the second, a step later, does not."""
    policy, ratios = fresh_policy(updates_per_batch=2, clip=1e-6, learning_rate=1e-3), []

    def spy(logprobs, behaviour, *rest):
        ratios.append((logprobs - behaviour).exp().detach())
        return token_losses(logprobs, behaviour, *rest)
    monkeypatch.setattr("policy.token_losses", spy)
    policy.config.micro_batch_tokens = 10 ** 9  # one batch
    roots, found = grown(policy, data, num=1, count=2)
    result = policy.update([{node: 1.0 for node in nodes(roots[0])[1:]}])
    first, second = ratios
    assert (first - 1).abs().max() < 1e-4 and (second - 1).abs().max() > 1e-3
    clipped = second.clamp(max=1 + 1e-6).sum() / len(second)  # advantage 1
    assert result["loss"] == pytest.approx(-clipped.item(), rel=1e-4)
    assert result["update_skipped"] == 0 and len(policy.optimizer.state) == len(policy.trained)


def test_a_bad_number_skips_the_update(data):
    policy = fresh_policy()
    roots, _ = grown(policy, data, num=6, count=6)
    for root in roots:
        backup(root)
    credits = [credit for credit in (advantages(root, "grpo") for root in roots) if credit]
    credits[0][next(iter(credits[0]))] = float("nan")
    before = [p.clone() for p in policy.trained]
    assert policy.update(credits)["update_skipped"] == 1
    assert all(torch.equal(a, b) for a, b in zip(before, policy.trained))
