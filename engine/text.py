"""Text and ids: what comes from data stays plain text, and prompts are rendered once."""
import json
import re

from tokenizers import Tokenizer

from engine.errors import UsageError, first_line
from engine.examples import FEW_SHOT
from react_env import Question, observation_text, prompt_text

SLOT = Question("", "{the question}", (), "", 0)  # stands for any question in a prompt
DAY = "26 Jul 2024"  # in prompts: a date of today would change them from day to day
NOT_NOW = "{%- macro strftime_now(format) -%}" + DAY + "{%- endmacro -%}"
PREFIXES = {  # what puts a space before a text, in the parts of a tokenizer, as JSON
    r'"prepend": "[^"]*"': '"prepend": ""', r'"prepend_scheme": "\w+"': '"prepend_scheme": "never"',
    '"add_prefix_space": true': '"add_prefix_space": false'}
OPEN_TAG = re.compile(r"[<[]\w+[>\]]\s*$")


class Codec:
    """A tokenizer in two forms, both without the space that some put before every text: pieces
    of a transcript are encoded apart and must join again to the same text."""

    def __init__(self, tokenizer):
        parts = json.loads(tokenizer.backend_tokenizer.to_str())
        for name in ("normalizer", "pre_tokenizer"):
            part = json.dumps(parts[name])
            for put, nothing in PREFIXES.items():
                part = re.sub(put, nothing, part)
            parts[name] = json.loads(part)
        parts.update(post_processor=None, truncation=None, padding=None)
        self.tokenizer = tokenizer
        self.template = Tokenizer.from_str(json.dumps(parts))  # of a chat template's own words
        self.plain = Tokenizer.from_str(json.dumps(parts | {"added_tokens": []}))  # of data
        self.added = set(tokenizer.added_tokens_decoder) - {tokenizer.unk_token_id}
        self.check_joints()

    def encode(self, text):
        """Ids of plain text. No added token comes out of it, whatever the text looks like. Half
        of a surrogate pair, which JSON may hold, becomes a question mark."""
        text = text.encode(errors="replace").decode()
        ids = self.plain.encode(text).ids
        if not self.added.isdisjoint(ids):  # the word is in the model's own vocabulary too
            ids = []
            for character in text:
                ids += self.plain.encode(character).ids
        return ids

    def decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=True,
                                     clean_up_tokenization_spaces=False)

    def check_joints(self):
        """UsageError where pieces of a transcript do not join to the text that they are."""
        ids = self.encode("x")
        for piece in (" Where?", "\nThought:", observation_text("[A] (b),  Zürich 東京 x².")):
            text = self.decode(ids) + piece
            ids = ids + self.encode(piece)
            if self.decode(ids) != text:
                raise UsageError(f"its tokenizer does not keep text: {text!r} becomes "
                                 f"{self.decode(ids)!r}")

    def prompt(self, bare, room):
        """-> (ids before the question, ids behind it, what is to be told about them). Without the
        examples where it is to be `bare`, or where they take more than `room` tokens.

        The question is encoded apart, as plain text; a template's own special tokens stay special.
        Where there is a chat template, all stands in one user turn (some templates, Gemma's,
        refuse a system role), and the assistant's turn begins with "Thought:". (Models that were
        taught the bare prompt know no template.)"""
        chat = bool(self.tokenizer.chat_template) and not bare
        before, behind, told = self.pieces(FEW_SHOT if not bare else "", chat)
        if not bare and len(before) + len(behind) > room:
            before, behind, told = self.pieces("", chat)
            told += "\nthe examples do not fit into the context: prompting with the bare question"
        return before, behind, told

    def pieces(self, examples, chat):
        """The same, as it comes."""
        text, start, told = examples + prompt_text(SLOT), [], ""
        if chat:
            said, thought = text.rsplit("\n", 1)
            text = self.render(add_generation_prompt=True, user=said)
            if tag := OPEN_TAG.search(text):
                told = f"\nthe chat template leaves {tag[0].strip()} open before the first thought"
            text += thought
        elif self.tokenizer("a").input_ids[:1] == [self.tokenizer.bos_token_id]:
            start = [self.tokenizer.bos_token_id]
        if text.count(SLOT.text) != 1:
            raise UsageError("the chat template does not show what the user says, once")
        before, behind = text.split(SLOT.text)
        before = self.tokenizer(before.removesuffix(" "), add_special_tokens=False).input_ids
        return start + before, self.template.encode(behind).ids, told

    def end_of_turn(self):
        """Ids, at most one, with which the chat template ends what the assistant says."""
        if not self.tokenizer.chat_template:
            return set()
        text = self.render(user="?", assistant=SLOT.text).rpartition(SLOT.text)[2]
        ids = self.template.encode(text).ids
        return set([i for i in ids if i in self.tokenizer.added_tokens_decoder][:1])

    def render(self, add_generation_prompt=False, **said):
        """A conversation, role=text, as the chat template writes it. Reasoning models are asked
        not to think at length."""
        turns = [{"role": role, "content": text} for role, text in said.items()]
        try:
            return self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=add_generation_prompt,
                enable_thinking=False, date_string=DAY,
                chat_template=NOT_NOW + self.tokenizer.get_chat_template())
        except Exception as error:
            raise UsageError(f"the chat template fails: {first_line(error)}") from None
