"""An offline, forkable ReAct question-answering environment. No torch, no network.

    questions, wiki = load_questions("hotpot_dev_distractor_v1.json")
    env, transcript = ReActEnv(wiki, max_turns=7), prompt_text(questions[0])
    episode = env.reset(questions[0])
    while not episode.done:
        episode = env.step(episode, split_completion(my_model(transcript))[1])
        transcript += ...  # the completion, then observation_text(episode.observation)

The tools are those of ReAct (Yao et al. 2023, `wikienv.py`); each call is a turn:
  Search[title]    a hit shows the page's first five sentences, a miss similar titles
  Lookup[keyword]  the next sentence of the page that holds the keyword, in any case
  Finish[answer]   ends the episode; reward 1 if the answer is an exact match, else 0
Lenient beyond the original: white space before a capital (`  Search[x]`), and titles in
another case, with HTML entities or other white space. Stricter: `think[x]` is invalid.
As there, `Lookup[]` walks through the page, and without a page nothing is found. Faults
that are not repeated: an empty action or a backslash in a page raised, a timeout could
score, rewards were fuzzy and given again. An observation is one line, so that no text
can forge a transcript, and echoes at most 200 characters of an action.
"""
import html
import re
import string
from collections import Counter, namedtuple
from dataclasses import dataclass, replace

import numpy as np

MAX_ECHO = 200  # characters of an action that an observation repeats and BM25 sees
MAX_MATCH = 1000  # characters; the HTML entities of a longer title stay
TITLE_WEIGHT = 5.0  # a word of the title counts for more than the same word in a text


def normalize_answer(s):
    """Lower case, then without ASCII punctuation, a/an/the and extra white space."""
    text = s.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def answer_scores(prediction, golds, rules="hotpot"):
    """dict(em, f1, precision, recall) in [0, 1], each the best over the golds.

    The official rules of HotpotQA and 2WikiMultihopQA; with rules="musique" there is no
    yes/no rule and two empty answers have F1 1. None (never finished) scores 0.
    """
    if prediction is None:
        golds = ()
    best, closed = (0.0,) * 4, (["yes"], ["no"], ["noanswer"])
    for gold in [golds] if isinstance(golds, str) else golds:
        said, true = (normalize_answer(s).split() for s in (prediction, gold))
        same = sum((Counter(said) & Counter(true)).values())
        if rules != "musique" and said != true and (said in closed or true in closed):
            same = 0  # "yes, it is" is not half a "yes"
        overlap = (0.0,) * 3
        if same:
            overlap = (2 * same / (len(said) + len(true)), same / len(said),
                       same / len(true))
        elif rules == "musique" and not said + true:
            overlap = (1.0,) * 3
        best = tuple(map(max, best, (float(said == true), *overlap)))
    return dict(zip(("em", "f1", "precision", "recall"), best))


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
    rules: str = "hotpot"  # hotpot | 2wiki | musique | toy; toy scores as hotpot

    def score(self, prediction):
        """dict(em, f1, precision, recall) by the rules of the question's data set."""
        return answer_scores(prediction, self.answers, self.rules)


def _keys(title):
    """Four forms of a title, from exact to loose."""
    bare = title.strip()
    plain = html.unescape(bare) if len(bare) <= MAX_MATCH else bare
    return title, bare, plain, " ".join(plain.casefold().split())


