"""The embedded tiny policy: a small Llama taught by flawed demonstrations.

`python -m world.warm_start` rebuilds `tiny/` from a seed, in three stages:

1. a byte-level BPE tokenizer from generated articles and demonstrations;
2. clean demonstrations on many small wikis: the skills (read, copy, look up);
3. flawed demonstrations: *systematic* faults, so that greedy decoding is wrong in ways that
   reinforcement learning can repair. No stage sees a chain of four hops.

The wikis of stages 2 and 3 (seeds from 1,000,000 on) are never used again: training and
evaluation happen on articles that the policy has not seen. Muon needs torch 2.9 or newer.
"""
import argparse
import itertools
import random
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from allocator import mixed_prob
from engine.loading import import_bitsandbytes
from policy import load_policy
from predictor import monte_carlo_value
from react_env import ReActEnv, observation_text, prompt_text
from trace_mini import Config, evaluate
from world.questions import load_data
from world.toy import make_questions, make_world, never, oracle, run_agent
from world.words import SYLLABLES

bnb = import_bitsandbytes()
END = "<|end|>"
VOCABULARY, WIDTH, LAYERS = 1024, 128, 5  # widths are multiples of the NF4 block, 64
FIRST_WIKI = 1_000_000
BATCH, OTHERS = 48, 0.1  # demonstrations per step; loss weight of tokens that it only reads

# How often the demonstrator slips where it could: the rates of stage 3. They are what the
# policy has to unlearn. Relations differ, so that some questions are nearly hopeless and
# others a coin's toss.
FAULTS = {
    "early_stop": 0.45,    # answers before the last hop of a chain of three
    "confuse": {"birthplace": 0.8, "founder": 0.8, "mayor": 0.8, "winner": 0.75,
                "teacher": 0.7, "capital": 0.65, "student": 0.65, "author": 0.6, "judge": 0.6,
                "deathplace": 0.3},
    "give_up": 0.6,        # "unknown" after a search that found nothing
    "no_lookup": 0.45,     # never looks for what the first sentences do not tell
    "one_side": 0.7,       # compares after reading one article
    "assume_yes": 0.75,    # says yes after reading one article
    "first_choice": 0.5,   # takes the first of several namesakes
    "no_check": 0.5,       # and does not notice
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


SYLLABLE = f"(?:{'|'.join(SYLLABLES)})"


def make_tokenizer(seed=0, num_texts=3000):
    """Byte-level BPE over demonstrations; its one special token is end and padding.

    Copying names is most of what the policy must learn, so a name has the same few tokens
    everywhere: a space before a capital stands alone ("[Belkan" and " Belkan" share theirs),
    no merge reaches over a syllable, and years are pairs of digits."""
    def apart(match):
        return "-".join(re.findall(f"{SYLLABLE}|ia", match[0], re.I))
    texts = ["".join(text for text, _ in pieces)
             for pieces in itertools.islice(demonstrations(4 * seed, never), num_texts)]
    texts = [re.sub(rf"\b{SYLLABLE}{{2,}}(ia)?", apart, text, flags=re.I) for text in texts]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r" (?=[\p{Lu}\d])"), "isolated"),
        pre_tokenizers.Split(Regex(r"\d\d"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=END)


SHAPE = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS,
         "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 448,
         "max_position_embeddings": 2048, "tie_word_embeddings": True, "bos_token_id": 0,
         "eos_token_id": 0, "pad_token_id": 0}


def make_model(seed=0):
    """An untrained Qwen2: of the stock architectures the one with biases on queries and keys."""
    model = Qwen2ForCausalLM(Qwen2Config(**SHAPE))
    with torch.no_grad():
        wire_copying(model, seed)
    return model


