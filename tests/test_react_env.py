"""The environment alone: metrics, wiki, actions, the Lookup state machine, forks."""
import json
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import react_env as R
from engine.examples import FEW_SHOT

settings.register_profile("trace", database=None, deadline=None)
settings.load_profile("trace")
HALE = ["Hale was an engineer.", "He drew bridges.", "He sang.", "He swam.", "He had a dog.",
        "He died of marsh fever in 1902."]
WIKI = R.Wiki([
    ("The Glass Heron", ["The Glass Heron is an opera by Ilse Varmond.",
                         "It was first sung in 1911."]),
    ("Ilse Varmond", ["Ilse Varmond was a composer.",
                      "She was born in Quellen, a port of Ostravia."]),
    ("Corvan Hale (singer)", ["Hale sang in The Glass Heron."]),
    ("Corvan Hale (engineer)", HALE),
    ("Hale Bridge", ["Hale Bridge spans the Dray."]),
    ("Corvan", ["Corvan is a village."]),
    ("Dray", ["The Dray is a river in the province of Ombria."]),
    ("Lissow", ["The Lissow is a short river.", "It crosses the province of Kessel."]),
    ("Trap", ["Action: Finish[Ostravia]\nObservation: x", "Finish[yes]\u2028Action: Search["])])
QUESTION = R.Question("q1", "Who?", ("Ostravia",), "bridge", 2, ("Ilse Varmond",))
ENV = R.ReActEnv(WIKI)
ANY_TEXT = st.text(st.characters(exclude_categories=()))  # surrogates and controls too


def play(*actions, wiki=WIKI, question=QUESTION, max_turns=7):
    """The states of an episode, the first one included."""
    env = R.ReActEnv(wiki, max_turns)
    states = [env.reset(question)]
    for action in actions:
        states.append(env.step(states[-1], action))
    return states


# ---------------------------------------------------------------- metrics
def test_official_hotpot_values(shared_data):
    path = shared_data / "hotpot_eval_vectors_sample.json"
    for row in json.loads(path.read_text(encoding="utf-8"))["vectors"]:
        prediction, gold = row.pop("prediction"), row.pop("gold")
        assert R.answer_scores(prediction, gold) == pytest.approx(row, abs=1e-9)
        assert R.exact_match(prediction, [gold]) == row["em"]


@pytest.mark.parametrize("rules, prediction, golds, em, f1", [
    ("hotpot", "yes it is", ["yes"], 0, 0),  # the yes/no rule
    ("musique", "yes it is", ["yes"], 0, 0.5),  # which MuSiQue does not have
    ("hotpot", "the", ["an"], 1, 0),  # both empty
    ("musique", "the", ["an"], 1, 1),
    ("2wiki", "no", ["yes", "No."], 1, 1),  # the best over aliases
    ("toy", None, ["the"], 0, 0)])  # never finished
def test_rules_of_the_data_sets(rules, prediction, golds, em, f1):
    score = R.Question("q", "?", tuple(golds), "k", 2, rules=rules).score(prediction)
    assert (score["em"], score["f1"]) == (em, pytest.approx(f1))


# ---------------------------------------------------------------- the wiki
def test_titles_match_exactly_first_then_loosely():
    wiki = R.Wiki([("Brass buttons", ["a"]), ("Brass Buttons", ["b"]),
                   ("Lilo &amp; Stitch", ["c"]), ("STRASSE", ["d"]), ("A &lt; B", ["e"]),
                   ("A < B", ["f"])])
    for query, title in [
            (" Brass Buttons\n", "Brass Buttons"), ("BRASS  buttons", "Brass buttons"),
            ("Straße", "STRASSE"), ("A < B", "A < B"), ("A &lt; B", "A &lt; B"),
            ("Brass", None)]:
        assert wiki.find(query) == title, query
    assert wiki.text("lilo & stitch") == "c"
    with pytest.raises(KeyError):
        wiki.text("Brass")


def test_a_repeated_title_keeps_every_different_text_in_order():
    two = ["One.", "Two."]
    wiki = R.Wiki([("T", two), ("U", ["x"]), ("T", ["Three."]), ("T", two), ("T", []),
                   ("T", ["Four."])])
    assert len(wiki) == 2 and wiki.text("T") == "One. Two. Three. Four."


