"""The report of a run, opened in a real browser where there is one."""
import json
import shutil

import numpy as np
import pytest

from engine.report import read_trees, tree_row, tree_rows, write_report
from react_env import split_completion
from rollout import grow
from tree import backup, nodes

HOSTILE = ("</script><script>document.title = 'owned'</script>"
           "<img src=x onerror=\"document.title = 'owned'\">")
QUIET = ("--headless=new --no-sandbox --disable-gpu --no-first-run --disable-sync "
         "--disable-background-networking --disable-component-update").split()


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="pip install selenium")
    chromium, driver = map(shutil.which, ("chromium", "chromedriver"))
    if not (chromium and driver):
        pytest.skip("no Chromium here: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in QUIET:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options, webdriver.ChromeService(driver)) as browser:
        yield browser


def write_run(folder, trees, row):
    """A run folder of one step."""
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "evals.jsonl").write_text(json.dumps(
        {"step": 0, "sampled_tokens": 0, "em_first": 0.5}) + "\n")
    (folder / "trees.jsonl").write_text(json.dumps(trees) + "\n")
    return write_report(folder, "python trace_mini.py")


def opened(browser, file, width=1400):
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
        "width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False})
    browser.get(file.as_uri())
    assert not browser.get_log("browser")


ROW = {"step": 1, "sampled_tokens": 900, "reward_mean": 0.5, "effective_ratio": 1.0,
       "bare_effective_ratio": 0.5, "predicted_effective_ratio": 0.6, "predictor_auroc": None,
       "active_prompts": 2, "leaves": 9, "pool": [[0.3, 3], [0.5, 3], [0.9, 0]]}


def test_a_row_holds_the_tree_word_for_word(policy, trees):
    root = trees[0]
    row = tree_row(policy, root)
    assert row["question"] == root.state.question.text and len(row["turns"]) == len(nodes(root))
    for turn, node in zip(row["turns"][1:], nodes(root)[1:]):
        text = policy.text(node.ids)
        assert (turn["thought"], turn["action"]) == split_completion(policy.wrote(node))
        assert text.endswith(turn["read"]) and turn["action"] in text
        assert row["turns"][turn["above"]]["leaves"] == node.parent.num_leaves
        assert turn["continued"] == (node.sample >= 3)  # three bare rollouts came first
        assert np.isclose(turn["logprob"], node.logprobs.sum(), atol=1e-3)
    started = sum(turn["started"] for turn in row["turns"])
    assert started == row["turns"][0]["leaves"] == root.num_leaves


def test_a_click_shows_a_turn_and_hostile_text_stays_text(browser, policy, trees, tmp_path):
    root = trees[0]
    row = tree_rows(policy, [root], step=1)
    turn = row["trees"][0]["turns"][1]
    turn["read"], turn["argument"] = f"\nObservation: {HOSTILE}\nThought:", HOSTILE
    row["trees"][0]["question"] += HOSTILE
    opened(browser, write_run(tmp_path, row, ROW))
    find = lambda name: browser.find_elements("css selector", name)  # noqa: E731
    assert len(find(".turn")) == len(row["trees"][0]["turns"])
    find(".turn")[1].click()
    shown = {name: find(f"#panel .{name}")[0].get_property("textContent")
             for name in ("thought", "action", "observation")}
    assert shown["thought"] == turn["thought"] and shown["action"] == turn["action"]
    assert shown["observation"] == turn["read"][1:]
    assert f"{turn['value']:.2f}" in find("#panel")[0].text
    assert not find("img") and browser.title == tmp_path.name
    assert not browser.get_log("browser")


def test_sixty_leaves_can_be_read(browser, policy, data, tmp_path):
    root = policy.root(data.train[0], data.env)
    grow(policy, data.env, [root], [60])
    backup(root)
    file = write_run(tmp_path, tree_rows(policy, [root], step=1), ROW)
    for width in 400, 1400:
        opened(browser, file, width)
        boxes = browser.execute_script("""
            return [...document.querySelectorAll(".said")].map(text => {
              const {left, right, top, bottom} = text.getBoundingClientRect();
              return [left, right, top, bottom, parseFloat(getComputedStyle(text).fontSize)]})""")
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        left, right, top, bottom, size = np.array(boxes).T
        assert len(boxes) == len(nodes(root)) - 1 >= 60 and size.min() >= 12
        apart = (right[:, None] <= left) | (bottom[:, None] <= top)
        assert (apart | apart.T | np.eye(len(boxes), dtype=bool)).all()


def test_trees_that_make_no_sense_end_nothing(browser, policy, trees, tmp_path):
    bad = [{"turns": [{"value": 1}, None]}, {"turns": [3]}, {"turns": [{}, {"above": 7}]}]
    rows = {"step": 1, "trees": [*bad, tree_row(policy, trees[0])]}
    opened(browser, write_run(tmp_path, rows, ROW | {"pool": [[0.5, 2]] * 130_000}))
    assert browser.find_element("id", "trees").text.count("This tree is damaged") >= 2
    assert len(browser.find_elements("css selector", ".turn")) >= len(nodes(trees[0]))


def test_filters_hide_trees(browser, policy, trees, tmp_path):
    right = tree_row(policy, trees[0])
    for turn in right["turns"]:
        turn["value"] = 1.0
    rows = {"step": 1, "trees": [right, tree_row(policy, trees[1])]}
    opened(browser, write_run(tmp_path, rows, ROW))
    for choice, num in (("with", 1), ("without", 1), ("all", 2)):
        browser.find_element("css selector", f"#filter-contrast [value={choice}]").click()
        assert len(browser.find_elements("css selector", ".question")) == num


def test_what_is_damaged_is_left_out(policy, trees, tmp_path):
    assert read_trees(tmp_path / "trees.jsonl") == []  # there is none
    good = tree_rows(policy, trees[:1], step=2)
    damaged = [b"\xff\xfe", b"{", b"[" * 100000, b"[]", b"null", b'{"step": 1, "trees": [1]}',
               b'{"step": 1, "trees": [{"turns": []}]}', b'{"trees": []}']
    twice = json.dumps(good).encode(), json.dumps(good).replace("0.0", "NaN").encode()
    (tmp_path / "trees.jsonl").write_bytes(b"\n".join([*damaged, *twice]))
    [row] = read_trees(tmp_path / "trees.jsonl")
    assert "NaN" not in json.dumps(row)
    assert row["step"] == 2 and row["trees"][0]["question"] == trees[0].state.question.text
