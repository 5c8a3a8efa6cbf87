"""The embedded tiny policy: a small Llama taught by flawed demonstrations.

`python toy_wiki.py --build-tiny` rebuilds `tiny/` from a seed, in three stages:

1. a byte-level BPE tokenizer from generated articles and demonstrations;
2. clean demonstrations on many small wikis: the skills (read, copy, look up);
3. flawed demonstrations: *systematic* faults, so that greedy decoding is wrong in ways that
   reinforcement learning can repair. No stage sees a chain of four hops.

The wikis of stages 2 and 3 (seeds from 1,000,000 on) are never used again: training and
evaluation happen on articles that the policy has not seen. Muon needs torch 2.9 or newer.
"""
import itertools
import random
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from allocator import mixed_prob
from policy import import_bitsandbytes, load_policy
from predictor import monte_carlo_value
from react_env import ReActEnv, observation_text, prompt_text
from toy_wiki import make_questions, make_world, never, oracle, run_agent

bnb = import_bitsandbytes()
END = "<|end|>"
VOCABULARY, WIDTH, LAYERS = 1536, 128, 5  # widths are multiples of the NF4 block, 64
FIRST_WIKI = 1_000_000

# How often the demonstrator slips where it could: the rates of stage 3. They are what the
# policy has to unlearn. Relations differ, so that some questions are nearly hopeless and
# others a coin's toss.
FAULTS = {
    "early_stop": 0.65,    # answers before the last hop of a chain of three
    "confuse": {"birthplace": 0.85, "teacher": 0.5, "mayor": 0.7, "capital": 0.4,
                "founder": 0.85, "author": 0.3, "winner": 0.6},
    "give_up": 0.6,        # "unknown" after a search that found nothing
    "no_lookup": 0.7,      # never looks for what the first sentences do not tell
    "one_side": 0.6,       # compares after reading one article
    "assume_yes": 0.7,     # says yes after reading one article
    "first_choice": 0.5,   # takes the first of several namesakes
    "no_check": 0.6,       # and does not notice
}


def flawed(rng):
    """-> slip function that errs at the rates of FAULTS."""
    def slip(fault, relation=None, **_):
        rate = FAULTS[fault]
        rate = rate.get(relation, 0.0) if isinstance(rate, dict) else rate
        return rng.random() < rate
    return slip


def demonstrations(seed, slip, max_hops=3, per_wiki=100):
    """Endless demonstrations: lists of (text, is_action) pieces, in the order of the episode."""
    for number in itertools.count():
        world = make_world(200, FIRST_WIKI + 1000 * seed + number)
        env = ReActEnv(world.wiki, max_turns=8)
        for question in make_questions(world, per_wiki, max_hops=max_hops):
            _, texts, observations = run_agent(env, question, oracle(question, slip))
            pieces = [(prompt_text(question), False)]
            for text, observation in zip(texts, observations):
                pieces += [(text, True), (observation_text(observation), False)]
            yield pieces[:-1]  # nothing follows Finish


def make_tokenizer(num_texts=3000):
    """Byte-level BPE over demonstrations; its one special token is end and padding."""
    bpe = ByteLevelBPETokenizer()
    texts = itertools.islice(demonstrations(0, never), num_texts)
    bpe.train_from_iterator(("".join(text for text, _ in pieces) for pieces in texts),
                            vocab_size=VOCABULARY, special_tokens=[END], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=END, pad_token=END)


def make_model():
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, intermediate_size=448,
        max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
        pad_token_id=0)
    return LlamaForCausalLM(config)


def encode(tokenizer, pieces, other_weight):
    """-> ids and loss weights (1 on the policy's own tokens), each piece tokenised apart."""
    ids, weights = [], []
    for text, is_action in pieces:
        piece = tokenizer(text, add_special_tokens=False).input_ids
        ids += piece
        weights += [1.0 if is_action else other_weight] * len(piece)
    return ids, weights


def batches(tokenizer, stream, batch_size, other_weight, buffer=16):
    """Endless padded batches of similar length: ids and weights, [batch_size, length]."""
    rng = random.Random(0)
    while True:
        chunk = [encode(tokenizer, pieces, other_weight)
                 for pieces in itertools.islice(stream, buffer * batch_size)]
        chunk.sort(key=lambda pair: len(pair[0]))
        groups = [chunk[i:i + batch_size] for i in range(0, len(chunk), batch_size)]
        rng.shuffle(groups)
        for group in groups:
            length = max(len(ids) for ids, _ in group)
            ids = torch.zeros(len(group), length, dtype=torch.long)
            weights = torch.zeros(len(group), length)
            for row, (row_ids, row_weights) in enumerate(group):
                ids[row, :len(row_ids)] = torch.tensor(row_ids)
                weights[row, :len(row_weights)] = torch.tensor(row_weights)
            yield ids, weights


