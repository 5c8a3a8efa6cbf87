"""Real files: HotpotQA, 2WikiMultihopQA, MuSiQue samples, bad files, predictions."""
import html
import json
from pathlib import Path

import pytest

import react_env as R

SHARED = Path(__file__).resolve().parents[1].parent / "shared" / "data"
FILES = {"hotpot": "hotpotqa_sample.json", "2wiki": "2wikimultihopqa_sample.json",
         "musique": "musique_sample.jsonl"}


@pytest.fixture(scope="module", params=FILES)
def sample(request):
    """(rules, records, questions, wiki) of one sample file."""
    path = SHARED / FILES[request.param]
    if not path.exists():
        pytest.skip(f"{path} is not there: the sample data come with the project's share")
    text = path.read_text(encoding="utf-8")
    records = (json.loads(text) if path.suffix == ".json"
               else [json.loads(line) for line in text.splitlines()])
    return request.param, records, *R.load_questions(path)


def test_every_question_is_read_word_for_word(sample):
    rules, records, questions, wiki = sample
    assert len(questions) == len(records) == 100
    for question, record in zip(questions, records):
        assert question.text == record["question"] and question.rules == rules
        assert question.answers[0] == record["answer"]
        assert question.score(record["answer"])["em"] == 1
        assert question.gold_titles and all(wiki.find(t) == t for t in question.gold_titles)
        if rules == "musique":
            assert question.id == record["id"] and question.num_hops == int(question.id[0])
            assert question.answers[1:] == tuple(record["answer_aliases"])
            assert question.id.startswith(question.kind + "__")
        else:
            assert question.id == record["_id"] and question.kind == record["type"]
            bridge = question.kind == "bridge_comparison"
            assert question.num_hops == len(question.gold_titles) == (4 if bridge else 2)


def test_no_paragraph_is_lost(sample):
    """MuSiQue repeats titles: the first text alone loses gold for 16 of 100 questions."""
    rules, records, _, wiki = sample
    titles = set()
    for record in records:
        for paragraph in record["paragraphs" if rules == "musique" else "context"]:
            title, text = ((paragraph["title"], paragraph["paragraph_text"])
                           if rules == "musique" else
                           (paragraph[0], wiki.joiner.join(paragraph[1])))
            assert text in wiki.text(title) and wiki.text(title).count(text) >= 1
            titles.add(title)
    assert set(wiki.titles) == titles and len(wiki) == len(titles)
    assert wiki.joiner == ("" if rules == "hotpot" else " ")


def test_titles_of_real_files(sample):
    rules, _, questions, wiki = sample
    for title in wiki.titles:  # a reader types the plain form, in any case
        assert html.unescape(wiki.find(html.unescape(title))) == html.unescape(title)
        assert wiki.find(title.lower()).casefold() == title.casefold()
    if rules == "hotpot":
        assert sum("&" in html.unescape(t) != t for t in wiki.titles) > 0
        assert wiki.find("Lilo & Stitch") == "Lilo &amp; Stitch"
    if rules == "2wiki":
        assert wiki.find("Brass buttons") != wiki.find("Brass Buttons")
        assert wiki.find("Get Low (Dillon Francis And Dj Snake Song)")
    if rules == "musique":
        assert sum(len(wiki.sentences(t)) for t in wiki.titles) > 3 * len(wiki)


def test_gold_pages_are_read_with_the_tools(sample):
    rules, records, questions, wiki = sample
    env = R.ReActEnv(wiki)
    for question in questions:
        state = env.reset(question)
        for title in question.gold_titles:
            state = env.step(state, f"Search[{title}]")
            assert state.page == title and not state.last_missed
            state = R.replace(state, turn=0)
        assert env.step(state, f"Finish[{question.answers[0]}]").reward == 1


def test_sentences_join_as_their_data_set_wants(sample):
    rules, records, questions, wiki = sample
    if rules == "hotpot":
        title, sentences = records[0]["context"][0]
        assert len(sentences) == 4
        state = R.ReActEnv(wiki).step(R.Episode(questions[0]), f"Search[{title}]")
        assert state.observation == "".join(sentences)
    else:
        assert not any(s.startswith(" ") for s in wiki.sentences(wiki.titles[0]))


# ---------------------------------------------------------------- small files of our own
HOTPOT = dict(_id="h1", question="Q?", answer="A", type="bridge", level="easy",
              supporting_facts=[["T", 9]], context=[["T", ["One.", " Two."]], ["E", [""]]])
TWOWIKI = dict(HOTPOT, evidences=[], entity_ids="Q1", answer_id="Q7")
MUSIQUE = dict(id="3hop1__1_2_3", question="Q?", answer="A", answer_aliases=["B"],
               answerable=True, question_decomposition=[], paragraphs=[
                   dict(idx=0, title="T", paragraph_text="One. Mr.  X? Two.\u2028Three",
                        is_supporting=True)])


def write(path, records, lines=False):
    text = ("\n".join(json.dumps(r, ensure_ascii=False) for r in records) if lines
            else json.dumps(records))
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("record, rules", [
    (HOTPOT, "hotpot"), (TWOWIKI, "2wiki"), (MUSIQUE, "musique")])
@pytest.mark.parametrize("lines", [False, True])
def test_the_content_tells_the_format(tmp_path, record, rules, lines):
    questions, wiki = R.load_questions(write(tmp_path / "data.txt", [record] * 2, lines))
    assert [q.rules for q in questions] == [rules] * 2
    assert questions[0].num_hops == {"hotpot": 2, "2wiki": 1, "musique": 3}[rules]
    if rules == "musique":  # U+2028 inside a line; joining gives the text back exactly
        assert wiki.text("T") == MUSIQUE["paragraphs"][0]["paragraph_text"]
        assert wiki.sentences("T") == ("One.", "Mr.  X?", "Two.\u2028Three")


