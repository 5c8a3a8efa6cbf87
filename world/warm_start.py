"""The embedded tiny policy: a small Llama taught by flawed demonstrations.

`python -m world.warm_start` rebuilds `tiny/` from a seed, in three stages:

1. a byte-level BPE tokenizer from demonstrations;
2. clean demonstrations on many small wikis: the skills (read, copy, look up);
3. flawed demonstrations: *systematic* faults, so that greedy decoding is wrong in ways that
   reinforcement learning can repair. No stage sees a chain of four hops.

The wikis of stages 2 and 3 (seeds from 1,000,000 on) are never used again: training and
evaluation happen on articles that the policy has not seen. Muon needs torch 2.9 or newer.
"""
import itertools
import random
import re
import sys
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from engine.command_line import Parser, run_main
from engine.errors import UsageError
from engine.loading import import_bitsandbytes
from react_env import observation_text, prompt_text
from world.questions import MAX_TURNS
from world.oracle import never, oracle, practice, run_agent
from world.toy import HOP_WEIGHTS
from world.words import SYLLABLES

bnb = import_bitsandbytes()
END = "<|end|>"
FIRST_WIKI = 1_000_000
BATCH = 48  # demonstrations per step
READ_WEIGHT = 0.1  # in the loss, of tokens that the policy only reads; its own have 1
WIDTH = 128  # this and the other widths are multiples of the NF4 block, 64
SHAPE = {"vocab_size": 1024, "hidden_size": WIDTH, "num_hidden_layers": 5,
         "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 448,
         "max_position_embeddings": 2048, "tie_word_embeddings": True, "bos_token_id": 0,
         "eos_token_id": 0, "pad_token_id": 0}

# How often the demonstrator slips where it could: the rates of stage 3. They are what the
# policy has to unlearn. Relations differ, so that some questions are nearly hopeless and
# others a coin's toss.
CONFUSED = {  # takes the neighbour of this relation
    "birthplace": 0.8, "founder": 0.8, "mayor": 0.8, "winner": 0.75, "teacher": 0.7,
    "capital": 0.65, "student": 0.65, "author": 0.6, "judge": 0.6, "deathplace": 0.3}
FAULTS = {
    "early_stop": 0.45,    # answers before the last hop of a chain of three
    "give_up": 0.6,        # "unknown" after a search that found nothing
    "no_lookup": 0.45,     # never looks for what the first sentences do not tell
    "one_side": 0.7,       # compares after reading one article
    "assume_yes": 0.75,    # says yes after reading one article
    "first_choice": 0.5,   # takes the first of several namesakes
    "no_check": 0.5,       # and does not notice
}


# ---------------------------------------------------------------- demonstrations
def flawed(rng):
    """-> slip function that errs at the rates of FAULTS and CONFUSED."""
    def slip(fault, relation=None):
        rate = CONFUSED.get(relation, 0.0) if fault == "confuse" else FAULTS[fault]
        return rng.random() < rate
    return slip


def demonstrations(seed, slip, most_hops=3):
    """Endless demonstrations: lists of (text, is_action) pieces, in the order of the episode."""
    for env, question in practice(FIRST_WIKI + 1000 * seed, MAX_TURNS,
                                  hop_weights=HOP_WEIGHTS[:most_hops]):
        pieces = [(prompt_text(question), False)]
        for text, episode in run_agent(env, question, oracle(question, slip)):
            pieces += [(text, True), (observation_text(episode.observation), False)]
        yield pieces[:-1]  # nothing follows Finish


