"""The policy: a causal LM in 4 bits with LoRA adapters. Its text, its log-probs, its update.

Sampling is in rollout.py. Shapes: N tokens, W width, V vocabulary.
"""
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from engine.attention import pack
from engine.caches import feed_cache, middle_layer
from engine.errors import UsageError, first_line
from engine.files import fingerprint_of_files, model_folder
from engine.loading import (FILES, adapter_weights, check_logits, check_vocabulary,
                            import_bitsandbytes, load_model, set_adapter, steady_context)
from engine.memory import adapted_layers, best_device, halving, plan_memory
from engine.processes import team
from engine.sampling import sampling_mode
from engine.text import Codec
from tree import Node, full_path

MAX_GRAD_NORM = 1.0    # gradients are clipped to this norm
LOGIT_CHUNK = 2 ** 25  # logits held at once in the update
MIN_PREAMBLE = 64      # ids in front of all questions that are worth a node of their own


class Sizes(NamedTuple):
    """What holds where no dial says otherwise."""
    turn_tokens: int         # most tokens of a turn
    observation_tokens: int  # an observation is cut here
    context: int             # most tokens of a path
    learning_rate: float     # of AdamW on the LoRA weights


EMBEDDED_SIZES = Sizes(40, 160, 768, 2.7e-3)  # of the policies in the box
OTHER_SIZES = Sizes(128, 256, 4096, 1e-4)