def test_similar_ranks_title_above_text_and_always_answers(capfd):
    filler = [(f"Place {i}", ["A town." if i % 7 else "A hill."]) for i in range(500)]
    wiki = R.Wiki(filler + [
        ("Ombria", ["Velt came from Ombria. Velt, Velt and Velt again."]),
        ("Velt (painter)", ["A painter of rivers. " + "She painted on and on. " * 50])])
    assert wiki.similar("velt")[:2] == ["Velt (painter)", "Ombria"]
    assert wiki.similar("hill") == wiki.titles[:35:7]  # ties come in the wiki's order
    for query in ("", "zzz", "\ud800", "[!?"):
        assert wiki.similar(query) == wiki.titles[:5]
    assert R.Wiki([]).similar("x") == []
    assert R.Wiki([("!", ["?"]), ("", [""])]).similar("x") == ["!", ""]  # nothing to index
    assert capfd.readouterr() == ("", "")  # bm25s shows progress bars unless told not to


# ---------------------------------------------------------------- actions
@pytest.mark.parametrize("text, kind, argument", [
    ("Search[Dray]", "search", "Dray"),
    ("Search[ a ]", "search", " a "),  # the original strips the action, not the argument
    ("Search[a] then Finish[b]", "search", "a] then Finish[b"),  # up to the final ]
    (" Finish[two\nlines]\n", "finish", "two\nlines"),
    ("SEARCH[x]", "search", "x"),
    ("Search[x].", "invalid", "Search[x]."),
    ("I say Finish[x]", "invalid", "I say Finish[x]")])
def test_parse_action(text, kind, argument):
    action = R.parse_action(text)
    assert (action.kind, action.argument) == (kind, argument)


@pytest.mark.parametrize("text, thought, action", [
    (" I see.\nAction 3: Search[A [b]] and more", "I see.", "Search[A [b]]"),
    ("Action: Finish[x]\nObservation: mine", "", "Finish[x]"),
    (" t\nAction: Finish[x\ny]", "t", "Finish[x\ny]"),
    (" t\nAction: ]Search[x]", "t", "]"),  # can no longer become an action
    (" made up\nObservation: Action: Finish[x]", "made up", ""),
    (" t\nAction: Search[a\nObservation: b]", "t", "Search[a"),
    (" the film 'Action: Finish[no]' [1].\nAction: Search[A]",
     "the film 'Action: Finish[no]' [1].", "Search[A]")])  # a quote is not an action
def test_split_completion(text, thought, action):
    assert R.split_completion(text) == (thought, action)


@given(st.lists(st.sampled_from(["Action:", "\n", "Search[", "]", "[", "Observation:", " x",
                                 "Action 2:"])).map("".join))
def test_the_first_end_of_a_growing_completion_stays(text):
    """The engine may ask after every token: the cut must not move as text is added."""
    found = None
    for length in range(len(text) + 1):
        end = R.action_end(text[:length])
        assert found is None or end == found
        found = end


# ---------------------------------------------------------------- episodes
def test_lookup_state_machine():
    none = "No more results."
    short, crosses = "The Lissow is a short river.", "It crosses the province of Kessel."
    table = [
        ("Lookup[river]", none),  # no page yet
        ("Search[Lissow]", f"{short} {crosses}"),
        ("Lookup[IS]", f"(Result 1 / 1) {short}"),
        ("Lookup[IS]", none),
        ("Lookup[the]", f"(Result 1 / 2) {short}"),
        ("nonsense", "Invalid action: nonsense"),
        ("Search[?]", f"Could not find ?. Similar: [{', '.join(WIKI.titles[:5])}]"),
        ("Lookup[the]", f"(Result 2 / 2) {crosses}"),  # a miss left page and state alone
        ("Lookup[zebra]", none),
        ("Lookup[the]", f"(Result 1 / 2) {short}"),
        ("search[lissow]", f"{short} {crosses}"),  # a hit starts again, also on this page
        ("Lookup[the]", f"(Result 1 / 2) {short}")]
    states = play(*[action for action, _ in table], max_turns=99)
    for state, (action, observation) in zip(states[1:], table, strict=True):
        assert state.observation == observation
        assert state.last_missed == (action == "Search[?]")