class Wiki:
    """Articles from (title, sentences) pairs; `joiner` stands between sentences.

    A repeated title is one article that holds all its different texts, in order.
    """

    def __init__(self, articles, joiner=" "):
        self.joiner, self._pages, self._found, self._indexes = joiner, {}, {}, None
        texts = {}  # title: {text: None}, a set that keeps its order
        for title, sentences in articles:
            texts.setdefault(title, {})[tuple(sentences)] = None
        for title, (page, *further) in texts.items():
            for first, *rest in filter(None, further):  # "" must not glue two texts
                page += (first if joiner else " " + first, *rest)
            self._pages[title] = page
        self.titles = list(self._pages)
        for level in zip(*map(_keys, self._pages)):  # exact forms claim their key first
            for key, title in zip(level, self._pages):
                self._found.setdefault(key, title)

    def __len__(self):
        return len(self._pages)

    def find(self, title):
        """The article's own title, an exact hit before a loose one, or None."""
        return next((self._found[k] for k in _keys(title) if k in self._found), None)

    def sentences(self, title):
        """All sentences of an article, as a tuple; KeyError if there is none."""
        if (found := self.find(title)) is None:
            raise KeyError(title)
        return self._pages[found]

    def text(self, title):
        """The whole text of an article, all texts of a repeated title; or KeyError."""
        return self.joiner.join(self.sentences(title))

    def similar(self, query, k=5):
        """The min(k, len(self)) titles nearest to the query by BM25 on title and text.

        Ties, such as titles that share no word with it, come in the wiki's order.
        """
        if self._indexes is None:  # costs seconds at 100,000 articles, so only now
            texts = map(self.joiner.join, self._pages.values())
            self._indexes = self._pages and [
                _bm25(self._pages, b=0.3), _bm25(texts, b=0.75)]
        scores = np.zeros(len(self), np.float32)
        words = list(dict.fromkeys(re.findall(r"\w+", query[:MAX_ECHO].lower())))
        for index, weight in zip(self._indexes, (TITLE_WEIGHT, 1.0)):
            if ids := index.get_tokens_ids(words):
                scores += weight * index.get_scores_from_ids(ids)
        floor = np.sort(scores)[-k:].min(initial=np.inf)
        best = np.flatnonzero(scores >= floor)  # few: a stable sort of all takes 10 ms
        order = best[np.argsort(-scores[best], kind="stable")[:k]]
        return [self.titles[i] for i in order]


def _bm25(documents, b):  # b: how much length counts against a document, 0 to 1
    import bm25s  # here, since many runs never miss a title

    ids, vocab = [], {"": 0}  # word 0 stands for a document without words
    for document in documents:
        words = re.findall(r"\w+", document.lower()) or [""]
        ids.append([vocab.setdefault(word, len(vocab)) for word in words])
    index = bm25s.BM25(b=b, backend="numpy")
    index.index((ids, vocab), show_progress=False)
    return index


Action = namedtuple("Action", "kind argument")  # search | lookup | finish | invalid
_ACTION = re.compile(r"([Ss]earch|[Ll]ookup|[Ff]inish)\[(.*)\]", re.DOTALL)
_MARKER = re.compile(r"^[ \t]*Action(?: ?\d+)?:", re.MULTILINE)
_STOP = re.compile(r"[][]|\n[ \t]*Observation(?: ?\d+)?:")


def parse_action(text):
    """The Action in a string; its argument reaches to the final `]`, unaltered.

    Never raises: whatever is no action is "invalid", with the stripped text.
    """
    match = _ACTION.fullmatch(text := text.strip())
    return Action(match[1].lower(), match[2]) if match else Action("invalid", text)


def action_end(text):
    """Where to cut a growing completion: just past its first complete action, or None.

    Complete: the brackets opened after the first line that begins with `Action:` are
    balanced. An `Observation:` line before that is the policy's own, and cut off too.
    """
    depth, marker = 0, _MARKER.search(text)
    for stop in _STOP.finditer(text):
        if stop[0] not in "[]":
            return stop.start()
        if marker and stop.start() >= marker.end():
            depth += 1 if stop[0] == "[" else -1
            if depth <= 0:  # below 0: a `]` first, which cannot become an action
                return stop.end()
    return None


def split_completion(text):
    """(thought, action string) of a sampled turn, stripped; an action may be ""."""
    text = text[:action_end(text)]
    if not (marker := _MARKER.search(text)):
        return text.strip(), ""
    return text[:marker.start()].strip(), text[marker.end():].strip()


def observation_text(observation):
    """What follows an action in the transcript; the policy goes on with a thought."""
    return f"\nObservation: {observation}\nThought:"


def prompt_text(question, few_shot=False):
    """The transcript up to the first thought; few_shot for models not trained here."""
    return f"{FEW_SHOT if few_shot else ''}Question: {question.text}\nThought:"


