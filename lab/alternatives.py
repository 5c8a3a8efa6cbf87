"""What lab/bench.py measures against: the same work as it is commonly done."""
import resource

import torch

from engine.sampling import sampling_mode
from policy import load_policy
from react_env import split_completion
from rollout import end_turn, start, unfinished
from trace_mini import Config
from tree import Node, leaves, path, path_ids, sampled_tokens
from world.questions import load_data


def plain_react(policy, env, roots, counts):
    """Grows trees like rollout.grow, but by transformers' generate on the whole history, turn
    after turn, through the layers as peft and bitsandbytes compute them."""
    tokenizer = policy.tokenizer
    tokenizer.pad_token = tokenizer.eos_token
    live = start(policy, roots, counts, ())
    while live:
        paths = [path_ids(rollout.node) for rollout in live]
        batch = tokenizer.pad({"input_ids": paths}, padding_side="left", return_tensors="pt")
        with sampling_mode(policy.model, [], None):
            found = policy.model.generate(
                **batch.to(policy.device), do_sample=True, top_k=0, tokenizer=tokenizer,
                max_new_tokens=policy.turn_tokens, pad_token_id=tokenizer.pad_token_id,
                stop_strings=["]"])  # the end of an action
        for rollout, ids in zip(live, found.tolist()):
            rollout.ids = [i for i in ids[max(map(len, paths)):] if i != tokenizer.pad_token_id]
            text = policy.text(rollout.ids)
            state = env.step(rollout.node.state, split_completion(text)[1])
            end_turn(policy, rollout, text, state)
        live = unfinished(live)


# ---------------------------------------------------------------- updates and whole steps
def by_path(trees):
    """Credit {node: 1} on copies of all paths, which share nothing. A turn is trained in the
    first path that holds it, so that loss and gradient stay the same."""
    for root in trees:
        for leaf in leaves(root):
            copy, credit = None, {}
            for node in path(leaf):
                copy = Node(node.ids, node.num_sampled, node.state, copy)
                if leaves(node)[0] is leaf:
                    credit[copy] = 1.0
            yield credit


def peak_megabytes():
    """Most memory that this process has held: of the GPU, or else of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3  # Linux counts in kilobytes


def still_policy(dials):
    """-> (policy, data). At learning rate 0 the policy stays what it is."""
    config = Config(learning_rate=0.0, **dials)
    return load_policy(config), load_data(config)


def trl_steps(dials):
    """Two steps of TRL's GRPOTrainer, on episodes of plain_react -> (sampled tokens per second,
    peak in MB). All is as TRL has it, but nothing is saved or computed twice. What is learnt does
    not matter here: rewards and the mask of what was sampled, which take no time, are left out."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    policy, data = still_policy(dials)
    grown = []

    def rollout(prompts, trainer):
        roots = [policy.root(data.train[i], data.env) for i in prompts]
        plain_react(policy, data.env, roots, [1] * len(roots))
        policy.model.train()
        grown.extend(roots)
        return {"prompt_ids": [root.ids for root in roots],
                "completion_ids": [path_ids(leaves(root)[0])[root.length:]
                                   for root in roots],
                "logprobs": None}

    options = GRPOConfig(  # 18 groups of eight sample about as much as a default step of ours
        ".", per_device_train_batch_size=16, gradient_accumulation_steps=9, max_steps=2,
        save_strategy="no", gradient_checkpointing=False, bf16=torch.cuda.is_available())
    trained = GRPOTrainer(
        policy.model, lambda completions, **columns: [0.0] * len(completions), options,
        Dataset.from_dict({"prompt": list(range(len(data.train)))}), rollout_func=rollout,
        processing_class=policy.tokenizer).train()
    return sum(map(sampled_tokens, grown)) / trained.metrics["train_runtime"], peak_megabytes()
