"""Questions of real files: HotpotQA, 2WikiMultihopQA, MuSiQue; and the official predictions."""
import json
import re
from pathlib import Path

from react_env import Question, Wiki


class DataError(ValueError):
    """A file that cannot be used: one line that names the file, record and field."""


# Shapes of records, for _check: {field: shape}, [shape], (shape, shape) or a type.
_HOTPOT = dict(_id=str, question=str, answer=str, type=str, context=[(str, [str])],
               supporting_facts=[(str, int)])  # 2WikiMultihopQA's too
_MUSIQUE = dict(id=str, question=str, answer=str, answer_aliases=[str], paragraphs=[
    dict(title=str, paragraph_text=str, is_supporting=bool)])
_SENTENCE_END = re.compile(r"(?<=[.!?]) (?=\S)")  # in MuSiQue; " " joins it again
_ALIASES = dict(Q_id=str, aliases=[str], demonyms=[str])


def load_questions(path):
    """(list of Question, Wiki of all their paragraphs); DataError if it cannot be used.

    HotpotQA, 2WikiMultihopQA or MuSiQue, told by the first record's fields. `num_hops`:
    2 in HotpotQA, the gold titles in 2Wiki, as the id says in MuSiQue. 2Wiki's aliases
    come from the official `id_aliases.json` if that lies beside the file.
    """
    records, questions, articles, aliases = _records(path), [], [], {}
    fields = set(records[0]) if isinstance(records[0], dict) else set()
    rules = ("musique" if fields & {"paragraphs", "question_decomposition"} else
             "2wiki" if fields & {"evidences", "entity_ids"} else "hotpot")
    beside = Path(path).with_name("id_aliases.json")
    if rules == "2wiki" and beside.exists():
        for n, names in enumerate(_records(beside), 1):
            _check(names, _ALIASES, f"{beside}: record {n}")
            aliases[names["Q_id"]] = names["aliases"] + names["demonyms"]
    for n, record in enumerate(records, 1):
        shape = _MUSIQUE if rules == "musique" else _HOTPOT
        _check(record, shape, f"{path}: record {n}")
        if rules == "musique":
            id, more = record["id"], record["answer_aliases"]
            paragraphs = record["paragraphs"]
            articles += [(p["title"], _SENTENCE_END.split(p["paragraph_text"]))
                         for p in paragraphs]
            gold = [p["title"] for p in paragraphs if p["is_supporting"]]
            kind = id.split("__")[0]  # "3hop1"
            num_hops = int(kind[0]) if kind[:1].isdecimal() else len(gold)
        else:
            id, kind = record["_id"], record["type"]
            more = aliases.get(str(record.get("answer_id")), ())
            articles += record["context"]
            gold = [title for title, _ in record["supporting_facts"]]
            num_hops = 2 if rules == "hotpot" else len(set(gold))
        answers, gold = (record["answer"], *more), tuple(dict.fromkeys(gold))
        questions.append(
            Question(id, record["question"], answers, kind, num_hops, gold, rules))
    return questions, Wiki(articles, joiner="" if rules == "hotpot" else " ")


def _records(path):
    """The non-empty list of records in a JSON list or in JSON lines."""
    where, records = path, []
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        if text.lstrip().startswith("["):
            records = json.loads(text)
        else:
            for line in filter(str.strip, text.split("\n")):  # not at U+2028
                where = f"{path}: record {len(records) + 1}"
                records.append(json.loads(line))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: JSON, UTF-8
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{where}: {reason}") from None
    if not records:
        raise DataError(f"{path}: no questions")
    return records


def _check(value, shape, where):
    """DataError unless a JSON value has the shape (a tuple: a list of that length)."""
    if isinstance(shape, dict):
        for name in shape:
            if not isinstance(value, dict) or name not in value:
                raise DataError(f"{where}: field '{name}' is missing")
            _check(value[name], shape[name], f"{where}: field '{name}'")
        return
    kind, length = (shape, "") if isinstance(shape, type) else (list, len(shape))
    if not isinstance(value, kind):
        raise DataError(f"{where} is not a {kind.__name__}")
    if kind is list and len(value) != length > 1:
        raise DataError(f"{where} has {len(value)} items, not {length}")
    for i, item in enumerate(value if kind is list else ()):
        _check(item, shape[i % length], f"{where}[{i}]")


def write_predictions(folder, questions, predictions):
    """Write {id: answer} as the official scripts want it; returns the path.

    MuSiQue: `predictions.jsonl`, a line per question in order; else `predictions.json`,
    where the scripts then report that supporting facts are missing, which is true.
    A missing or None answer is written as "". The file appears whole or not at all.
    """
    answers = {q.id: predictions.get(q.id) or "" for q in questions}
    name, lines = "predictions.json", [dict(answer=answers, sp={}, evidence={})]
    if questions and questions[0].rules == "musique":
        name, lines = "predictions.jsonl", [
            dict(id=q.id, predicted_answer=answers[q.id], predicted_support_idxs=[],
                 predicted_answerable=True) for q in questions]
    Path(folder).mkdir(parents=True, exist_ok=True)
    temporary = Path(folder, name + ".tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return temporary.replace(Path(folder, name))