def test_2wiki_aliases_lie_beside_the_file(tmp_path):
    path = write(tmp_path / "dev.json", [TWOWIKI, dict(TWOWIKI, answer_id=None)])
    write(tmp_path / "id_aliases.json",
          [dict(Q_id="Q7", aliases=["Alpha"], demonyms=["An"])], lines=True)
    first, second = R.load_questions(path)[0]
    assert first.answers == ("A", "Alpha", "An") and second.answers == ("A",)
    (tmp_path / "id_aliases.json").write_text('{"Q_id": "Q7"}')
    with pytest.raises(R.DataError, match="id_aliases.json: record 1: field 'aliases'"):
        R.load_questions(path)


def broken(record, *path, value=None):
    """A deep copy of the record with one field replaced, or removed without a value."""
    record = json.loads(json.dumps(record))
    spot = record
    for key in path[:-1]:
        spot = spot[key]
    if value is None:
        del spot[path[-1]]
    else:
        spot[path[-1]] = value
    return record


@pytest.mark.parametrize("second, words", [
    (broken(HOTPOT, "question"), "'question' is missing"),
    (broken(HOTPOT, "context"), "'context' is missing"),
    (broken(HOTPOT, "answer", value=3), "'answer' is not a str"),
    (broken(HOTPOT, "context", value={"title": []}), "'context' is not a list"),
    (broken(HOTPOT, "context", 1, 1, value="E"), r"'context'\[1\]\[1\] is not a list"),
    (broken(HOTPOT, "context", 0, 1), r"'context'\[0\] has 1 items, not 2"),
    (broken(HOTPOT, "context", 0, 1, 1, value=5), r"'context'\[0\]\[1\]\[1\] is not a str"),
    (broken(HOTPOT, "supporting_facts", 0, 0, value=5), r"'supporting_facts'\[0\]\[0\]"),
    ([], "'_id' is missing"), (7, "'_id' is missing")])
def test_a_bad_hotpot_record_is_named(tmp_path, second, words):
    path = write(tmp_path / "bad.json", [HOTPOT, second])
    with pytest.raises(R.DataError, match=rf"bad\.json: record 2: field {words}") as error:
        R.load_questions(path)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("record, words", [
    (broken(MUSIQUE, "paragraphs"), "'paragraphs' is missing"),
    (broken(MUSIQUE, "answer_aliases"), "'answer_aliases' is missing"),
    (broken(MUSIQUE, "paragraphs", 0, "title"), r"'paragraphs'\[0\]: field 'title' is missing"),
    (broken(MUSIQUE, "paragraphs", 0, "is_supporting", value="yes"),
     r"'paragraphs'\[0\]: field 'is_supporting' is not a bool"),
    (dict(data=[], version="1.1"), "'_id' is missing"),  # another schema: SQuAD
    (broken(TWOWIKI, "type"), "'type' is missing")])
def test_a_bad_first_record_is_named(tmp_path, record, words):
    path = write(tmp_path / "bad.json", [record], lines=True)
    with pytest.raises(R.DataError, match=rf"bad\.json: record 1: field {words}") as error:
        R.load_questions(path)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("content, words", [
    (b"", "no questions"), (b" \n\n", "no questions"), (b"[]", "no questions"),
    (b"{", "record 1: Expecting"), (b"hello", "record 1: Expecting"),
    (b'[{"_id": "a"},', "bad.json: Expecting .* line 1 column"),
    (json.dumps(MUSIQUE).encode() + b"\n{]", "record 2: Expecting"),
    (b"[\xff]", "utf-8.* position 1"), (b"[" * 100_000, "recursion"),
    (b"[" + b"1" * 5000 + b"]", "bad.json: ")])
def test_a_file_that_is_no_json(tmp_path, content, words):
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(R.DataError, match=words) as error:
        R.load_questions(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_a_path_that_is_no_file(tmp_path):
    for path, words in ((tmp_path / "none.json", "No such file"), (tmp_path, "directory"),
                        ("a\0b", "null")):
        with pytest.raises(R.DataError, match=words) as error:
            R.load_questions(path)
        assert str(error.value).startswith(str(path))


def test_predictions_files(sample, tmp_path):
    rules, records, questions, _ = sample
    answers = {q.id: "Ä [x]\n" for q in questions[1:]} | {questions[1].id: None, "zz": "y"}
    path = R.write_predictions(tmp_path / "run", questions, answers)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    if rules == "musique":  # its script wants the gold file's ids in the gold file's order
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert path.name == "predictions.jsonl"
        assert [row["id"] for row in rows] == [record["id"] for record in records]
        assert [row["predicted_answer"] for row in rows[:3]] == ["", "", "Ä [x]\n"]
        assert all(row["predicted_support_idxs"] == [] and
                   row["predicted_answerable"] is True for row in rows)
    else:
        saved = json.loads(path.read_text())
        assert path.name == "predictions.json" and saved["sp"] == saved["evidence"] == {}
        assert list(saved["answer"]) == [record["_id"] for record in records]
        assert list(saved["answer"].values())[:3] == ["", "", "Ä [x]\n"]
    R.write_predictions(tmp_path / "run", questions, {})  # replaces, leaves nothing else
    assert len(list(path.parent.iterdir())) == 1
