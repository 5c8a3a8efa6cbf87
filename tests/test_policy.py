"""The policy against the plain computation: log-probs, gradients and updates, in 4 bits and not."""
import numpy as np
import pytest
import torch
from conftest import both_logprobs, expanded, fresh_policy, gradient_of, make_model

from engine.errors import UsageError
from policy import load_policy
from rollout import grow, prefill
from trace_mini import Config
from tree import advantages, nodes, path, path_ids, prefixes


def plain_logprobs(policy, root):
    """Log-probs of all sampled tokens of a tree by the model as it comes: turn by turn, each at
    the end of its path alone, from all logits."""
    found = []
    for node in nodes(root)[1:]:
        ids = torch.as_tensor(path_ids(node), dtype=torch.long)
        logprobs = policy.model(input_ids=ids[None]).logits[0, :, :policy.num_words].log_softmax(-1)
        columns = torch.arange(node.num_sampled) + node.parent.length
        found.append(logprobs[columns - 1, ids[columns]])
    return torch.cat(found)


def slope(policy, value):
    """Gradient [all trained weights] of a value."""
    policy.optimizer.zero_grad()
    value.backward()
    return gradient_of(policy)


def relative_error(found, want):
    return (found - want).norm() / want.norm()


# ---------------------------------------------------------------- log-probs
def test_a_pack_is_its_paths(policy, trees):
    """Bug: in a packed tree a token sees another branch, stands elsewhere than on its path alone,
    or is trained though the policy did not sample it."""
    root = max(trees, key=lambda root: root.num_leaves)
    policy.model.train()
    packed = policy.logprobs(nodes(root), nodes(root)[1:])
    alone = plain_logprobs(policy, root)
    assert (packed - alone).abs().max() < 1e-4
    assert relative_error(slope(policy, packed.sum()), slope(policy, alone.sum())) < 1e-4


ARCHITECTURES = {  # kind: what it has of its own; what is changed
    "qwen2": {},     # positions rotate the halves of a head; two heads share keys and values
    "qwen3": {},     # queries and keys are normalised
    "gemma2": {"attn_logit_softcapping": 0.05, "initializer_range": 0.3,  # capped logits, and a
               "sliding_window": 16},                                      # window in every other
    "gemma3_text": {"sliding_window": 16, "num_hidden_layers": 6},  # in five of six layers
    "gpt_neox": {},  # one matrix for query, key and value; a quarter of a head rotates
    "codegen": {"rotary_dim": 8},        # neighbours rotate
    "gpt2": {"resid_pdrop": 0.3},        # learnt positions; transposed matrices; dropout
    "smollm3": {"num_hidden_layers": 4}}  # no positions in the last layer


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("four_bit", [False, pytest.param(True, marks=pytest.mark.long)])
def test_architectures(kind, four_bit, data, tmp_path):
    """Bug: a model has an attention or positions that our cache or our packs do not follow. As
    sampled, as packed, and alone through the attention that it came with."""
    model = make_model(tmp_path, kind, trace_mini_prompt="bare", **ARCHITECTURES[kind])
    policy = fresh_policy(four_bit, model=model, turn_tokens=12)
    root = policy.root(data.train[0], data.env)
    grow(policy, data.env, [root], [3], keep=True)
    grow(policy, data.env, [prefixes(root)[0].node], [2])
    recorded, packed = both_logprobs(policy, root)
    policy.model.set_attn_implementation("eager")
    with torch.no_grad():
        alone = plain_logprobs(policy, root).numpy()
    assert np.abs(recorded - alone).max() < 1e-4 and np.abs(packed - alone).max() < 1e-4


REFUSED = {
    "granite": {"logits_scaling": 4.0},  # divides its logits
    "gpt_oss": {"num_local_experts": 2, "num_experts_per_tok": 1},  # attends to sinks as well
    "stablelm": {}}  # does not tell its attention in which tree it is


