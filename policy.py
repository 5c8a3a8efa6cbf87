"""The policy: a causal LM in 4 bits with LoRA adapters; its log-probs and its update.

Sampling is in rollout.py. Shapes: R rows, T tokens, S cache columns, W width, V vocabulary.
"""
import shutil
from contextlib import contextmanager
from functools import partial
from inspect import signature
from pathlib import Path

import numpy as np
import torch

from engine.attention import pack
from engine.loading import ModelError, end_of_turn, first_line, load_model, prompt_ids
from engine.sampling import RaggedCache
from tree import Node, path

PLAIN_BYTES = 2 ** 28  # a model whose layers fit in this samples with plain matrices
MOST_COLUMNS = 131072  # of the cache, however large the memory
CPU_BYTES = 2 ** 32    # memory that is planned with where there is no GPU


class Policy:
    """A model with its tokenizer and the optimiser of its LoRA weights."""

    def __init__(self, model, tokenizer, config):
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.device = next(model.parameters()).device
        base = model.get_base_model()
        self.body, self.head = base.base_model, base.get_output_embeddings()
        self.cache_name = ("cache" if "cache" in signature(self.body.forward).parameters
                           else "past_key_values")  # as transformers called it before 5.24
        self.softcap = getattr(base.config, "final_logit_softcapping", None)
        self.num_words = len(tokenizer)  # many heads have more rows: no text stands for those
        window = getattr(base.config, "sliding_window", None)  # our masks do not slide
        self.context = min(config.context, base.config.max_position_embeddings, window or 2 ** 31)
        if self.context <= config.turn_tokens:
            raise ModelError(f"a context of {self.context} tokens has no room for a turn of "
                             f"{config.turn_tokens}; see --context and --turn-tokens")
        layers = [m for m in self.body.modules() if hasattr(m, "base_layer")]
        linear = all(isinstance(m.base_layer, torch.nn.Linear) for m in layers)  # not GPT-2's
        num_bytes = sum(m.in_features * m.out_features for m in layers) * self.head.weight.itemsize
        self.plain = layers if linear and num_bytes <= PLAIN_BYTES else []
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=config.learning_rate, weight_decay=0.0)
        ends = base.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        self.end_ids = {*ends, tokenizer.eos_token_id, *end_of_turn(tokenizer)} - {None}
        # only a token with one of these characters can complete an action or fake an observation
        self.may_end = [i in self.end_ids or "]" in text or ":" in text for i, text in
                        enumerate(tokenizer.batch_decode([[i] for i in range(len(tokenizer))]))]
        self.check_logits(base)
        self.plan_memory()

        few_shot, self.notice = not config.bare_prompt, ""
        chat = few_shot and bool(tokenizer.chat_template)
        self.prompt = prompt_ids(tokenizer, few_shot, chat)
        if few_shot and self.context - sum(map(len, self.prompt)) < 4 * config.turn_tokens:
            self.prompt = prompt_ids(tokenizer, False, chat)
            self.notice = ("the examples of the prompt do not fit into a context of "
                           f"{self.context} tokens: prompting with the bare question")

    # ------------------------------------------------------------ text and ids
    def encode(self, text):
        """Ids of plain text: text that looks like a special token stays text, and half of a
        surrogate pair, which JSON may hold but no tokenizer takes, becomes a question mark."""
        text = text.encode(errors="replace").decode()
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids

    def root(self, question, env):
        """The root node of a question's tree: its prompt."""
        before, behind = self.prompt
        ids = before + self.encode(" " + question.text) + behind
        return Node(np.array(ids, np.int32), 0, env.reset(question))

    def text(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=True,
                                     clean_up_tokenization_spaces=False)

    def wrote(self, node):
        """What the policy wrote in a turn, without the observation."""
        return self.text(node.ids[:node.num_sampled])

    # ------------------------------------------------------------ forward passes
    def forward(self, ids, starts, cache):
        """Feed ids[r] (maybe none) to row r of the cache, from column starts[r] on -> last hidden
        states [N, W] of all N tokens, row by row."""
        counts = [len(row_ids) for row_ids in ids]
        rows = np.repeat(np.arange(len(ids)), counts)
        slots = np.concatenate([np.arange(n) for n in counts])
        positions = np.asarray(starts)[rows] + slots
        width = max(cache.width, positions.max() + 1)
        starts, rows, slots, positions, ids = (torch.tensor(x, device=self.device) for x in (
            starts, rows, slots, positions, np.concatenate([x for x in ids if len(x)])))
        cache.place(rows, positions, len(counts), width)
        latest = starts[:, None] + torch.arange(max(counts), device=self.device)  # [R, T]
        mask = torch.arange(cache.width, device=self.device) <= latest[:, None, :, None]
        return self.body(input_ids=ids[None], position_ids=positions[None], use_cache=True,
                         attention_mask=mask,  # [R, 1, T, S]
                         places=(rows, slots), **{self.cache_name: cache}).last_hidden_state[0]

    def logits(self, hidden):
        """Hidden states [..., W] -> logits [..., V] over the words of the tokenizer."""
        logits = self.head(hidden.to(self.head.weight.dtype))[..., :self.num_words]
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits

    def check_logits(self, base):
        """Some architectures scale their logits in ways of their own, or have an attention that
        is more than ours: refuse those. What they compute as they come is "eager". Errors are
        measured against the spread of the logits: in bfloat16, 30 layers round to 1 to 4 % of it,
        whatever the logits are; what a wrong attention does is 20 % and more."""
        ids = torch.arange(3, device=self.device)[None]
        root = Node(np.arange(3), 0, None)
        left, right = (Node(np.arange(i, i + 4), 4, None, root) for i in (3, 7))
        with self.sampling():
            fork = self.logprobs([([root, left, right], [right])])
            path_ = self.logprobs([([root, right], [right])])
            ours = self.logits(self.body(input_ids=ids).last_hidden_state)
            base.set_attn_implementation("eager")
            theirs = self.model(input_ids=ids).logits[..., :self.num_words]
        base.set_attn_implementation("packed")
        most = (0.01 if theirs.dtype == torch.float32 else 0.1) * theirs.float().std()
        for a, b in ((fork, path_), (ours, theirs)):
            if not (a.float() - b.float()).square().mean().sqrt() <= most:
                raise ModelError("not supported: its logits are not head(hidden state), or its "
                                 "attention is not the usual one")

    def plan_memory(self):
        """Choose `cache_tokens` and `checkpointing` from what is free, and from what a short pass
        shows that a token takes in the cache and in the update.

        The caches of live episodes get a third of it, as much as those that finished ones left
        and as those being made by forking. By the time of the update they are gone.
        Qwen2.5-1.5B in NF4 on 8 GB: 1.2 GB of weights (a third of them the 151,936 words in 16
        bits), 0.3 GB of LoRA with its optimiser, 0.5 GB of CUDA itself; 6 GB remain. A token
        takes 2 x 28 layers x 2 heads x 128 numbers of 16 bits in the cache, 29 kB: 70,000 fit
        into 2 GB. The update of 4,096 tokens would keep 28 x 147 kB each, 17 GB. With gradient
        checkpointing it is 28 x 3 kB, and one layer at a time: 0.95 GB, and 0.6 GB of logits."""
        config, cache, kept = self.config, RaggedCache(), {}
        ids = np.zeros((1, 64), np.int64)
        with self.sampling():
            self.forward(ids, [0], cache)
        self.column_bytes = sum(x.nbytes for x in cache.keys + cache.values) // 64

        def note(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor
        self.model.train()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            self.body(input_ids=torch.as_tensor(ids, device=self.device), use_cache=False)
        weights = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        self.kept_bytes = sum(size for place, size in kept.items() if place not in weights) / 64

        free = free_bytes(self.device) - 12 * sum(p.numel() for p in self.trained)  # to be AdamW's
        columns = min(MOST_COLUMNS, int(free / 3 / self.column_bytes))
        self.cache_tokens = self.planned_tokens = config.cache_tokens or max(columns, self.context)
        longest = max(config.micro_batch_tokens, self.context)
        self.checkpointing = config.gradient_checkpointing or longest * self.kept_bytes > free / 2
        if self.checkpointing:
            base, new = self.model.get_base_model(), "activation_checkpointing_enable"  # since 5.24
            getattr(base, new if hasattr(base, new) else "gradient_checkpointing_enable")(
                {"use_reentrant": False})

    def memory_line(self):
        return (f"memory: {max(1, self.cache_tokens // self.context)} live episodes of at most "
                f"{self.context:,} tokens, cache of {self.cache_tokens:,} tokens "
                f"({self.cache_tokens * self.column_bytes / 1e9:.1f} GB), micro-batches of "
                f"{self.config.micro_batch_tokens:,} tokens, gradient checkpointing "
                f"{'on' if self.checkpointing else 'off'}")

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
            logprobs = torch.log_softmax(
                self.logits(hidden).float() / self.config.temperature, -1)
            return logprobs.gather(-1, ids[:, None])[:, 0]

        if len(ids) <= size:
            return chunk(hidden, ids)
        return torch.cat([torch.utils.checkpoint.checkpoint(
            chunk, hidden[i:i + size], ids[i:i + size], use_reentrant=False)
            for i in range(0, len(ids), size)])

    def logprobs(self, rows):
        """Log-probs [n] of the sampled tokens of chosen nodes; rows: [(nodes, nodes to score)], as
        `pack` takes them. What the paths of one row share is computed once."""
        pack_ = pack(rows)
        ids, positions, targets = (torch.tensor(x, device=self.device)
                                   for x in (pack_.ids, pack_.positions, pack_.targets))
        hidden = self.body(
            input_ids=ids[None], position_ids=positions[None], use_cache=False, tree=pack_.tree,
            attention_mask=ids.new_ones(1, 1, 1, 1, dtype=torch.bool)  # the tree stands for it
        ).last_hidden_state[0]
        return self.token_logprobs(hidden[pack_.columns], targets)

    # ------------------------------------------------------------ update
    def update(self, credits):
        """One step of the policy gradient on trees with credit, [{node: advantage}].

        The loss is the mean over the sampled tokens of all nodes of minus advantage times
        log-prob, each node once: tokens that several rollouts share are trained once, with the
        mean advantage of their leaves. A loss or gradient that is not finite changes nothing and
        is counted. -> metrics"""
        loss_tokens = sum(node.num_sampled for credit in credits for node in credit)
        weight = {node: value for credit in credits for node, value in credit.items()}
        loss_sum, num_batches = 0.0, 0
        self.model.train()
        self.optimizer.zero_grad()
        for nodes, owned in self.micro_batches(weight):
            advantage = np.repeat([weight[node] for node in owned],
                                  [node.num_sampled for node in owned])
            advantage = torch.tensor(advantage, dtype=torch.float32, device=self.device)
            loss = -(advantage * self.logprobs([(nodes, owned)])).sum() / loss_tokens
            loss.backward()
            loss_sum += loss.item()
            num_batches += 1
        norm = float(torch.nn.utils.clip_grad_norm_(self.trained, self.config.max_grad_norm))
        skipped = not (np.isfinite(norm) and np.isfinite(loss_sum))
        if num_batches and not skipped:
            self.optimizer.step()
        self.optimizer.zero_grad()
        return {"loss": loss_sum, "grad_norm": norm, "loss_tokens": loss_tokens,
                "update_skipped": int(skipped)}

    def micro_batches(self, weight):
        """[(nodes, owned)] of at most `micro_batch_tokens` tokens, or one path, that train every
        node with a weight once. A tree cut in two brings the path to the cut along."""
        batch, owned, num_tokens = {}, [], 0  # a dict keeps its order
        for node, value in weight.items():
            if not node.num_sampled or not value:
                continue  # it trains nothing
            new = sum(len(n.ids) for n in path(node) if n not in batch)
            if owned and num_tokens + new > self.config.micro_batch_tokens:
                yield list(batch), owned
                batch, owned, num_tokens, new = {}, [], 0, node.length
            batch.update(dict.fromkeys(path(node)))
            owned.append(node)
            num_tokens += new
        if owned:
            yield list(batch), owned

    # ------------------------------------------------------------ state
    def state_dict(self):
        """LoRA weights and optimiser state, for checkpoints."""
        from peft import get_peft_model_state_dict
        return {"adapter": get_peft_model_state_dict(self.model, save_embedding_layers=False),
                "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state):
        from peft import set_peft_model_state_dict
        if {name: x.shape for name, x in state["adapter"].items()} != {
                name: x.shape for name, x in self.state_dict()["adapter"].items()}:
            raise ModelError("the checkpoint was made with a model of other shapes")
        set_peft_model_state_dict(self.model, state["adapter"])
        self.optimizer.load_state_dict(state["optimizer"])

    def save_adapter(self, folder):
        """In peft's format: PeftModel.from_pretrained(base, folder) loads it. Written aside: the
        folder never holds half a file. (Left to find out whether embeddings are to be saved, peft
        would ask the hub, here and in state_dict.)"""
        aside = Path(f"{folder}.part")
        shutil.rmtree(aside, ignore_errors=True)  # what a kill may have left
        self.model.save_pretrained(aside, save_embedding_layers=False)
        Path(folder).mkdir(exist_ok=True)
        for file in aside.iterdir():
            file.replace(Path(folder, file.name))
        aside.rmdir()


def load_policy(config):
    """Policy of `config.model`: the embedded tiny model, a local folder or a hub id."""
    try:
        return Policy(*load_model(config), config)
    except ModelError as error:
        why = error
    except Exception as error:
        hint = "; --no-4bit does without bitsandbytes" if config.four_bit else ""
        why = f"cannot be used ({first_line(error)}){hint}"
        if config.device == "cuda" and torch.cuda.memory_stats().get("num_ooms"):
            why = "does not fit into the memory of the GPU"  # transformers hides the reason
    raise ModelError(f"model {config.model}: {why}")


def free_bytes(device):
    """Memory that PyTorch may still take on the device."""
    if device.type != "cuda":
        return CPU_BYTES
    free, total = torch.cuda.mem_get_info(device)
    most = torch.cuda.get_per_process_memory_fraction(device) * total
    most = min(free + torch.cuda.memory_reserved(device), most)
    return most - torch.cuda.memory_allocated(device)