def make_tokenizer(seed=0, num_texts=3000):
    """Byte-level BPE over demonstrations; its one special token is end and padding.

    Copying names is most of what the policy must learn, so a name has the same few tokens
    everywhere: a space before a capital stands alone ("[Belkan" and " Belkan" share theirs),
    no merge reaches over a syllable, and years are pairs of digits."""
    syllable = f"(?:{'|'.join(SYLLABLES)})"

    def apart(match):
        return "-".join(re.findall(f"{syllable}|ia", match[0], re.I))

    texts = []
    for pieces in itertools.islice(demonstrations(4 * seed, never), num_texts):
        text = "".join(text for text, _ in pieces)
        texts.append(re.sub(rf"\b{syllable}{{2,}}(ia)?", apart, text, flags=re.I))
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r" (?=[\p{Lu}\d])"), "isolated"),
        pre_tokenizers.Split(Regex(r"\d\d"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=SHAPE["vocab_size"], special_tokens=[END], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=END)


def encode(tokenizer, pieces):
    """-> ids and loss weights, each piece tokenised apart."""
    ids, weights = [], []
    for text, is_action in pieces:
        piece = tokenizer(text, add_special_tokens=False).input_ids
        ids += piece
        weights += [1.0 if is_action else READ_WEIGHT] * len(piece)
    return torch.tensor(ids), torch.tensor(weights)


def batches(tokenizer, stream, buffer=16):
    """Endless batches of similar length, padded with zeros: ids, weights [BATCH, length]."""
    rng = random.Random(0)
    while True:
        chunk = [encode(tokenizer, pieces)
                 for pieces in itertools.islice(stream, buffer * BATCH)]
        chunk.sort(key=lambda pair: len(pair[0]))
        starts = list(range(0, len(chunk), BATCH))
        rng.shuffle(starts)
        for start in starts:
            ids, weights = zip(*chunk[start:start + BATCH])
            yield pad_sequence(ids, batch_first=True), pad_sequence(weights, batch_first=True)


# ---------------------------------------------------------------- the model
def make_model(seed=0):
    """An untrained Qwen2: of the stock architectures the one with biases on queries and keys."""
    model = Qwen2ForCausalLM(Qwen2Config(**SHAPE))
    with torch.no_grad():
        wire_copying(model, seed)
    return model


def as_llama(model):
    """The same function as a Llama with biases (that of its output is zero): in a folder that
    says Qwen2, transformers puts Qwen2's own pre-tokenizer in the place of ours."""
    llama = LlamaForCausalLM(LlamaConfig(attention_bias=True, trace_mini_prompt="bare", **SHAPE))
    llama.load_state_dict(model.state_dict(), strict=False)
    return llama


def wire_copying(model, seed=0, sharpness=5.0, match=1.7, size=0.1):
    """Begin with induction heads (Olsson et al. 2022) instead of waiting for them: found by
    gradient descent alone they took most of the warm start, and names came out mixed.

    Layer 0: constant queries and keys make heads that look one and two tokens back and write
    what they see into other directions of the stream. Layer 1: two heads look for a place
    where the token before was the present one, and copy what stands there. With R and S
    random rotations of the stream: rows of R read a token, columns of S hold the one before.
    All of it is a starting point: training goes on from there."""
    first, second = model.model.layers[0].self_attn, model.model.layers[1].self_attn
    generator = torch.Generator().manual_seed(seed)
    model.model.embed_tokens.weight.normal_(0, WIDTH ** -0.5, generator=generator)
    R, S = torch.linalg.qr(torch.randn(2, WIDTH, WIDTH, generator=generator))[0]
    angles = model.model.rotary_emb.inv_freq

    def back(num):  # what turns a query so that it meets the key of `num` tokens before
        return sharpness * torch.cat([(num * angles).cos(), -(num * angles).sin()])

    first.k_proj.bias.copy_(back(0).repeat(2))
    first.q_proj.bias.copy_(torch.cat([back(1), back(2)]).repeat(2))
    first.o_proj.weight.copy_(size * S)
    for attention in (first, second):  # two key-value heads serve four heads
        attention.v_proj.weight.copy_(R[:WIDTH // 2])
    reads, holds = R.chunk(4), S.T.chunk(4)  # by head
    keys, queries = second.k_proj.weight.chunk(2), second.q_proj.weight.chunk(4)
    outputs = second.o_proj.weight.T.chunk(4)
    for part, head in ((0, 0), (1, 2)):  # the heads of layer 0 that look one token back
        keys[part].copy_(match * holds[head])
        queries[head].copy_(match * reads[part])
        outputs[head].copy_(size * reads[part])


# ---------------------------------------------------------------- training
def round_to_nf4(model):
    """Replace the linear layers' weights by their NF4 values; -> [(weight, value before)]."""
    before = []
    for layer in model.model.layers.modules():
        if isinstance(layer, torch.nn.Linear):
            value = layer.weight.data
            before.append((layer.weight, value))
            packed, state = bnb.functional.quantize_4bit(value, quant_type="nf4", blocksize=64)
            layer.weight.data = bnb.functional.dequantize_4bit(packed, state)
    return before


def fit(model, stream, num_steps, rate, name, nf4=False):
    """Weighted next-token prediction with Muon on the matrices of the layers and AdamW on the
    rest (`rate` scales both); the padding on the right is never attended to. With
    `nf4`, forward and backward passes see the weights rounded to NF4 (straight-through), so
    that the policy is at home in the four bits it will be loaded in."""
    matrices, others = [], []
    for where, weight in model.named_parameters():
        is_matrix = "layers" in where and weight.dim() == 2
        (matrices if is_matrix else others).append(weight)
    optimizers = [torch.optim.Muon(matrices, lr=0.02 * rate, weight_decay=0.01),
                  torch.optim.AdamW(others, lr=3e-3 * rate, betas=(0.9, 0.98))]
    schedules = [torch.optim.lr_scheduler.OneCycleLR(
        optimizer, optimizer.defaults["lr"], num_steps, pct_start=0.1, cycle_momentum=False)
        for optimizer in optimizers]
    for step, (ids, weights) in enumerate(itertools.islice(stream, num_steps)):
        full = round_to_nf4(model) if nf4 else []
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids).logits[:, :-1]
        losses = cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(),
                               reduction="none")
        weights = weights[:, 1:].flatten()
        loss = (losses * weights).sum() / weights.sum()
        model.zero_grad()
        loss.backward()
        for weight, value in full:
            weight.data = value
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for update in (*optimizers, *schedules):
            update.step()
        if step % 50 == 0:
            print(f"{name}: step {step:5d}  loss {loss:.3f}", flush=True)


def build_tiny(seed=0):
    """Build the embedded policy: seed 0 makes tiny/, 1 tiny2/, and so on. The weights lie on the
    NF4 grid in half precision: loaded in 4 bits or in 16, they are the same."""
    if not hasattr(torch.optim, "Muon"):
        raise UsageError(f"this needs torch 2.9 or newer, for Muon, not {torch.__version__}")
    if bnb is None:
        raise UsageError("this needs bitsandbytes, for NF4")
    torch.manual_seed(seed)
    first = 4 * seed  # seed of the demonstrations
    tokenizer, model = make_tokenizer(seed), make_model(seed)
    easy = itertools.islice(demonstrations(first + 1, never, most_hops=1), 150 * BATCH)
    clean = itertools.chain(easy, demonstrations(first + 2, never))
    fit(model, batches(tokenizer, clean), 1000, 0.7, "clean")
    wrong = demonstrations(first + 3, flawed(random.Random(first + 3)))
    fit(model, batches(tokenizer, wrong), 350, 0.35, "flawed", nf4=True)
    round_to_nf4(model)
    folder = Path(__file__).resolve().parent / (f"tiny{seed + 1}" if seed else "tiny")
    as_llama(model).half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main():
    parser = Parser(__doc__, prog="world.warm_start")
    parser.add_argument("--seed", type=int, default=0,
                        help="seed 0 makes tiny/, 1 makes tiny2/ (about 15 minutes on two cores)")
    build_tiny(parser.parse_args().seed)


if __name__ == "__main__":
    sys.exit(run_main("world.warm_start", main))
