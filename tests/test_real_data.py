"""Real files: samples of HotpotQA, 2WikiMultihopQA and MuSiQue, bad files, predictions."""
import json

import pytest

from engine.errors import UsageError
from react_env import ReActEnv
from world.files import load_questions, write_predictions

FILES = {"hotpot": "hotpotqa_sample.json", "2wiki": "2wikimultihopqa_sample.json",
         "musique": "musique_sample.jsonl"}


@pytest.fixture(scope="module", params=FILES)
def sample(request, shared_data):
    """(rules, records, questions, wiki) of one sample file."""
    path = shared_data / FILES[request.param]
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        text = f"[{','.join(text.splitlines())}]"
    return request.param, json.loads(text), *load_questions(path)


def test_every_question_is_read_word_for_word_and_answered_with_the_tools(sample):
    rules, records, questions, wiki = sample
    env = ReActEnv(wiki, max_turns=99)
    for question, record in zip(questions, records, strict=True):
        assert question.text == record["question"] and question.rules == rules
        if rules == "musique":
            assert question.id == record["id"] and question.num_hops == int(question.id[0])
            assert question.answers == (record["answer"], *record["answer_aliases"])
            assert question.id.startswith(question.kind + "__")
        else:
            assert question.id == record["_id"] and question.kind == record["type"]
            num_hops = 4 if question.kind == "bridge_comparison" else 2
            assert question.num_hops == len(question.gold_titles) == num_hops
        state = env.reset(question)
        for title in question.gold_titles:
            state = env.step(state, f"Search[{title}]")
            assert state.page == title
        assert env.step(state, f"Finish[{record['answer']}]").reward == 1


def test_no_paragraph_is_lost(sample):
    """MuSiQue repeats titles: the first text alone loses gold for 16 of 100 questions.
    HotpotQA's sentences carry their own spaces, those of the others do not."""
    rules, records, _, wiki = sample
    titles = set()
    joiner = "" if rules == "hotpot" else " "
    for record in records:
        if rules == "musique":
            pages = [(page["title"], page["paragraph_text"]) for page in record["paragraphs"]]
        else:
            pages = [(title, joiner.join(text)) for title, text in record["context"]]
        for title, text in pages:
            assert text in wiki.text(title)
            titles.add(title)
    assert set(wiki.titles) == titles


# ---------------------------------------------------------------- small files of our own
HOTPOT = {"_id": "h1", "question": "Q?", "answer": "A", "type": "bridge",
          "supporting_facts": [["T", 9]], "context": [["T", ["One.", " Two."]], ["E", [""]]]}
TWOWIKI = {**HOTPOT, "evidences": [], "answer_id": "Q7"}
MUSIQUE = {"id": "3hop1__1_2_3", "question": "Q?", "answer": "A", "answer_aliases": ["B"],
           "paragraphs": [{"title": "T", "paragraph_text": "One. Mr.  X? Two.\u2028Three",
                           "is_supporting": True}]}
ALIASES = {"Q_id": "Q7", "aliases": ["Alpha"], "demonyms": ["An"]}


def write(path, *records, lines=False):
    texts = [json.dumps(record, ensure_ascii=False) for record in records]
    text = "\n".join(texts) if lines else f"[{', '.join(texts)}]"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize("record, rules, num_hops", [
    (HOTPOT, "hotpot", 2), (TWOWIKI, "2wiki", 1), (MUSIQUE, "musique", 3)])
def test_the_content_tells_the_format(tmp_path, record, rules, num_hops, lines):
    questions, wiki = load_questions(write(tmp_path / "data.txt", record, record, lines=lines))
    assert [(q.rules, q.num_hops) for q in questions] == [(rules, num_hops)] * 2
    if rules == "musique":  # U+2028 inside a line; joining gives the text back exactly
        assert wiki.text("T") == MUSIQUE["paragraphs"][0]["paragraph_text"]
        assert wiki.sentences("T") == ("One.", "Mr.  X?", "Two.\u2028Three")


def test_2wiki_aliases_lie_beside_the_file(tmp_path):
    path = write(tmp_path / "dev.json", TWOWIKI, {**TWOWIKI, "answer_id": None})
    write(tmp_path / "id_aliases.json", ALIASES, lines=True)
    first, second = load_questions(path)[0]
    assert first.answers == ("A", "Alpha", "An") and second.answers == ("A",)


def refusal(path):
    """The one line that says why a file cannot be used, without the file's name."""
    with pytest.raises(UsageError) as error:
        load_questions(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
    return str(error.value)[len(str(path)):]


@pytest.mark.parametrize("text, other, words", [
    ('"question": "Q?",', "", "'question' is missing"),
    ('[["T", 9]]', "{}", "'supporting_facts' is not a list"),
    ('" Two."', "5", "'context'[0]: field '1'[1] is not a str")])
def test_a_bad_record_is_named(tmp_path, text, other, words):
    bad = json.loads(json.dumps(HOTPOT).replace(text, other))
    path = write(tmp_path / "bad.json", HOTPOT, bad)
    assert refusal(path) == f": record 2: field {words}"


@pytest.mark.parametrize("content, words", [
    (b" \n\n", ": no questions"), (b"[]", ": no questions"),
    (b"7", ": record 1: field 'id' is missing"), (b'{"data": []}\n{]', ": record 2: Expecting"),
    (b'[{"_id": "a"},', ": Expecting"), (b"[\xff]", ": 'utf-8' codec"),
    (b"[" * 100_000, ": maximum recursion")])
def test_a_file_that_cannot_be_read(tmp_path, content, words):
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    assert refusal(path).startswith(words)


def test_a_path_that_is_no_file(tmp_path):
    assert refusal(tmp_path / "none.json") == ": No such file or directory"
    assert refusal(tmp_path) == ": Is a directory"
    assert "null" in refusal("a\0b")


def test_predictions_files(sample, tmp_path):
    """The official scripts want every id, MuSiQue's in the order of the gold file."""
    questions = sample[2]
    wanted = dict.fromkeys([question.id for question in questions], "Ä [x]\n")
    wanted[questions[1].id] = ""
    given = {**wanted, questions[1].id: None, "of another file": "y"}
    path = write_predictions(tmp_path, questions, given)
    text = path.read_text()
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in text.splitlines()]
        assert rows == [{"id": id, "predicted_answer": answer, "predicted_support_idxs": [],
                         "predicted_answerable": answer != ""} for id, answer in wanted.items()]
    else:
        assert json.loads(text) == {"answer": wanted, "sp": {}, "evidence": {}}
    assert (path.suffix == ".jsonl") == (questions[0].rules == "musique")
    assert list(tmp_path.iterdir()) == [path]