@pytest.mark.parametrize("kind", REFUSED)
def test_models_that_compute_something_else_are_refused(kind, tmp_path, monkeypatch):
    """In 16 bits too, where rounding is a part of the difference."""
    monkeypatch.setattr("engine.loading.compute_dtype", lambda device: torch.bfloat16)
    model = make_model(tmp_path, kind, **REFUSED[kind])
    with pytest.raises(UsageError, match="not supported"):
        load_policy(Config(model=model, four_bit=False, turn_tokens=8))


def test_a_deep_model_in_16_bits_is_no_reason_to_refuse(tmp_path, monkeypatch):
    """Bug: rounding in 28 layers was taken for a wrong attention; no card took any model."""
    monkeypatch.setattr("engine.loading.compute_dtype", lambda device: torch.bfloat16)
    model = make_model(tmp_path, num_hidden_layers=28, initializer_range=0.12)
    assert load_policy(Config(model=model, four_bit=False)).head.weight.dtype == torch.bfloat16


def test_windows_leave_the_context_as_it_is(data, tmp_path):
    """Where five of six layers see the last 16 tokens only, the examples stay in the prompt."""
    model = make_model(tmp_path, "gemma3_text", **ARCHITECTURES["gemma3_text"])
    policy = load_policy(Config(model=model, four_bit=False, turn_tokens=12))
    assert policy.context == 4096 and policy.preamble.length > 400
    root = policy.root(data.train[0], data.env)
    prefill(policy, [root])
    ids, last = torch.as_tensor(path_ids(root), dtype=torch.long), []
    policy.model.set_attn_implementation("eager")
    for window in (16, 4096):
        policy.model.config.sliding_window = window
        with torch.no_grad():
            last.append(policy.body(input_ids=ids[None]).last_hidden_state[0, -1].numpy())
    assert np.abs(root.hidden - last[0]).max() < 1e-3 < 1e-2 < np.abs(last[1] - last[0]).max()


def test_the_preamble_is_an_ancestor_of_the_batch(data, tmp_path):
    """What all prompts begin with is fed once in a step, and in the update once in a batch: loss
    and gradient are those of path by path. Bug: it is fed with the weights of before an update."""
    policy = fresh_policy(False, model=make_model(tmp_path), turn_tokens=12)
    roots, fed = [policy.root(question, data.env) for question in data.train[:3]], []
    forward = policy.forward
    policy.forward = lambda ids, *rest: fed.extend(map(len, ids)) or forward(ids, *rest)
    prefill(policy, roots)
    grow(policy, data.env, roots, [2] * 3)
    assert fed.count(policy.preamble.length) == 1 and max(sorted(fed)[:-1]) < 200
    assert all(root.depth == 0 and path(root) == [root] for root in roots)
    credits = [dict.fromkeys(nodes(root)[1:], 1.0) for root in roots]
    alone = sum(plain_logprobs(policy, root).sum() for root in roots)
    together, batches = 0, list(policy.micro_batches({k: v for c in credits for k, v in c.items()}))
    for batch in batches:
        assert batch[0].count(policy.preamble) == 1
        together = together + policy.logprobs(*batch).sum()
    assert len(batches) == 1 and torch.isclose(together, alone, rtol=1e-4)
    assert relative_error(slope(policy, together), slope(policy, alone)) < 1e-4
    policy.update(credits)
    again = policy.root(data.train[0], data.env)
    prefill(policy, [again])
    with policy.sampling():
        ids = torch.as_tensor(path_ids(again), dtype=torch.long)
        hidden = policy.body(input_ids=ids[None]).last_hidden_state[0, -1]
    assert np.abs(again.hidden - hidden.numpy()).max() < 1e-3


# ---------------------------------------------------------------- gradients
def test_gradients_reach_every_layer_after_sampling(data):
    """Bug: in eval mode bitsandbytes repacks 4-bit layers on CPUs with AVX512-BF16. From then on
    no gradient reaches what lies below them. The oracle has the same weights, in 32 bits."""
    from peft.utils.integrations import dequantize_module_weight
    policy, oracle = fresh_policy(), fresh_policy(False)
    for layer, plain in zip(policy.layers, oracle.layers):
        plain.base_layer.weight.data = dequantize_module_weight(layer.base_layer)
    root = expanded(policy, data, num=1)[0]
    found, want = (slope(each, each.logprobs(nodes(root), nodes(root)[1:]).sum())
                   for each in (policy, oracle))
    assert relative_error(found, want) < 1e-3