FEW_SHOT = """\
Answer the question with an encyclopedia. Write one Thought and one Action at a time.
Search[title] shows the beginning of an article, or similar titles if there is none.
Lookup[keyword] shows the next sentence with that keyword in the article found last.
Finish[answer] gives the answer, as short as possible, and ends. Three examples:

Question: In which country was the composer of the opera The Glass Heron born?
Thought: I need the composer of The Glass Heron first.
Action: Search[The Glass Heron]
Observation: The Glass Heron is an opera by Ilse Varmond. It was first sung in 1911.
Thought: The composer is Ilse Varmond. Now I need her country of birth.
Action: Search[Ilse Varmond]
Observation: Ilse Varmond was a composer. She was born in Quellen, a port of Ostravia.
Thought: Quellen is in Ostravia.
Action: Finish[Ostravia]

Question: Of which illness did the engineer Corvan Hale die?
Thought: I look for Corvan Hale.
Action: Search[Corvan Hale]
Observation: Could not find Corvan Hale. Similar: [Corvan Hale (singer), Corvan Hale \
(engineer), Corvan, Hale Bridge, The Glass Heron]
Thought: There are two people of that name. I need the engineer.
Action: Search[Corvan Hale (engineer)]
Observation: Hale was an engineer. He drew bridges. He sang. He swam. He had a dog.
Thought: His death does not stand here. I look further down.
Action: Lookup[died]
Observation: (Result 1 / 1) He died of marsh fever in 1902.
Thought: He died of marsh fever.
Action: Finish[marsh fever]

Question: Do the rivers Dray and Lissow flow through the same province?
Thought: I need the province of each river. First the Dray.
Action: Search[Dray]
Observation: The Dray is a river in the province of Ombria.
Thought: The Dray is in Ombria. Now the Lissow.
Action: Search[Lissow]
Observation: The Lissow is a short river. It crosses the province of Kessel.
Thought: Ombria and Kessel are different provinces.
Action: Finish[no]

"""


@dataclass(frozen=True, slots=True)
class Episode:
    """The state after `turn` calls. Immutable: keeping a reference is forking."""
    question: Question
    turn: int = 0
    page: str | None = None  # title of the article that Lookup reads
    keyword: str | None = None
    lookup_index: int = 0  # results of this keyword already shown
    last_missed: bool = False  # the last action was a Search without a hit
    observation: str = ""
    prediction: str | None = None  # None until Finish
    reward: float = 0.0  # of the last step
    done: bool = False


class ReActEnv:
    def __init__(self, wiki, max_turns=7):
        self.wiki, self.max_turns = wiki, max_turns

    def reset(self, question):
        """The first state of an episode."""
        return Episode(question)

    def step(self, episode, action_text):
        """The next state, whatever the text. A finished one only loses its reward."""
        if episode.done:  # a reward is given once: a sum over steps counts it once
            return replace(episode, reward=0.0)
        kind, argument = parse_action(action_text)
        turn, echo = episode.turn + 1, argument[:MAX_ECHO]
        done = kind == "finish" or turn >= self.max_turns
        new = dict(turn=turn, done=done, last_missed=False)
        if kind == "search" and (title := self.wiki.find(argument)) is not None:
            shown = [s for s in self.wiki.sentences(title) if s.strip()][:5]
            text = self.wiki.joiner.join(shown) or "This article is empty."
            new |= dict(page=title, keyword=None, lookup_index=0)
        elif kind == "search":  # page and Lookup state stay
            similar = ", ".join(self.wiki.similar(argument))
            text = f"Could not find {echo}. Similar: [{similar}]"
            new |= dict(last_missed=True)
        elif kind == "lookup":
            page = () if episode.page is None else self.wiki.sentences(episode.page)
            word = argument.lower()
            hits = [s.strip() for s in page if s.strip() and word in s.lower()]
            i = episode.lookup_index if argument == episode.keyword else 0
            text = "No more results."
            if i < len(hits):
                text, i = f"(Result {i + 1} / {len(hits)}) {hits[i]}", i + 1
            new |= dict(keyword=argument, lookup_index=i)
        elif kind == "finish":
            reward = episode.question.score(argument)["em"]
            text = f"Episode finished, reward = {reward:.0f}"
            new |= dict(prediction=argument, reward=reward)
        else:
            text = f"Invalid action: {echo}"
        return replace(episode, observation=" ".join(text.splitlines()), **new)

    def step_batch(self, episodes, actions):
        """`step` on each pair; equal lengths, or ValueError."""
        return [self.step(*pair) for pair in zip(episodes, actions, strict=True)]


