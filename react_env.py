"""Questions answered with an encyclopedia, as in ReAct. No torch, no network.

    questions, wiki = load_questions("hotpot_dev_distractor_v1.json")  # of world.files
    env, transcript = ReActEnv(wiki), prompt_text(questions[0])
    episode = env.reset(questions[0])
    while not episode.done:
        completion = my_model(transcript)
        episode = env.step(episode, split_completion(completion)[1])
        transcript += completion + observation_text(episode.observation)

A turn is one call of a tool (Yao et al. 2023, `wikienv.py`):
  Search[title]    a hit shows the page's first five sentences, a miss similar titles
  Lookup[keyword]  the next sentence of that page that holds the keyword, in any case;
                   a keyword that is written in another way starts again
  Finish[answer]   ends the episode; reward 1 if the answer is an exact match, else 0

More is understood than by the original: white space around an action, marks around the
words `**Action:**`, `action :` and `SEARCH [x]`, which may be in any case, titles in another case,
with HTML entities or with other white space. One thing is not: `think[x]` is an invalid
action. As there, `Lookup[]` walks through the whole page. Faults of the original are not
repeated: an empty action or a backslash in a page raised an error, an episode that ran out of
turns could score, and rewards were fuzzy and given more than once.
"""
import html
import re
import string
from collections import Counter
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

SHOWN_SENTENCES = 5  # of a page, by Search; what stands later needs Lookup
MAX_ECHO = 200  # characters of an action that an observation repeats and BM25 sees
MAX_MATCH = 1000  # characters; HTML entities in a longer title are left as they are
TITLE_WEIGHT = 5.0  # a word of the title counts for more than the same word in a text
CLOSED_ANSWERS = (["yes"], ["no"], ["noanswer"])  # these are right or wrong, never half


# ---------------------------------------------------------------- metrics, questions
def normalize_answer(s):
    """Lower case, then without ASCII punctuation, a/an/the and extra white space."""
    text = s.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def answer_scores(prediction, golds, rules="hotpot"):
    """dict(em, f1, precision, recall) in [0, 1], each the best over the golds.

    The official rules of HotpotQA and 2WikiMultihopQA. Those of MuSiQue differ in two
    points: it has no yes/no rule, and two empty answers have F1 1.
    A prediction of None (the episode never finished) scores 0.
    """
    best = {"em": 0.0, "f1": 0.0, "precision": 0.0, "recall": 0.0}
    if prediction is None:
        return best
    if isinstance(golds, str):
        golds = [golds]
    for gold in golds:
        for name, score in _compare(prediction, gold, rules).items():
            best[name] = max(best[name], score)
    return best


def _compare(prediction, gold, rules):
    """The scores against one gold answer."""
    said = normalize_answer(prediction).split()
    true = normalize_answer(gold).split()
    if rules == "musique":  # two empty answers share one empty word
        said = said or [""]
        true = true or [""]
    num_same = (Counter(said) & Counter(true)).total()
    is_closed = said in CLOSED_ANSWERS or true in CLOSED_ANSWERS
    if is_closed and said != true and rules != "musique":
        num_same = 0  # "yes, it is" is not half a "yes"
    return {"em": float(said == true),
            "f1": 2 * num_same / max(1, len(said) + len(true)),
            "precision": num_same / max(1, len(said)),
            "recall": num_same / max(1, len(true))}


def exact_match(prediction, golds):
    """1.0 or 0.0 by the HotpotQA rules, the best over golds (str or list of str)."""
    return answer_scores(prediction, golds)["em"]


def f1_score(prediction, golds):
    """Token F1 by the HotpotQA rules, the best over golds (str or list of str)."""
    return answer_scores(prediction, golds)["f1"]


@dataclass(frozen=True)
class Question:
    id: str
    text: str  # word for word as in its file
    answers: tuple  # of str, with aliases
    kind: str
    num_hops: int
    gold_titles: tuple = ()  # distinct
    rules: str = "hotpot"  # hotpot | 2wiki | musique | toy; all but musique score alike

    def score(self, prediction):
        """dict(em, f1, precision, recall) by the rules of the question's data set."""
        return answer_scores(prediction, self.answers, self.rules)


