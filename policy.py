"""The policy: a causal LM in 4 bits with LoRA adapters; its log-probs and its update.

Sampling is in rollout.py. Shapes: R rows, T tokens, S cache columns, W width, V vocabulary.
"""
import logging
import os
import sys
import warnings
from contextlib import contextmanager
from functools import partial
from glob import escape as glob_escape
from glob import glob

import numpy as np
import torch
from transformers.utils import logging as transformers_logging

from react_env import FEW_SHOT, prompt_text
from rollout import truncated_logprobs
from tree import Node, nodes, path

transformers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # peft asks the old way

PLAIN_BYTES = 2 ** 28  # a model whose layers fit in this samples with plain matrices


class ModelError(ValueError):
    """A model that cannot be loaded or used, in one line."""


class Policy:
    """A model with its tokenizer and the optimiser of its LoRA weights."""

    def __init__(self, model, tokenizer, config):
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.device = next(model.parameters()).device
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.body, self.head = base.base_model, base.get_output_embeddings()
        self.softcap = getattr(base.config, "final_logit_softcapping", None)
        self.num_words = len(tokenizer)  # many heads have more rows: no text stands for those
        window = getattr(base.config, "sliding_window", None)  # our masks do not slide
        self.context = min(config.context, base.config.max_position_embeddings, window or 2 ** 31)
        if self.context <= config.turn_tokens:
            raise ModelError(f"a context of {self.context} tokens has no room for a turn of "
                             f"{config.turn_tokens}; see --context and --turn-tokens")
        self.few_shot, self.notice = not config.is_tiny, ""
        self.cache_tokens = config.cache_tokens
        layers = [m for m in self.body.modules() if hasattr(m, "base_layer")]
        linear = all(isinstance(m.base_layer, torch.nn.Linear) for m in layers)  # not GPT-2's
        num_bytes = sum(m.in_features * m.out_features for m in layers) * self.head.weight.itemsize
        self.plain = layers if linear and num_bytes <= PLAIN_BYTES else []
        size = base.config.hidden_size * base.config.num_hidden_layers
        self.attention_scale = sum(m.in_features * m.out_features for m in layers) / (2 * size)
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=config.learning_rate, weight_decay=0.0)
        ends = base.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        self.end_ids = {*ends, tokenizer.eos_token_id} - {None}
        bos = tokenizer.bos_token_id
        self.start_ids = [bos] if tokenizer("a").input_ids[:1] == [bos] else []
        self.check_logits()
        # only a token with one of these characters can complete an action or fake an observation
        self.may_end = [i in self.end_ids or "]" in text or ":" in text for i, text in
                        enumerate(tokenizer.batch_decode([[i] for i in range(len(tokenizer))]))]

        room = self.context - len(self.encode(FEW_SHOT))
        if self.few_shot and room < 4 * config.turn_tokens:
            self.few_shot = False
            self.notice = ("the examples of the prompt do not fit into a context of "
                           f"{self.context} tokens: prompting with the bare question")

    # ------------------------------------------------------------ text and ids
    def encode(self, text):
        """Ids of plain text: text that looks like a special token stays text."""
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids

    def root(self, question, env):
        """The root node of a question's tree: its prompt."""
        ids = self.start_ids + self.encode(prompt_text(question, self.few_shot))
        return Node(np.array(ids, np.int32), 0, env.reset(question))

    def text(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    # ------------------------------------------------------------ forward passes
    def forward(self, ids, positions, cache):
        """Feed ids [R, T] at positions [R, T] -> last hidden states [R, T, W]."""
        ids = torch.as_tensor(ids, device=self.device)
        positions = torch.as_tensor(positions, device=self.device)
        cache.place(positions)
        columns = torch.arange(cache.width, device=self.device)
        mask = columns <= positions[:, None, :, None]  # [R, 1, T, S]
        return self.body(input_ids=ids, attention_mask=mask, position_ids=positions,
                         past_key_values=cache, use_cache=True).last_hidden_state

    def logits(self, hidden):
        """Hidden states [..., W] -> logits [..., V] over the words of the tokenizer."""
        logits = self.head(hidden.to(self.head.weight.dtype))[..., :self.num_words]
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits

    def check_logits(self):
        """Some architectures scale their logits in ways of their own: refuse those."""
        ids = torch.arange(3, device=self.device)[None]
        with self.sampling():
            ours = self.logits(self.body(input_ids=ids).last_hidden_state)
            theirs = self.model(input_ids=ids).logits[..., :self.num_words]
        if not torch.allclose(ours.float(), theirs.float(), rtol=0.02, atol=0.02):
            raise ModelError(f"model {self.config.model}: its logits are not head(hidden state), "
                             "an architecture that is not supported")

    @contextmanager
    def sampling(self):
        """eval() and no gradients, but the 4-bit layers stay in training mode: on some CPUs
        their first forward pass in eval mode repacks the weights for inference, and from then
        on no gradient reaches the layers below. They hold no dropout, so nothing else changes.

        A small model also samples with plain matrices W + BA, made once per call instead of
        unpacking W and adding BA at every token. They are thrown away: nothing is merged into
        the 4-bit weights, and the update computes through the layers as they are."""
        from peft.utils.integrations import dequantize_module_weight
        self.model.eval()
        for module in self.model.modules():
            if type(module).__name__ == "Linear4bit":
                module.train()
        with torch.no_grad():
            try:
                for module in self.plain:
                    weight = (dequantize_module_weight(module.base_layer).float()
                              + module.get_delta_weight("default").float())
                    module.forward = partial(
                        torch.nn.functional.linear, bias=module.base_layer.bias,
                        weight=weight.to(self.head.weight.dtype))
                yield
            finally:
                for module in self.plain:
                    module.__dict__.pop("forward", None)

    # ------------------------------------------------------------ log-probs
    def token_logprobs(self, hidden, ids):
        """Log-probs of ids [n] after hidden states [n, W], at the sampling temperature, in
        chunks: the logits [n, V] of a long batch would not fit in memory."""
        size = max(1, self.config.logit_chunk // self.head.weight.shape[0])

        def chunk(hidden, ids):
            logprobs = truncated_logprobs(
                self.logits(hidden), self.config.temperature, self.config.top_p, ids[:, None])
            return logprobs.gather(-1, ids[:, None])[:, 0]

        if len(ids) <= size:
            return chunk(hidden, ids)
        return torch.cat([torch.utils.checkpoint.checkpoint(
            chunk, hidden[i:i + size], ids[i:i + size], use_reentrant=False)
            for i in range(0, len(ids), size)])

    def logprobs(self, rows):
        """Log-probs [n] of the sampled tokens of chosen nodes, in order.

        rows: [(nodes, owned)]. `nodes` holds its root and every parent before its children: a
        path, or a whole subtree packed into one sequence. `owned` are the nodes to score. In a
        pack a token attends to its ancestors only, and positions count along its own path, so
        that a shared prefix is computed once; a batch of plain paths needs no mask."""
        length = max(sum(len(n.ids) for n in row_nodes) for row_nodes, _ in rows)
        ids = np.zeros((len(rows), length), np.int64)
        positions = np.tile(np.arange(length), (len(rows), 1))
        paths = all(is_path(row_nodes) for row_nodes, _ in rows)
        mask = None if paths else np.tile(np.eye(length, dtype=bool), (len(rows), 1, 1))
        at_row, at_column, targets = [], [], []
        for r, (row_nodes, owned) in enumerate(rows):
            first, end = {}, 0  # column where each node begins
            for node in row_nodes:
                first[node], start, end = end, end, end + len(node.ids)
                ids[r, start:end] = node.ids
                positions[r, start:end] = np.arange(node.length - len(node.ids), node.length)
                if not paths:
                    mask[r, start:end, start:end] = np.tri(end - start, dtype=bool)
                    if node.parent is not None:  # sees what its parent's last token sees
                        above = first[node.parent] + len(node.parent.ids) - 1
                        mask[r, start:end, :start] = mask[r, above, :start]
            for node in owned:
                above = first[node.parent] + len(node.parent.ids) - 1
                columns = [above, *range(first[node], first[node] + node.num_sampled - 1)]
                at_row += [r] * node.num_sampled
                at_column += columns[:node.num_sampled]  # each column predicts the next token
                targets.append(node.ids[:node.num_sampled])
        ids, positions = (torch.tensor(x, device=self.device) for x in (ids, positions))
        if not paths:
            mask = torch.tensor(mask[:, None], device=self.device)  # [R, 1, T, T]
        hidden = self.body(input_ids=ids, position_ids=positions, attention_mask=mask,
                           use_cache=False).last_hidden_state
        return self.token_logprobs(hidden[at_row, at_column], torch.tensor(
            np.concatenate(targets).astype(np.int64), device=self.device))

    # ------------------------------------------------------------ update
    def update(self, credits):
        """Policy gradient on trees with credit, [{node: advantage}], `updates_per_batch` steps.

        The loss is the mean of `token_losses` over the sampled tokens of all nodes, each node
        once: tokens that several rollouts share are trained once, with the mean advantage of
        their leaves. With one update the ratio is 1 and only its gradient counts: the loss is
        minus the mean advantage, near zero whatever is learnt. A loss or gradient that is not
        finite changes nothing and is counted. -> metrics, of the last update"""
        loss_tokens = sum(node.num_sampled for credit in credits for node in credit)
        rows = [row for credit in credits for row in self.rows(credit)]
        weight = {node: value for credit in credits for node, value in credit.items()}
        self.model.train()
        self.optimizer.zero_grad()
        num_skipped = 0
        for _ in range(self.config.updates_per_batch):
            loss_sum = 0.0
            for batch in self.micro_batches(rows):
                loss = self.row_losses(batch, weight).sum() / loss_tokens
                loss.backward()
                loss_sum += loss.item()
            norm = float(torch.nn.utils.clip_grad_norm_(self.trained, self.config.max_grad_norm))
            if not (np.isfinite(norm) and np.isfinite(loss_sum)):
                num_skipped += 1
            elif rows:
                self.optimizer.step()
            self.optimizer.zero_grad()
        return {"loss": loss_sum, "grad_norm": norm, "loss_tokens": loss_tokens,
                "update_skipped": num_skipped}

    def row_losses(self, rows, weight):
        """`token_losses` [n] of the sampled tokens that the rows own. The reference of the KL
        term is the model without its adapter, because the adapter started at zero."""
        config, reference = self.config, None
        owned = [node for _, row_owned in rows for node in row_owned]
        advantage = np.repeat([weight[node] for node in owned], [n.num_sampled for n in owned])
        advantage = torch.tensor(advantage, dtype=torch.float32, device=self.device)
        if config.kl:
            with torch.no_grad(), self.model.disable_adapter():
                reference = self.logprobs(rows)
        logprobs = behaviour = self.logprobs(rows)
        if config.updates_per_batch > 1:
            behaviour = torch.tensor(np.concatenate([n.logprobs for n in owned])).to(self.device)
        return token_losses(logprobs, behaviour.detach(), advantage, config.clip, reference,
                            config.kl)

    def rows(self, credit):
        """Rows for `logprobs` that train every node of one tree with credit, each once. One
        bare rollout with its continuations is packed where that is cheaper than its paths."""
        root = path(next(iter(credit)))[0]
        found = []
        if not self.config.kl:  # then a turn without advantage trains nothing
            credit = {node: value for node, value in credit.items() if value}
        for subtree in root.children:
            needed = {n for y in nodes(subtree) if y in credit for n in path(y)}
            in_order = [n for n in nodes(subtree) if n in needed]
            ends = [n for n in in_order if not any(child in needed for child in n.children)]
            paths, taken = [path(end) for end in ends], set()
            if self.cost([root, *in_order], 1.0) < sum(self.cost(p, 0.5) for p in paths):
                paths = [[root, *in_order]]
            for row_nodes in paths:
                owned = [n for n in row_nodes if n not in taken and n in credit]
                taken.update(owned)
                found.append((row_nodes, owned))
        return found

    def cost(self, row_nodes, attended):
        """Relative cost of a row of L tokens: L for the weights and, for attention, L² times the
        share of the square that the kernel computes (half where it is plainly causal)."""
        length = sum(len(n.ids) for n in row_nodes)
        return length + attended * length ** 2 / self.attention_scale

    def micro_batches(self, rows):
        """Batches of at most `micro_batch_tokens` padded tokens, similar lengths together, paths
        apart from packs: those need a mask, which the attention of paths is faster without."""
        for alike in ([row for row in rows if is_path(row[0])],
                      [row for row in rows if not is_path(row[0])]):
            alike.sort(key=lambda row: sum(len(n.ids) for n in row[0]))
            while alike:
                longest = sum(len(n.ids) for n in alike[-1][0])
                size = max(1, self.config.micro_batch_tokens // longest)
                yield alike[-size:]
                del alike[-size:]

    # ------------------------------------------------------------ state
    def state_dict(self):
        """LoRA weights and optimiser state, for checkpoints."""
        from peft import get_peft_model_state_dict
        return {"adapter": get_peft_model_state_dict(self.model),
                "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state):
        from peft import set_peft_model_state_dict
        set_peft_model_state_dict(self.model, state["adapter"])
        self.optimizer.load_state_dict(state["optimizer"])

    def save_adapter(self, folder):
        """In peft's format: PeftModel.from_pretrained(base, folder) loads it."""
        self.model.save_pretrained(folder)


def load_policy(config):
    """Policy of `config.model`: the embedded tiny model, a local folder or a hub id."""
    import_bitsandbytes()
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    name = config.model_path
    where = {"local_files_only": True} if os.path.isdir(name) else {}
    if not where and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ModelError(f"model {config.model}: no such folder")
    if where and not any(glob(os.path.join(glob_escape(name), pattern))
                         for pattern in ("tokenizer*", "vocab*", "*.model")):
        raise ModelError(f"model {config.model}: no tokenizer in that folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **where)
    except Exception as error:
        raise ModelError(
            f"model {config.model}: no tokenizer there ({first_line(error)})") from None
    dtype = torch.bfloat16 if config.device == "cuda" else torch.float32
    quantization = None
    if config.four_bit:
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                                          bnb_4bit_compute_dtype=dtype)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, quantization_config=quantization, attn_implementation="sdpa",
            device_map={"": config.device}, **where)
        check_blocks(config, model)
        torch.manual_seed(config.seed)  # the LoRA matrices A start at random, B at zero
        model = get_peft_model(model, LoraConfig(
            r=config.lora_rank, lora_alpha=2 * config.lora_rank, target_modules="all-linear",
            lora_dropout=0.0, task_type="CAUSAL_LM"))
        return Policy(model, tokenizer, config)
    except ModelError:
        raise
    except Exception as error:
        hint = "; --no-4bit does without bitsandbytes" if config.four_bit else ""
        raise ModelError(
            f"model {config.model}: cannot be used ({first_line(error)}){hint}") from None


def check_blocks(config, model):
    """On CPU, bitsandbytes 0.50 misreads NF4 rows that do not fill whole blocks: the weights
    come back with an error of a quarter instead of a tenth, and nothing says so."""
    for name, module in model.named_modules():
        if type(module).__name__ == "Linear4bit" and config.device == "cpu":
            if module.in_features % module.weight.blocksize:
                raise ModelError(f"model {config.model}: bitsandbytes on CPU misreads {name}, "
                                 f"whose rows of {module.in_features} weights do not fill its "
                                 f"blocks of {module.weight.blocksize}; use --no-4bit")


def import_bitsandbytes():
    """Import it without its search for a CPU kernel on a hub: where the package `kernels` is
    installed that would go to the network, and where it is not it prints a warning."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    hidden, sys.modules["kernels"] = sys.modules.get("kernels"), None  # import fails, by design
    try:
        import bitsandbytes
        return bitsandbytes
    except ImportError:
        return None  # then only --no-4bit works, and loading says so
    finally:
        del sys.modules["kernels"]
        if hidden is not None:
            sys.modules["kernels"] = hidden


def token_losses(logprobs, behaviour, advantage, clip, reference=None, kl=0.0):
    """PPO's loss per token, all [n]: −min(A·ratio, A·clip(ratio, 1 ± clip)), where the ratio is
    exp(log-prob − behaviour log-prob); and, given a reference, + kl·(exp(d) − d − 1) with
    d = reference − log-prob: k3 (Schulman 2020), an estimate of KL(policy, reference)."""
    ratio = (logprobs - behaviour).exp()
    losses = -torch.minimum(advantage * ratio, advantage * ratio.clamp(1 - clip, 1 + clip))
    if reference is not None:
        losses = losses + kl * (torch.expm1(reference - logprobs) - (reference - logprobs))
    return losses


def is_path(row_nodes):
    """Is each node the parent of the next?"""
    return all(n.parent is m for m, n in zip([None, *row_nodes], row_nodes))


def first_line(error):
    return str(error).strip().split("\n")[0][:200]
