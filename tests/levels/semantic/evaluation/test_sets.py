"""What counts as right, on files made up here."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from anaphora.errors import ConfigError
from anaphora.levels.semantic.evaluation import sets
from anaphora.levels.semantic.evaluation.questions import is_right, sampled


def written(path: Path, value: str) -> None:
    path.parent.mkdir()
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write(value)


def test_pairs_lie_each_in_its_own_space_and_those_that_were_trained_on_are_left_out(tmp_path: Path) -> None:
    rows = [
        {"a": f"Is {n} odd?", "b": f"Is {n} even?", "same": n % 2, "test": "parity", "capability": "Logic"} for n in range(124)
    ]
    written(tmp_path / "checklist-qqp" / "checklist_qqp.jsonl.gz", "\n".join(map(json.dumps, rows)))
    data = sets.load("checklist-qqp", tmp_path)
    assert [wording.text for wording in data.cached] == ["Is 120 odd?", "Is 121 odd?", "Is 122 odd?", "Is 123 odd?"]
    assert [is_right(*pair) for pair in zip(data.asked, data.cached, strict=True)] == [False, True, False, True]
    assert len({wording.space for wording in data.cached}) == 4
    assert all(one.space == other.space for one, other in zip(data.asked, data.cached, strict=True))
    assert not any(is_right(data.asked[1], other) for place, other in enumerate(data.cached) if place != 1)


def test_of_questions_with_intents_another_intent_is_wrong_and_the_same_one_only_perhaps_right(tmp_path: Path) -> None:
    path = tmp_path / "banking77" / "train.csv.gz"
    path.parent.mkdir()
    with gzip.open(path, "wt", encoding="utf-8", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["text", "category"])
        lines.writerows([(f"Where  is card {n}?", "arrival" if n % 2 else "loss") for n in range(20)])
    data = sets.load("banking77", tmp_path)
    assert data.weak
    assert data.seen == "yes"
    assert len(data.cached) == len(data.asked) == 10
    assert not {one.text for one in data.cached} & {one.text for one in data.asked}
    assert {one.space for one in data.streamed} == {""}
    for asked in data.asked:
        for cached in data.cached:
            parity = {int(one.text.split()[3][:-1]) % 2 for one in (asked, cached)}
            assert is_right(asked, cached) == (len(parity) == 1)


def test_what_is_of_no_intent_is_right_for_nothing_else(tmp_path: Path) -> None:
    parts = {
        "train": [["what is up", "greeting"]],
        "val": [["hello", "greeting"], ["pay it", "payment"]],
        "oos_val": [["a", "oos"], ["b", "oos"]],
    }
    written(tmp_path / "clinc150" / "train_val.json.gz", json.dumps(parts))
    data = sets.load("clinc150", tmp_path)
    (cached,) = data.cached
    assert [is_right(asked, cached) for asked in data.asked] == [True, False, False, False]
    assert not is_right(data.asked[2], data.asked[3])
    assert data.streamed == data.asked  # `train` was trained on


@pytest.mark.parametrize("language", ["en", "es", "ru"])
def test_of_questions_on_a_paragraph_only_other_spellings_of_a_cached_one_are_right(tmp_path: Path, language: str) -> None:
    texts = {
        "en": ["How many points did Denver score in 2015?", "Which defence did Denver have?"],
        "es": ["¿Cuántos puntos marcó Denver en 2015?", "¿Qué defensa tenía Denver?"],
        "ru": ["Сколько очков набрал Денвер в 2015 году?", "Какая защита была у Денвера?"],
    }[language]
    entries = [{"question": text, "id": str(number)} for number, text in enumerate(texts)]
    written(
        tmp_path / "xquad" / f"xquad.{language}.json.gz",
        json.dumps({"data": [{"paragraphs": [{"qas": entries}, {"qas": []}]}]}),
    )
    data = sets.load(f"xquad-{language}", tmp_path)
    (cached,) = data.cached
    assert cached.text == texts[0]
    right = {asked.kind for asked in data.asked if is_right(asked, cached)}
    wrong = {asked.kind for asked in data.asked if not is_right(asked, cached)}
    assert right == {"case and marks", "thanks", "slip of the pen"}
    assert {"another number", "another question on the paragraph"} <= wrong
    assert data.encoder == ("minilm" if language == "en" else "e5")
    assert sets.load(f"xquad-{language}", tmp_path) == data
    rest = sets.load(f"xquad-{language}-rest", tmp_path)
    assert [wording.text for wording in rest.cached] == texts[1:]
    assert texts[0] in {wording.text for wording in rest.asked}
    assert rest.streamed == ()


def test_spellings_differ_from_the_question_and_changes_from_both() -> None:
    text = "Where did the Broncos practice in 2015?"
    spelled = [text for _, text in sets.spellings(text, "en", random.Random(1))]
    changed = dict(sets.changes(text, ["station", "music"], random.Random(1)))
    assert "where did the broncos practice in 2015" in spelled
    assert changed["another number"] == "Where did the Broncos practice in 5015?"
    assert len({text, *spelled, *changed.values()}) == 1 + len(spelled) + len(changed)


def conversation(*texts: str) -> list[dict[str, str]]:
    return [{"role": "assistant" if place % 2 else "user", "content": text} for place, text in enumerate(texts)]


def fow(questions: Any = (), conversations: Any = ()) -> SimpleNamespace:
    return SimpleNamespace(load_questions=lambda: questions, load_conversations=lambda: conversations)


def test_written_pairs_are_read_by_kind() -> None:
    rows = [
        {
            "id": "n1",
            "category": "negation",
            "a": "Cancel it",
            "b": "Don't cancel it",
            "same_answer": False,
            "style": "minimal",
        },
        {"id": "p1", "category": "paraphrase", "a": "Cancel it", "b": "End it", "same_answer": True, "style": "reworded"},
    ]
    data = sets.fow_questions(fow(rows))
    assert [asked.kind for asked in data.asked] == ["negation, minimal: trap", "paraphrase, reworded: same"]
    assert [is_right(*pair) for pair in zip(data.asked, data.cached, strict=True)] == [False, True]


def test_a_conversation_is_compared_only_with_what_went_on_in_the_same_words() -> None:
    def row(number: str, *, same: bool, first: str) -> dict[str, Any]:
        return {
            "id": number,
            "subtype": "same_context" if same else "context_swap",
            "same_answer": same,
            "a": conversation("I have a gym card.", "I see.", "Cancel it"),
            "b": conversation(first, "I see.", "cancel it"),
        }

    package = fow(
        conversations=[row("1", same=False, first="I have a phone."), row("2", same=True, first="I have a gym card.")]
    )
    data = sets.fow_conversations(package)
    assert data.cached[0].space != data.asked[0].space
    assert data.cached[1].space == data.asked[1].space
    assert [is_right(*pair) for pair in zip(data.asked, data.cached, strict=True)] == [False, True]
    assert not data.streamed
    alone = sets.fow_last_messages(package)
    assert all(asked.space == cached.space for asked, cached in zip(alone.asked, alone.cached, strict=True))
    assert [asked.text for asked in alone.asked] == ["cancel it", "cancel it"]
    assert not alone.exact  # the exact level, too, is asked with the conversation


def test_what_is_missing_is_said_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="ANAPHORA_DATA"):
        sets.load("banking77", None)
    with pytest.raises(ConfigError, match="cannot be read"):
        sets.load("banking77", tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match="pip install fow-cache"):
        sets.load("fow-cache", None)


def test_a_sample_keeps_pairs_whole(tmp_path: Path) -> None:
    rows = [
        {"id": f"{n}", "category": "paraphrase", "a": f"One {n}", "b": f"Other {n}", "same_answer": True, "style": "minimal"}
        for n in range(50)
    ]
    data = sampled(sets.fow_questions(fow(rows)), 7)
    assert [one.topic for one in data.cached] == [one.topic for one in data.asked]
    assert len(data.cached) == 7
    assert len(data.streamed) == 14
    assert data == sampled(sets.fow_questions(fow(rows)), 7)