# ---------------------------------------------------------------- the wiki
def _forms(title):
    """Four forms of a title, from exact to loose."""
    bare = title.strip()
    plain = html.unescape(bare) if len(bare) <= MAX_MATCH else bare
    return title, bare, plain, " ".join(plain.casefold().split())


class Wiki:
    """Articles from (title, sentences) pairs; `joiner` stands between sentences.

    A repeated title is one article that holds all its different texts, in order.
    """

    def __init__(self, articles, joiner=" "):
        self.joiner = joiner
        self.pages = {}  # title: sentences
        self._indexes = None  # for `similar`
        known = set()
        for title, sentences in articles:
            text = tuple(sentences)
            if (title, text) in known:
                continue
            known.add((title, text))
            page = self.pages.get(title)
            if page is not None and text and not joiner:  # do not glue two texts
                text = (" " + text[0], *text[1:])
            self.pages[title] = (page or ()) + text
        self.titles = list(self.pages)
        self._title_of = {}  # form: title
        forms = [_forms(title) for title in self.titles]
        for level in range(4):  # the exact forms of all titles come before loose ones
            for title, form in zip(self.titles, forms):
                self._title_of.setdefault(form[level], title)

    def __len__(self):
        return len(self.titles)

    def find(self, title):
        """The article's own title, an exact hit before a loose one, or None."""
        for form in _forms(title):
            if form in self._title_of:
                return self._title_of[form]
        return None

    def sentences(self, title):
        """All sentences of an article, as a tuple; KeyError if there is none."""
        found = self.find(title)
        if found is None:
            raise KeyError(title)
        return self.pages[found]

    def text(self, title):
        """The whole text of an article, all texts of a repeated title; or KeyError."""
        return self.joiner.join(self.sentences(title))

    def similar(self, query, k=5):
        """The min(k, len(self)) titles nearest to the query by BM25 on title and text.

        Ties, such as titles that share no word with it, come in the wiki's order.
        """
        if not self.titles:
            return []
        if self._indexes is None:  # costs seconds at 100,000 articles, so only now
            texts = map(self.joiner.join, self.pages.values())
            self._indexes = _bm25(self.titles, b=0.3), _bm25(texts, b=0.75)
        words = dict.fromkeys(re.findall(r"\w+", query[:MAX_ECHO].lower()))
        scores = np.zeros(len(self), np.float32)
        for index, weight in zip(self._indexes, (TITLE_WEIGHT, 1.0)):
            ids = index.get_tokens_ids(words)
            scores += weight * index.get_scores_from_ids(ids)
        order = np.argsort(-scores, kind="stable")
        return [self.titles[i] for i in order[:k]]


def _bm25(documents, b):
    """An index of texts; b is how much length counts against a text, 0 to 1."""
    import bm25s  # here, since many runs never miss a title

    words = bm25s.tokenize(documents, token_pattern=r"\w+", stopwords=None,
                           allow_empty=False, show_progress=False)
    index = bm25s.BM25(b=b, backend="numpy")
    index.index(words, show_progress=False)
    return index


# ---------------------------------------------------------------- actions and prompt
class Action(NamedTuple):
    kind: str  # search | lookup | finish | invalid
    argument: str


# Models write marks of emphasis and of lists around a word. Few: the time must stay bounded.
_MARKS = r"[ \t\u00a0*_`#>~.\-\"'()•\d]{0,12}"
_ACTION = re.compile(rf"[\s*_`]{{0,12}}(search|lookup|finish){_MARKS}\[(.*)\]",
                     re.DOTALL | re.IGNORECASE)
_MARKER = re.compile(rf"^{_MARKS}Action{_MARKS}:{_MARKS}", re.MULTILINE | re.IGNORECASE)
_STOP = re.compile(rf"[][]|\n{_MARKS}Observation{_MARKS}:", re.IGNORECASE)