# ---------------------------------------------------------------- the update
@pytest.mark.parametrize("rule, tokens, logits", [
    ("grpo", 10 ** 9, 10 ** 9), ("node_value", 400, 10000)])
def test_update_is_the_gradient_of_the_stated_loss(policy, trees, rule, tokens, logits,
                                                   monkeypatch):
    """The mean over sampled tokens of minus advantage times log-prob, each turn once: by autograd,
    turn by turn. In one pack, in packs that cut trees in two; logits whole and in chunks;
    activations kept or computed again. Longer than MAX_GRAD_NORM, the gradient is
    shortened to it."""
    credits = [advantages(root, rule) for root in trees]
    total = sum(node.num_sampled for root in trees for node in nodes(root))
    policy.model.train()
    loss = 0.0
    for credit in credits:
        for node, advantage in credit.items():
            loss -= advantage * policy.logprobs(path(node), [node]).sum() / total
    want, seen = slope(policy, loss), []
    monkeypatch.setattr(policy, "micro_batch_tokens", tokens)
    monkeypatch.setattr("policy.LOGIT_CHUNK", logits)
    monkeypatch.setattr("policy.MAX_GRAD_NORM", want.norm().item() / 2)
    monkeypatch.setattr(policy.optimizer, "step", lambda: seen.append(gradient_of(policy)))
    base = policy.model.get_base_model()
    if tokens == 400:
        base.activation_checkpointing_enable({"use_reentrant": False})
    result = policy.update(credits)
    base.activation_checkpointing_disable()
    assert relative_error(seen[0], want / 2) < 1e-4
    assert result["loss"] == pytest.approx(loss.item(), rel=1e-3)
    assert result["loss_tokens"] == total


@pytest.mark.parametrize("most", [1, 400])
def test_micro_batches(policy, trees, most, monkeypatch):
    """Each turn that has a weight is trained once; a batch is too large only where a single path
    is."""
    monkeypatch.setattr(policy, "micro_batch_tokens", most)
    turns = nodes(trees[0])[1:] + nodes(trees[1])[1:]
    done = []
    for batch, scored in policy.micro_batches(dict.fromkeys(turns, 1.0) | {turns[0]: 0.0}):
        assert len(scored) == 1 or sum(len(node.ids) for node in batch) <= most
        done += scored
    assert done == turns[1:]


def test_out_of_memory_halves_the_micro_batches(policy, trees, monkeypatch):
    """Gradient and loss stay the same: what the batches before had added is gone. A path that does
    not fit is an error."""
    credits = [dict.fromkeys(nodes(root)[1:], 1.0) for root in trees]
    longest = max(node.length for root in trees for node in nodes(root))
    logprobs, calls, seen = policy.logprobs, [], []

    def failing(nodes, scored):
        calls.append(nodes)
        if len(calls) == 2 or len(calls) > 1000:
            raise torch.OutOfMemoryError
        return logprobs(nodes, scored)
    monkeypatch.setattr(policy.optimizer, "step", lambda: seen.append(gradient_of(policy)))
    monkeypatch.setattr(policy, "micro_batch_tokens", 2 * longest)
    want = policy.update(credits)["loss"]
    monkeypatch.setattr(policy, "logprobs", failing)
    with pytest.warns(UserWarning, match="halving micro_batch_tokens"):
        found = policy.update(credits)["loss"]
    assert len(calls) > 3 and policy.micro_batch_tokens == longest
    assert relative_error(seen[1], seen[0]) < 1e-4 and found == pytest.approx(want, rel=1e-4)
    calls.extend([None] * 1000)
    with pytest.raises(torch.OutOfMemoryError):
        policy.update(credits)


def test_without_contrast_nothing_moves(policy, trees):
    """Nor does AdamW by its momentum."""
    before = [weight.clone() for weight in policy.trained]
    assert policy.update([{}, dict.fromkeys(nodes(trees[0])[1:], 0.0)])["grad_norm"] == 0
    assert all(map(torch.equal, before, policy.trained))