class Policy:
    """A model with its tokenizer and the optimiser of its LoRA weights."""

    def __init__(self, model, tokenizer, config, notice=""):
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.codec, self.notice = Codec(tokenizer), notice
        self.device = next(model.parameters()).device
        base = model.get_base_model()
        self.body, self.head = base.base_model, base.get_output_embeddings()
        self.fingerprint = fingerprint_of_files(base.name_or_path, *FILES)
        self.softcap = getattr(base.config, "final_logit_softcapping", None)

        # models that our warm start made were taught the bare prompt, without examples
        embedded = getattr(base.config, "trace_mini_prompt", "") == "bare"
        sizes = EMBEDDED_SIZES if embedded else OTHER_SIZES
        self.turn_tokens = config.turn_tokens or sizes.turn_tokens
        self.observation_tokens = sizes.observation_tokens
        self.micro_batch_tokens = config.micro_batch_tokens
        self.trained = [weight for weight in model.parameters() if weight.requires_grad]
        rate = config.learning_rate
        self.learning_rate = sizes.learning_rate if rate is None else rate
        self.start_optimizer()
        self.layers, self.plan = adapted_layers(self.body), None
        self.middle = middle_layer(self.body)

        ends = base.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        self.end_ids = {*ends, tokenizer.eos_token_id, *self.codec.end_of_turn()} - {None}
        # many heads have more rows, and some have holes: no text stands for those
        self.num_words, holes = check_vocabulary(tokenizer, len(self.head.weight), self.end_ids)
        self.holes = torch.tensor([], dtype=torch.long, device=self.device)

        wanted = min(config.context or sizes.context, base.config.max_position_embeddings)
        if wanted < config.context:
            self.notice += f"\nthe model's context is {wanted} tokens, not {config.context}"
        self.context = steady_context(self, wanted)
        if self.context < wanted:
            self.notice += ("\nits encoding of positions changes with the length: the context is "
                            f"{self.context} tokens, where it does not")
        if self.context <= self.turn_tokens:
            raise UsageError(f"a context of {self.context} tokens has no room for a turn of "
                             f"{self.turn_tokens}; see --context and --turn-tokens")

        # only a token with one of these characters can complete an action or fake an observation
        words = tokenizer.batch_decode([[i] for i in range(self.num_words)])
        self.may_end = [i in self.end_ids or "]" in word or ":" in word
                        for i, word in enumerate(words)]
        check_logits(self)
        self.holes = torch.tensor(holes, dtype=torch.long, device=self.device)
        self.set_plan(plan_memory(self))
        if self.plan.checkpointing:
            base.activation_checkpointing_enable({"use_reentrant": False})

        before, behind, told = self.codec.prompt(
            embedded or config.cold_start > 0, self.context - 4 * self.turn_tokens)
        self.set_prompt(before, behind)
        self.notice += told
        if embedded and config.data != "toy":
            self.notice += ("\nthis policy knows the toy wiki only: --model names another for "
                            "other questions")

    def set_plan(self, plan):
        self.plan, self.cache_tokens = plan, plan.cache_tokens

    # ------------------------------------------------------------ text and ids
    def encode(self, text):
        """Ids of plain text."""
        return self.codec.encode(text)

    def set_prompt(self, before, behind):
        """Ids before and behind the question. Many before it become the preamble of all roots."""
        self.before, self.behind, self.preamble = before, behind, None
        if len(before) >= MIN_PREAMBLE:
            self.preamble = Node(np.array(before, np.int32), 0, None)

    def root(self, question, env):
        """The root node of a question's tree: its prompt."""
        ids = self.encode(" " + question.text) + self.behind
        if self.preamble is None:
            ids = self.before + ids
        return Node(np.array(ids, np.int32), 0, env.reset(question), preamble=self.preamble)

    def text(self, ids):
        return self.codec.decode(ids)

    def wrote(self, node):
        """What the policy wrote in a turn, without the observation."""
        return self.text(node.ids[:node.num_sampled])

    # ------------------------------------------------------------ forward passes
    def forward(self, ids, rows, starts, cache):
        """Feed lists of ids to rows of a cache -> last hidden states [N, W] (engine/caches.py)."""
        return feed_cache(self.body, ids, rows, starts, cache)

    def logits(self, hidden):
        """Hidden states [..., W] -> logits [..., V] over the words of the tokenizer."""
        logits = self.head(hidden.to(self.head.weight.dtype))[..., :self.num_words]
        if self.softcap:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits.index_fill(-1, self.holes, -torch.inf) if len(self.holes) else logits

    def sampling(self):
        """A context in which forward passes sample: no gradients, no dropout."""
        layers = self.layers if self.plan and self.plan.plain else []
        return sampling_mode(self.model, layers, self.head.weight.dtype)

    # ------------------------------------------------------------ log-probs
    def logprobs(self, nodes, scored):
        """Log-probs [n] of the sampled tokens of the nodes `scored`, in order. `nodes` holds
        them and every node above, parents first; what paths share is computed once."""
        packed = pack(nodes, scored)
        ids, positions, targets = (
            torch.as_tensor(x, device=self.device)
            for x in (packed.ids, packed.positions, packed.targets))
        hidden = self.body(
            input_ids=ids[None], position_ids=positions[None], use_cache=False, tree=packed,
            attention_mask=ids.new_ones(1, 1, 1, 1, dtype=torch.bool)  # the tree stands for it
        ).last_hidden_state[0]
        return self.token_logprobs(hidden[packed.columns], targets)

    def token_logprobs(self, hidden, ids):
        """Log-probs of ids [n] after hidden states [n, W], in chunks: the logits [n, V] of a long
        batch would not fit in memory."""
        size = max(1, LOGIT_CHUNK // self.head.weight.shape[0])

        def chunk(hidden, ids):
            logprobs = torch.log_softmax(self.logits(hidden).float(), -1)
            return logprobs.gather(-1, ids[:, None])[:, 0]

        if len(ids) <= size:
            return chunk(hidden, ids)
        return torch.cat([checkpoint(chunk, *parts, use_reentrant=False)
                          for parts in zip(hidden.split(size), ids.split(size))])

    # ------------------------------------------------------------ update
    def start_optimizer(self):
        self.optimizer = torch.optim.AdamW(self.trained, lr=self.learning_rate, weight_decay=0.0)

    def update(self, credits, learning_rate=None):
        """One step of the policy gradient on trees with credit, [{node: advantage}] -> metrics.

        The loss is the mean over the sampled tokens of all these nodes of minus advantage times
        log-prob. Each node counts once: tokens that several rollouts share are trained once, with
        the mean advantage of their leaves. A loss or gradient that is not finite changes nothing
        and is counted."""
        weight = {}
        for credit in credits:
            weight.update(credit)
        loss_tokens = sum(node.num_sampled for node in weight)
        self.model.train()
        if self.preamble:
            self.preamble.cache = None  # of the weights that change here
        own = {node: value for node, value in weight.items() if team().owns(node)}

        def work():
            self.optimizer.zero_grad()
            loss_sum = 0.0
            for nodes, scored in self.micro_batches(own):
                advantage = np.repeat([weight[node] for node in scored],
                                      [node.num_sampled for node in scored])
                advantage = torch.tensor(advantage, dtype=torch.float32, device=self.device)
                loss = -(advantage * self.logprobs(nodes, scored)).sum() / loss_tokens
                loss.backward()
                loss_sum += loss.item()
            return loss_sum

        longest = max((node.length for node in own), default=0)
        loss_sum = halving(self, "micro_batch_tokens", longest, work, self.optimizer.zero_grad)
        loss_sum = team().add_up(self.trained, loss_sum)
        norm = float(torch.nn.utils.clip_grad_norm_(self.trained, MAX_GRAD_NORM))
        finite = bool(np.isfinite(norm) and np.isfinite(loss_sum))
        if finite:  # without a gradient, in a step without contrast, nothing moves
            rate = self.learning_rate if learning_rate is None else learning_rate
            self.optimizer.param_groups[0]["lr"] = rate
            self.optimizer.step()
        self.optimizer.zero_grad()
        return {"loss": loss_sum, "grad_norm": norm, "loss_tokens": loss_tokens,
                "update_skipped": int(not finite)}

    def micro_batches(self, weight):
        """Pairs (nodes, scored) of at most `micro_batch_tokens` tokens, or one path, that train
        every node with a weight once. A tree cut in two brings the path to the cut along."""
        batch, scored, num_tokens = {}, [], 0  # a dict keeps its order
        for node, value in weight.items():
            if not node.num_sampled or not value:
                continue  # it trains nothing
            new = sum(len(part.ids) for part in full_path(node) if part not in batch)
            if scored and num_tokens + new > self.micro_batch_tokens:
                yield list(batch), scored
                batch, scored, num_tokens, new = {}, [], 0, node.length
            batch.update(dict.fromkeys(full_path(node)))
            scored.append(node)
            num_tokens += new
        if scored:
            yield list(batch), scored

    # ------------------------------------------------------------ state
    def state_dict(self):
        """LoRA weights, optimiser state and prompt, for checkpoints."""
        return {"adapter": adapter_weights(self.model), "optimizer": self.optimizer.state_dict(),
                "prompt": [self.before, self.behind], "plain": self.plan.plain}

    def load_state_dict(self, state):
        set_adapter(self.model, state["adapter"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.set_prompt(*state["prompt"])
        if state["plain"] != self.plan.plain:
            self.set_plan(plan_memory(self, state["plain"]))


def load_policy(config):
    """Policy of `config.model`: the embedded tiny model, a local folder or a hub id."""
    device = best_device()
    try:
        model, tokenizer, notice = load_model(
            model_folder(config.model), config.four_bit, device, config.seed)
        return Policy(model, tokenizer, config, notice)
    except UsageError as error:
        why, reason = str(error), None
    except Exception as error:  # whatever transformers makes of a folder
        hint, reason = "", error
        if config.four_bit and not import_bitsandbytes():
            hint = "; bitsandbytes cannot be imported, --no-4bit does without it"
        why = f"cannot be used ({type(error).__name__}: {first_line(error)}){hint}"
        if device == "cuda" and torch.cuda.memory_stats().get("num_ooms"):
            why = "does not fit into the memory of the GPU"  # transformers hides the reason
    raise UsageError(f"model {config.model}: {why}") from reason
