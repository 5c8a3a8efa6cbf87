"""What lab/bench.py measures against: the same work as it is commonly done."""
import resource
import time
from dataclasses import replace
from pathlib import Path

import torch

from engine.memory import trim_memory
from engine.sampling import sampling_mode
from policy import load_policy
from react_env import ReActEnv, split_completion
from rollout import end_turn, prefill, start, unfinished
from trace_mini import Config
from tree import Node, leaves, nodes, path, path_ids, sampled_tokens
from world.questions import load_data


def root_by_root(policy, roots):
    """Prefills every prompt whole, and alone."""
    for root in roots:
        prefill(policy, [alone(root)])


def alone(root):
    """A copy of a root that shares nothing."""
    return Node(path_ids(root), 0, root.state)


def plain_react(policy, env, roots, counts):
    """Grows trees like rollout.grow, but by transformers' generate on the whole history, turn
    after turn, through the layers as peft and bitsandbytes compute them. As many at once as fit
    into the cache that grow has."""
    waiting = start(policy, roots, counts, ())
    while waiting:
        longest = max(rollout.node.length for rollout in waiting) + policy.turn_tokens
        size = max(1, policy.cache_tokens // longest)
        for i in range(0, len(waiting), size):
            generate_turn(policy, env, waiting[i:i + size])
        waiting = unfinished(waiting)


def generate_turn(policy, env, rollouts):
    tokenizer = policy.tokenizer
    tokenizer.pad_token = tokenizer.eos_token
    paths = [path_ids(rollout.node) for rollout in rollouts]
    batch = tokenizer.pad({"input_ids": paths}, padding_side="left", return_tensors="pt")
    with sampling_mode(policy.model, [], None):
        found = policy.model.generate(
            **batch.to(policy.device), do_sample=True, top_k=0, tokenizer=tokenizer,
            max_new_tokens=policy.turn_tokens, pad_token_id=tokenizer.pad_token_id,
            stop_strings=["]"])  # the end of an action
    for rollout, ids in zip(rollouts, found.tolist()):
        rollout.ids = [i for i in ids[max(map(len, paths)):] if i != tokenizer.pad_token_id]
        text = policy.text(rollout.ids)
        state = env.step(rollout.node.state, split_completion(text)[1])
        end_turn(policy, rollout, text, state)


# ---------------------------------------------------------------- updates and whole steps
def by_path(trees):
    """Credit {node: 1} on copies of all paths, which share nothing. A turn is trained in the
    first path that holds it, so that loss and gradient stay the same."""
    for root in trees:
        for leaf in leaves(root):
            copy, credit = alone(root), {}
            for node in path(leaf)[1:]:
                copy = Node(node.ids, node.num_sampled, node.state, copy)
                if leaves(node)[0] is leaf:
                    credit[copy] = 1.0
            yield credit


def by_tree(trees):
    """Credit {node: 1} on copies of all trees, each with a preamble of its own."""
    for root in trees:
        copies = {root: alone(root)}
        for node in nodes(root)[1:]:
            copies[node] = Node(node.ids, node.num_sampled, node.state, copies[node.parent])
        yield dict.fromkeys(list(copies.values())[1:], 1.0)


def costs(work, *arguments):
    """-> (what the work returns, seconds, the most memory that it took beside what was held before,
    in MB: of the GPU, or else of the machine, where Linux tells)."""
    trim_memory()
    gpu, resets = torch.cuda.is_available(), Path("/proc/self/clear_refs")
    if gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    elif resets.exists():
        resets.write_text("5")  # forgets the peak
        before = status_line("VmRSS")
    start = time.perf_counter()
    result = work(*arguments)
    seconds = time.perf_counter() - start
    if gpu:
        return result, seconds, (torch.cuda.max_memory_allocated() - before) / 1e6
    return result, seconds, (status_line("VmHWM") - before) / 1e3 if resets.exists() else 0.0


def status_line(name):
    """In kilobytes."""
    status = Path("/proc/self/status").read_text()
    [line] = [line for line in status.splitlines() if line.startswith(name)]
    return float(line.split()[1])


def peak_megabytes():
    """Most memory that this process has held: of the GPU, or else of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3  # Linux counts in kilobytes


class PayingEnv(ReActEnv):
    """Every second episode earns 1, whatever it says: without contrast nothing is trained."""
    num_ended = 0

    def step(self, episode, action_text):
        new = super().step(episode, action_text)
        self.num_ended += new.done
        return replace(new, reward=float(new.done and self.num_ended % 2))


def still_policy(case):
    """-> (policy, data). At learning rate 0 the policy stays what it is. What no warm start has
    taught would earn nothing."""
    config = Config(method="trace", learning_rate=0.0, **case.dials)
    data, kind = load_data(config), ReActEnv if case.name == "tiny" else PayingEnv
    return load_policy(config), data._replace(env=kind(data.env.wiki, case.max_turns))


def trl_steps(case):
    """Two steps of TRL's GRPOTrainer, on episodes of plain_react -> (sampled tokens per second,
    peak in MB). All is as TRL has it, but nothing is saved or computed twice. What is learnt does
    not matter here: rewards and the mask of what was sampled, which take no time, are left out."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    policy, data = still_policy(case)
    grown = []

    def rollout(prompts, trainer):
        roots = [policy.root(data.train[i], data.env) for i in prompts]
        plain_react(policy, data.env, roots, [1] * len(roots))
        policy.model.train()
        grown.extend(roots)
        return {"prompt_ids": [path_ids(root) for root in roots],
                "completion_ids": [path_ids(leaves(root)[0])[root.length:]
                                   for root in roots],
                "logprobs": None}

    options = GRPOConfig(  # in groups of eight
        ".", per_device_train_batch_size=case.per_batch, max_steps=2,
        gradient_accumulation_steps=case.num_batches,
        save_strategy="no", gradient_checkpointing=False, bf16=torch.cuda.is_available())
    trained = GRPOTrainer(
        policy.model, lambda completions, **columns: [0.0] * len(completions), options,
        Dataset.from_dict({"prompt": list(range(len(data.train)))}), rollout_func=rollout,
        processing_class=policy.tokenizer).train()
    return sum(map(sampled_tokens, grown)) / trained.metrics["train_runtime"], peak_megabytes()