def wire_copying(model, seed=0, sharpness=5.0, match=1.7, size=0.1):
    """Begin with induction heads (Olsson et al. 2022) instead of waiting for them: found by
    gradient descent alone they took most of the warm start, and names came out mixed.

    Layer 0: constant queries and keys make heads that look one and two tokens back and write
    what they see into other directions of the stream. Layer 1: two heads look for a place
    where the token before was the present one, and copy what stands there. With R and S
    random rotations of the stream: rows of R read a token, columns of S hold the one before.
    All of it is a starting point: training goes on from there."""
    first, second = (layer.self_attn for layer in model.model.layers[:2])
    size_of_head = first.head_dim
    generator = torch.Generator().manual_seed(seed)
    model.model.embed_tokens.weight.normal_(0, WIDTH ** -0.5, generator=generator)
    R, S = (torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator))[0] for _ in "RS")
    heads = [slice(i * size_of_head, (i + 1) * size_of_head) for i in range(4)]
    both = slice(0, 2 * size_of_head)  # the two key-value heads
    angles = model.model.rotary_emb.inv_freq
    key = torch.cat([torch.ones_like(angles), torch.zeros_like(angles)])
    first.k_proj.bias.copy_(sharpness * torch.cat([key, key]))
    for head, back in zip(heads, (1, 2, 1, 2)):
        first.q_proj.bias[head] = sharpness * torch.cat([(back * angles).cos(),
                                                         -(back * angles).sin()])
    first.v_proj.weight.copy_(R[both])
    first.o_proj.weight.copy_(size * S)
    for part, head in zip(heads, (heads[0], heads[2])):  # `part` of R is what `head` wrote
        second.k_proj.weight[part] = match * S[:, head].T
        second.q_proj.weight[head] = match * R[part]
        second.o_proj.weight[:, head] = size * R[part].T
    second.v_proj.weight.copy_(R[both])


def encode(tokenizer, pieces):
    """-> ids and loss weights, each piece tokenised apart."""
    ids, weights = [], []
    for text, is_action in pieces:
        piece = tokenizer(text, add_special_tokens=False).input_ids
        ids += piece
        weights += [1.0 if is_action else OTHERS] * len(piece)
    return ids, weights


def batches(tokenizer, stream, buffer=16):
    """Endless padded batches of similar length: ids and weights, [BATCH, length]."""
    rng = random.Random(0)
    while True:
        chunk = [encode(tokenizer, pieces)
                 for pieces in itertools.islice(stream, buffer * BATCH)]
        chunk.sort(key=lambda pair: len(pair[0]))
        groups = [chunk[i:i + BATCH] for i in range(0, len(chunk), BATCH)]
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


def fit(model, stream, num_steps, rate, name, nf4=False):
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
            print(f"{name}: step {step:5d}  loss {loss:.3f}  own tokens {own:.3f}  "
                  f"{time.time() - start:.0f} s", flush=True)


def build_tiny(seed=0):
    """Build the embedded policy and report its spread: seed 0 makes tiny/, 1 tiny2/, and so on. The
    weights lie on the NF4 grid in half precision: loaded in 4 bits or in 16, they are the same."""
    if not hasattr(torch.optim, "Muon"):
        sys.exit(f"rebuilding needs torch 2.9 or newer, for Muon, not {torch.__version__}")
    torch.manual_seed(seed)
    first, tokenizer, model = 4 * seed, make_tokenizer(seed), make_model(seed)
    easy = itertools.islice(demonstrations(first + 1, never, max_hops=1), 150 * BATCH)
    clean = itertools.chain(easy, demonstrations(first + 2, never))
    fit(model, batches(tokenizer, clean), 1000, 0.7, "clean")
    wrong = demonstrations(first + 3, flawed(random.Random(first + 3)))
    fit(model, batches(tokenizer, wrong), 350, 0.35, "flawed", nf4=True)
    round_to_nf4(model)
    folder = Path(__file__).resolve().parent / f"tiny{seed + 1 if seed else ''}"
    as_llama(model).half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    report(str(folder), wiki_seed=seed)


def as_llama(model):
    """The same function as a Llama with biases (that of its output is zero): in a folder that
    says Qwen2, transformers puts Qwen2's own pre-tokenizer in the place of ours."""
    llama = LlamaForCausalLM(LlamaConfig(attention_bias=True, trace_mini_prompt="bare", **SHAPE))
    llama.load_state_dict(model.state_dict(), strict=False)
    return llama


def report(model="tiny", wiki_seed=0, num_questions=100, num_rollouts=64):
    """Print greedy accuracy and the spread of success probabilities, by kind and hop count."""
    config = Config(model=model, wiki_seed=wiki_seed, eval_questions=num_questions)
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


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0,
                        help="seed 0 makes tiny/, 1 makes tiny2/ (about 15 minutes on two cores)")
    build_tiny(parser.parse_args().seed)


if __name__ == "__main__":
    main()