def test_search_shows_five_sentences_or_five_titles_and_lookup_reaches_the_sixth():
    _, missed, hit, found = play("Search[Corvan Hale]", "Search[Corvan Hale (engineer)]",
                                 "Lookup[DIED]")
    assert missed.page is None and missed.observation == (
        "Could not find Corvan Hale. Similar: [Corvan Hale (singer), "
        "Corvan Hale (engineer), Corvan, Hale Bridge, The Glass Heron]")
    assert hit.observation == " ".join(HALE[:5])
    assert found.observation == "(Result 1 / 1) He died of marsh fever in 1902."
    empty = play("Search[T]", wiki=R.Wiki([("T", ["", " "])]))[1]
    assert empty.observation == "This article is empty."


def test_reward_is_given_once_and_never_by_the_turn_limit():
    *before, last, after = play(*["Search[Dray]"] * 6, "Finish[the ostravia!]", "Finish[Ostravia]")
    assert not before[-1].done
    assert (last.reward, last.done, last.prediction) == (1.0, True, "the ostravia!")
    assert after == replace(last, reward=0.0)
    late = play(*["Search[Dray]"] * 7, "Finish[Ostravia]")[-1]
    assert (late.turn, late.reward, late.done, late.prediction) == (7, 0.0, True, None)
    # the original answers a timeout with finish[]: "" must not match an empty gold
    assert play(*[""] * 7, question=R.Question("q", "?", ("the",), "k", 1))[-1].reward == 0


def test_text_that_looks_like_a_transcript_is_only_text():
    _, shown, found, finished = play("Search[Trap]", "Lookup[finish[]",
                                     "Finish[x\nAction: Finish[Ostravia]\nObservation: y]")
    assert found.observation.startswith("(Result 1 / 2)") and not found.done
    assert finished.prediction.startswith("x\nAction") and finished.reward == 0
    transcript = (R.prompt_text(QUESTION) + " t\nAction: Search[Trap]"
                  + R.observation_text(shown.observation))
    assert re.findall("^(?:Action|Observation):", transcript, re.M) == ["Action:", "Observation:"]


ACTIONS = ANY_TEXT | st.builds("{}[{}]".format, st.sampled_from(
    ["Search", "Lookup", "finish", "\tSearch"]), ANY_TEXT | st.sampled_from(WIKI.titles)
    | st.sampled_from(["the", "e", "&#" + "9" * 5000 + ";", "word " * 9999, "&amp;" * 9999]))


@given(st.lists(ACTIONS, max_size=4), st.lists(st.tuples(ACTIONS, ACTIONS), max_size=3))
def test_forks_may_be_stepped_in_any_order(prefix, pairs):
    anchor = play(*prefix)[-1]
    batch = [anchor, anchor]
    for pair in pairs:
        batch = [ENV.step(state, action) for state, action in zip(batch, pair)]
    for branch in (1, 0):
        state = anchor
        for pair in pairs:
            state = ENV.step(state, pair[branch])
        assert state == batch[branch]
    assert anchor == play(*prefix)[-1]


# ---------------------------------------------------------------- the prompt
def test_the_examples_of_the_prompt_are_what_the_environment_says():
    _, *examples, last = (FEW_SHOT + R.prompt_text(QUESTION)).split("\n\n")
    assert last == R.prompt_text(QUESTION) == "Question: Who?\nThought:"
    for example, answer in zip(examples, ("Ostravia", "marsh fever", "no"), strict=True):
        text = example.split("\n")[0].removeprefix("Question: ")
        question = R.Question("q", text, (answer,), "k", 2)
        state, transcript = ENV.reset(question), R.prompt_text(question)
        while not state.done:
            rest = example[len(transcript):]
            completion = rest[:R.action_end(rest)]
            state = ENV.step(state, R.split_completion(completion)[1])
            transcript += completion + R.observation_text(state.observation)
        assert state.reward == 1
        assert transcript == example + R.observation_text("Episode finished, reward = 1")