def parse_action(text):
    """The Action in a string; its argument reaches to the final `]`, unaltered.

    Never raises: whatever is no action is "invalid", with the stripped text.
    """
    text = text.strip()
    match = _ACTION.fullmatch(text)
    if not match:
        return Action("invalid", text)
    return Action(match[1].lower(), match[2])


def action_end(text):
    """Where to cut a growing completion: just past its first complete action, or None.

    Complete: the brackets opened after the first line that begins with `Action:` are
    balanced. An `Observation:` line before that is the policy's own, and cut off too.
    """
    marker = _MARKER.search(text)
    depth = 0
    for stop in _STOP.finditer(text):
        if stop[0] not in "[]":
            return stop.start()
        if not marker or stop.start() < marker.end():
            continue  # a bracket within the thought
        depth += 1 if stop[0] == "[" else -1
        if depth <= 0:  # below 0: a `]` first, which cannot become an action
            return stop.end()
    return None


def split_completion(text):
    """(thought, action string) of a sampled turn, stripped; an action may be ""."""
    text = text[:action_end(text)]
    marker = _MARKER.search(text)
    if not marker:
        return text.strip(), ""
    return text[:marker.start()].strip(), text[marker.end():].strip()


def observation_text(observation):
    """What follows an action in the transcript; the policy goes on with a thought."""
    return f"\nObservation: {observation}\nThought:"


def prompt_text(question):
    """The transcript up to the first thought."""
    return f"Question: {question.text}\nThought:"


# ---------------------------------------------------------------- the environment
@dataclass(frozen=True, slots=True)
class Episode:
    """The state after `turn` calls. Immutable: keeping a reference is forking."""
    question: Question
    turn: int = 0
    page: str | None = None  # title of the article that Lookup reads
    keyword: str | None = None
    lookup_index: int = 0  # results of this keyword already shown
    last_missed: bool = False  # the last action was a Search without a hit
    observation: str = ""  # one line, so that no text can forge a transcript
    prediction: str | None = None  # None until Finish
    reward: float = 0.0  # of the last step
    done: bool = False


class ReActEnv:
    def __init__(self, wiki, max_turns=8):
        self.wiki = wiki
        self.max_turns = max_turns

    def reset(self, question):
        """The first state of an episode."""
        return Episode(question)

    def step(self, episode, action_text):
        """The next state, whatever the text. A finished one only loses its reward."""
        if episode.done:  # a reward is given once: a sum over steps counts it once
            return replace(episode, reward=0.0)
        kind, argument = parse_action(action_text)
        echo = argument[:MAX_ECHO]
        turn = episode.turn + 1
        done = turn >= self.max_turns
        new = replace(episode, turn=turn, done=done, last_missed=False)
        if kind == "search":
            title = self.wiki.find(argument)
            if title is None:  # page and Lookup state stay
                similar = ", ".join(self.wiki.similar(argument))
                text = f"Could not find {echo}. Similar: [{similar}]"
                new = replace(new, last_missed=True)
            else:
                shown = self._sentences(title)[:SHOWN_SENTENCES]
                text = self.wiki.joiner.join(shown) or "This article is empty."
                new = replace(new, page=title, keyword=None, lookup_index=0)
        elif kind == "lookup":
            index = episode.lookup_index if argument == episode.keyword else 0
            word = argument.lower()
            hits = [s for s in self._sentences(episode.page) if word in s.lower()]
            text = "No more results."
            if index < len(hits):
                text = f"(Result {index + 1} / {len(hits)}) {hits[index].strip()}"
                index += 1
            new = replace(new, keyword=argument, lookup_index=index)
        elif kind == "finish":
            reward = 0.0  # also for an answer that is nothing, where the right one is nothing
            if normalize_answer(argument):
                reward = episode.question.score(argument)["em"]
            text = f"Episode finished, reward = {reward:.0f}"
            new = replace(new, prediction=argument, reward=reward, done=True)
        else:
            text = f"Invalid action: {echo}"
        return replace(new, observation=" ".join(text.splitlines()))

    def _sentences(self, page):
        """The sentences of a page that are not blank; none without a page."""
        if page is None:
            return []
        return [s for s in self.wiki.sentences(page) if s.strip()]
