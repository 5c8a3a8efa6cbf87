"""Questions of real files: HotpotQA, 2WikiMultihopQA, MuSiQue; and the official predictions."""
import json
import re
from pathlib import Path

from engine.errors import UsageError
from engine.files import write_aside
from react_env import Question, Wiki

# Shapes of records for _check: {field or place: shape}, [shape of every item], or a type.
COMMON = {"id": str, "question": str, "answer": (str, type(None))}
HOTPOT = COMMON | {"type": str, "context": [{0: str, 1: [str]}],  # 2WikiMultihopQA's too
                   "supporting_facts": [{0: str, 1: int}]}
MUSIQUE = COMMON | {"answer_aliases": [str], "answerable": bool,
                    "paragraphs": [{"title": str, "paragraph_text": str}]}
UNTOLD = {"answer": None, "answer_aliases": [], "answerable": True, "type": "",
          "supporting_facts": []}  # by test splits
NESTED = {"context", "supporting_facts", "paragraphs", "answer_aliases"}
ALIASES = {"Q_id": str, "aliases": [str], "demonyms": [str]}
SENTENCE_END = re.compile(r"(?<=[.!?]) (?=\S)")  # in MuSiQue; " " joins it again


def load_questions(path):
    """(list of Question, Wiki of all their paragraphs); UsageError if it cannot be used.

    HotpotQA, 2WikiMultihopQA or MuSiQue, told by the first record's fields, in the official form
    or as the datasets library writes it. `num_hops`: 2 in HotpotQA, the gold titles in 2Wiki, as
    the id says in MuSiQue. 2Wiki's aliases come from the official `id_aliases.json` if that lies
    beside the file. A question whose answer is not told has none; one that the file calls
    unanswerable has none either, and is of kind "unanswerable".
    """
    records = _records(path)
    fields = set(records[0]) if isinstance(records[0], dict) else set()
    rules, shape = "hotpot", HOTPOT
    if fields & {"paragraphs", "question_decomposition"}:
        rules, shape = "musique", MUSIQUE
    elif fields & {"evidences", "entity_ids"}:
        rules = "2wiki"
    aliases = _read_aliases(Path(path).with_name("id_aliases.json")) if rules == "2wiki" else {}
    questions, articles = [], []
    for number, record in enumerate(records, 1):
        _check(record, shape, f"{path}: record {number}")
        id = record["id"]
        if rules == "musique":
            more = record["answer_aliases"]
            kind = id.split("__")[0]  # "3hop1"
            pages = record["paragraphs"]
            articles += [(p["title"], SENTENCE_END.split(p["paragraph_text"])) for p in pages]
            gold = [p["title"] for p in pages if p.get("is_supporting")]
            num_hops = int(kind[0]) if kind[:1].isdecimal() else len(gold)
        else:
            kind = record["type"]
            more = aliases.get(str(record.get("answer_id")), ())
            articles += [page[:2] for page in record["context"]]
            gold = [fact[0] for fact in record["supporting_facts"]]
            num_hops = 2 if rules == "hotpot" else len(set(gold))
        answers = (record["answer"], *more) if record["answer"] else ()
        if not record["answerable"]:
            kind, answers = "unanswerable", ()
        gold = tuple(dict.fromkeys(gold))
        questions.append(
            Question(id, record["question"], answers, kind, num_hops, gold, rules))
    return questions, Wiki(articles, joiner="" if rules == "hotpot" else " ")


def _read_aliases(file):
    """{id of an answer: its other names}, empty without the file."""
    aliases = {}
    if file.exists():
        for number, names in enumerate(_records(file), 1):
            _check(names, ALIASES, f"{file}: record {number}")
            aliases[names["Q_id"]] = names["aliases"] + names["demonyms"]
    return aliases


def _records(path):
    """The records of a JSON list or of JSON lines, at least one, in the official form."""
    where, records = path, []
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        is_list = text.lstrip().startswith("[")
        found = json.loads(text) if is_list else filter(str.strip, text.split("\n"))
        for record in found:  # lines do not end at U+2028
            where = f"{path}: record {len(records) + 1}"
            records.append(_unfold(record if is_list else json.loads(record)))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: JSON, UTF-8
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{where}: {reason}") from None
    if not records:
        raise UsageError(f"{path}: no questions")
    return records


def _unfold(record):
    """The official form of a record. The datasets library writes nested fields as JSON in a
    string, or column by column; the id has two names; test splits leave fields out."""
    if not isinstance(record, dict):
        return record
    told = dict(UNTOLD)
    for name, value in record.items():
        if name in NESTED:
            value = _unfold_field(name, value)
        if value is not None:
            told["id" if name == "_id" else name] = value
    return told


def _unfold_field(name, value):
    if isinstance(value, str):
        value = json.loads(value or "[]")
    columns = value.values() if isinstance(value, dict) else ()
    if columns and all(isinstance(column, list) for column in columns):
        value = [dict(zip(value, row)) for row in zip(*columns, strict=True)]
    if name in ("context", "supporting_facts") and isinstance(value, list):
        value = [_row(item) if isinstance(item, dict) else item for item in value]
    return value


def _row(fields):
    """The values of a record as a list, the title first."""
    return [fields[name] for name in sorted(fields, key=lambda name: name != "title")]


def _check(value, shape, where):
    """UsageError that says where a JSON value has another shape."""
    if isinstance(shape, dict):
        for name in shape:
            try:
                inner = value[name]
            except (LookupError, TypeError):
                raise UsageError(f"{where}: field '{name}' is missing") from None
            _check(inner, shape[name], f"{where}: field '{name}'")
    elif isinstance(shape, list):
        _check(value, (list, tuple), where)
        for i, item in enumerate(value):
            _check(item, shape[0], f"{where}[{i}]")
    elif not isinstance(value, shape):
        name = shape[0].__name__ if isinstance(shape, tuple) else shape.__name__
        raise UsageError(f"{where} is not a {name}")


def write_predictions(folder, questions, predictions):
    """Write {id: answer} as the official scripts want it; returns the path.

    MuSiQue: `predictions.jsonl`, a line per question in order; else `predictions.json`,
    where the scripts then report that supporting facts are missing, which is true.
    A missing or None answer is written as "". The file appears whole or not at all.
    """
    answers = {q.id: predictions.get(q.id) or "" for q in questions}
    file = Path(folder, "predictions.json")
    lines = [{"answer": answers, "sp": {}, "evidence": {}}]
    if questions and questions[0].rules == "musique":
        file = file.with_suffix(".jsonl")
        lines = [{"id": id, "predicted_answer": answer, "predicted_support_idxs": [],
                  "predicted_answerable": answer != ""} for id, answer in answers.items()]
    with write_aside(file) as stream:
        for line in lines:
            stream.write(json.dumps(line).encode() + b"\n")
    return file