def round_to_nf4(model):
    """Replace the linear layers' weights by their NF4 values; -> the weights before."""
    quantize, dequantize = bnb.functional.quantize_4bit, bnb.functional.dequantize_4bit
    before = []
    for layer in model.model.layers.modules():
        if isinstance(layer, torch.nn.Linear):
            before.append((layer.weight, layer.weight.data))
            packed, state = quantize(layer.weight.data, quant_type="nf4", blocksize=64)
            layer.weight.data = dequantize(packed, state)
    return before


def fit(model, stream, num_steps, rate, log, nf4=False):
    """Weighted next-token prediction with Muon on the matrices of the layers and AdamW on the
    rest (`rate` scales both); the padding on the right is never attended to. With
    `nf4`, forward and backward passes see the weights rounded to NF4 (straight-through), so
    that the policy is at home in the four bits it will be loaded in."""
    matrices = [p for p in model.model.layers.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    optimizers = [torch.optim.Muon(matrices, lr=0.02 * rate, weight_decay=0.01),
                  torch.optim.AdamW(others, lr=3e-3 * rate, betas=(0.9, 0.98))]
    schedules = [torch.optim.lr_scheduler.OneCycleLR(
        optimizer, optimizer.param_groups[0]["lr"], num_steps, pct_start=0.1,
        cycle_momentum=False) for optimizer in optimizers]
    start = time.time()
    for step, (ids, weights) in enumerate(itertools.islice(stream, num_steps)):
        full = round_to_nf4(model) if nf4 else []
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
        weight = weights[:, 1:].flatten()
        loss = (losses * weight).sum() / weight.sum()
        model.zero_grad()
        loss.backward()
        for parameter, value in full:
            parameter.data = value
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for update in (*optimizers, *schedules):
            update.step()
        if step % 50 == 0:
            own = (losses * (weight == 1)).sum() / (weight == 1).sum()
            log(f"step {step:5d}  loss {loss:.3f}  own tokens {own:.3f}  "
                f"{time.time() - start:.0f} s")


def build_tiny(folder=Path(__file__).resolve().parent / "tiny", clean_steps=1200, flawed_steps=600):
    """Build the embedded policy from its seed and report its spread. The weights are shipped on
    the NF4 grid in half precision: loaded in 4 bits or in 16, it is the same policy."""
    torch.manual_seed(0)
    tokenizer, model = make_tokenizer(), make_model()
    for name, slip, seed, steps, rate in (
            ("clean", never, 1, clean_steps, 1.0),
            ("flawed", flawed(random.Random(2)), 2, flawed_steps, 0.5)):
        fit(model, batches(tokenizer, demonstrations(seed, slip), 48, 0.2), steps, rate,
            lambda line: print(f"{name}: {line}", flush=True), nf4=name == "flawed")
    round_to_nf4(model)
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    report()


def report(num_questions=100, num_rollouts=32):
    """Print greedy accuracy and the spread of success probabilities, by kind and hop count."""
    from trace_mini import Config, evaluate, load_data
    config = Config(eval_questions=num_questions)
    data, policy = load_data(config), load_policy(config)
    greedy = evaluate(policy, data.env, data.eval)
    roots = [policy.root(question, data.env) for question in data.eval]
    values = monte_carlo_value(policy, data.env, roots, num_rollouts, ("spread",))
    bins = {"0-.01": (0, 0.01), ".01-.1": (0.01, 0.1), ".1-.5": (0.1, 0.5),
            ".5-.9": (0.5, 0.9), ".9-1": (0.9, 1.01)}
    print(f"held-out questions: greedy exact match, and share of questions by the success\n"
          f"probability of {num_rollouts} sampled episodes ({greedy['tokens']:.0f} tokens each)")
    print(f"{'':20s}" + "".join(f"{name:>9s}" for name in ("greedy", *bins, "number")))
    groups = [("all", lambda q: True, greedy["em"])]
    groups += [(kind, lambda q, kind=kind: q.kind == kind, em)
               for kind, em in greedy["by_kind"].items()]
    groups += [(f"{hops} hops", lambda q, hops=hops: str(q.num_hops) == hops, em)
               for hops, em in greedy["by_hops"].items()]
    for name, belongs, em in groups:
        own = values[[belongs(q) for q in data.eval]]
        shares = [np.mean((own >= low) & (own < high)) for low, high in bins.values()]
        print(f"{name:20s}" + "".join(f"{x:9.2f}" for x in (em, *shares)) + f"{len(own):9d}")
    print(f"expected Effective Ratio of groups of eight: {mixed_prob(values, 8).mean():.2f}")
