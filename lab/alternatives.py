"""What bench.py measures against: the same work as it is commonly done."""
import heapq
import resource
import tempfile

import numpy as np
import torch
from transformers import StoppingCriteria

from allocator import mixed_prob
from policy import load_policy
from react_env import split_completion
from rollout import ended, observation_ids
from trace_mini import Config
from tree import nodes, path, path_ids
from world.questions import load_data


def plain_roots(v, budget, cap):
    """The best sum of V_root, by dynamic programming in plain Python."""
    best = [0.0] * (budget + 1)  # by what is spent at most
    for row in mixed_prob(v[:, None], np.arange(cap + 1)).tolist():
        new = best
        for m in range(2, min(cap, budget) + 1):
            gain = row[m]
            new = new[:m] + [max(a, b + gain) for a, b in zip(new[m:], best)]
        best = new
    return best[budget]


def plain_prefixes(flip, budget):
    """k [n] by a heap of single gains in plain Python."""
    k, heap = [0] * len(flip), [(-gain, i) for i, gain in enumerate(flip)]
    heapq.heapify(heap)
    for _ in range(budget):
        gain, i = heap[0]
        k[i] += 1
        heapq.heapreplace(heap, (gain * (1 - flip[i]), i))
    return k


def plain_react(policy, env, questions):
    """The alternative to forked sampling: transformers' generate on the whole left-padded
    history, turn after turn, with the same prompts and stop rule, computed as transformers,
    peft and bitsandbytes do. -> [(ids, mask of the sampled ones, reward)]"""
    class Ended(StoppingCriteria):
        def __call__(self, ids, scores, **kwargs):
            rows = ids[:, self.start:].tolist()
            return torch.tensor([bool(policy.may_end[row[-1]] and ended(policy, (row, row[:])))
                                 for row in rows], device=ids.device)

    stop, plain, policy.plain = Ended(), policy.plain, []
    base = policy.model.get_base_model()
    base.set_attn_implementation("sdpa")
    episodes = [env.reset(question) for question in questions]
    paths = [policy.root(question, env).ids.tolist() for question in questions]
    masks = [[0] * len(ids) for ids in paths]
    live = range(len(paths))
    while live:
        stop.start = max(len(paths[r]) for r in live)
        padded = torch.tensor([[0] * (stop.start - len(paths[r])) + paths[r] for r in live])
        seen = torch.tensor([[0] * (stop.start - len(paths[r])) + [1] * len(paths[r])
                             for r in live])
        with policy.sampling():
            out = policy.model.generate(
                input_ids=padded.to(policy.device), attention_mask=seen.to(policy.device),
                do_sample=True, temperature=1.0, top_k=0, top_p=1.0, stopping_criteria=[stop],
                max_new_tokens=policy.config.turn_tokens, pad_token_id=0)
        going_on = []
        for r, row in zip(live, out[:, stop.start:].tolist()):
            turn = next((row[:n] for n in range(1, len(row)) if policy.may_end[row[n - 1]]
                         and ended(policy, (row[:n], row[:n]))), row)
            text = policy.text(turn)
            episodes[r] = env.step(episodes[r], split_completion(text)[1])
            more = [] if episodes[r].done else observation_ids(policy, episodes[r], text)[0]
            paths[r] += turn + more
            masks[r] += [1] * len(turn) + [0] * len(more)
            if more and len(paths[r]) + policy.config.turn_tokens <= policy.context:
                going_on.append(r)
        live = going_on
    policy.plain = plain
    base.set_attn_implementation("packed")
    return [(ids, mask, float(episode.reward))
            for ids, mask, episode in zip(paths, masks, episodes)]


def credits_of(roots):
    """Every turn gets an advantage, by turns 1 and -1: as dear an update as there is."""
    return [{n: 1.0 - 2 * (i % 2) for i, n in enumerate(nodes(root)[1:])} for root in roots]


def by_paths(policy):
    """The alternative to packing: every path a row of a padded batch, similar lengths together.
    -> micro_batches and logprobs to stand in for the policy's own; loss and gradient are alike."""
    def micro_batches(weight):
        paths, left = sorted((path(node) for node in weight if node.is_leaf),
                             key=lambda nodes_: nodes_[-1].length), dict(weight)
        while paths:
            size = max(1, policy.config.micro_batch_tokens // paths[-1][-1].length)
            batch, paths = paths[-size:], paths[:-size]
            yield batch, [n for nodes_ in batch for n in nodes_ if left.pop(n, None)]

    def logprobs(rows):
        [(paths, owned)] = rows
        ids = torch.zeros(len(paths), max(nodes_[-1].length for nodes_ in paths), dtype=torch.long)
        for row, nodes_ in enumerate(paths):
            ids[row, :nodes_[-1].length] = torch.tensor(path_ids(nodes_[-1]))
        hidden = policy.body(input_ids=ids.to(policy.device), use_cache=False).last_hidden_state
        row_at = {node: row for row, nodes_ in enumerate(paths) for node in nodes_}
        at = [(row_at[n], n.parent.length + i) for n in owned for i in range(n.num_sampled)]
        row, column = torch.tensor(at, device=policy.device).T
        return policy.token_logprobs(hidden[row, column - 1], ids.to(policy.device)[row, column])
    return micro_batches, logprobs


def peak_megabytes():
    """Most memory that this process has held: of the GPU, or else of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3  # Linux counts in kilobytes


def trl_steps(pipe, dials, num_groups):
    """Work of a process: for every message a step of TRL's GRPOTrainer, with `num_groups` groups
    of eight; sends (sampled tokens, peak). The episodes come from plain_react through its
    `rollout_func`. All is as TRL has it but for what would cost it time: checkpointing, logs."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    config = Config(learning_rate=0.0, **dials)
    policy, data, tokens = load_policy(config), load_data(config), [0]

    def rollout(prompts, trainer):
        episodes = plain_react(policy, data.env, [data.train[int(prompt)] for prompt in prompts])
        policy.model.train()
        tokens[0] = sum(sum(mask) for _, mask, _ in episodes)
        begins = [mask.index(1) for _, mask, _ in episodes]
        return {"prompt_ids": [ids[:n] for n, (ids, _, _) in zip(begins, episodes)],
                "completion_ids": [ids[n:] for n, (ids, _, _) in zip(begins, episodes)],
                "env_mask": [mask[n:] for n, (_, mask, _) in zip(begins, episodes)],
                "logprobs": None, "reward": [reward for _, _, reward in episodes]}

    def rewards(completions, reward, **kwargs):
        return reward

    class InTurn(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if not pipe.recv():
                raise SystemExit

        def on_step_end(self, args, state, control, **kwargs):
            pipe.send((tokens[0], peak_megabytes()))

    with tempfile.TemporaryDirectory() as folder:
        GRPOTrainer(
            policy.model, rewards, processing_class=policy.tokenizer, rollout_func=rollout,
            train_dataset=Dataset.from_list([{"prompt": str(i)} for i in range(len(data.train))]),
            callbacks=[InTurn()], args=GRPOConfig(
                folder, per_device_train_batch_size=16, gradient_accumulation_steps=num_groups // 2,
                num_generations=8, learning_rate=0.0, max_steps=10 ** 6, report_to=[],
                gradient_checkpointing=False, save_strategy="no", logging_strategy="no",
                bf16=policy.device.type == "cuda", disable_tqdm=True)).train()
