"""Makes `levels/semantic/data/words.npz`, what the verifier knows of English words: how frequent they are, what they are forms
of, what they mean by WordNet (synonyms, opposites, kinds, derivations), and a small vector of each.

    python scripts/verifier_words.py WORDNET_DICT

WORDNET_DICT is the folder `dict` of WordNet 3.1, whose notice is beside the file that is made. Frequencies and vectors come
from the vocabulary and the weights of MiniLM-L6 (Apache-2.0): its words are in order of frequency.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from itertools import combinations
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from anaphora.backends import encoders
from anaphora.backends.encoders.minilm import MiniLM

LEXICON: Final = Path(__file__).parent / "verifier_lexicon.txt"
TARGET: Final = Path(__file__).parents[1] / "src/anaphora/levels/semantic/data/words.npz"
VOCABULARY: Final = Path(encoders.__file__).parent / "vocabularies" / "bert-uncased.txt"
DIMENSIONS: Final = 64
SENSES: Final = 3
"""Of each part of speech. What comes later is rarely meant."""
PARTS: Final = {"noun": "n", "verb": "v", "adj": "a", "adv": "r"}

_PAIRS, _KEPT = (Path(__file__).parent / "verifier_forms.txt").read_text().split("\n", 1)[1].split("\nkeep\n")
IRREGULAR: Final = dict(pair.split() for pair in _PAIRS.replace("\n", " ").strip(", ").split(", "))
NO_FORMS: Final = frozenset(_KEPT.split())


def main(wordnet: Path) -> None:
    net = WordNet(wordnet)
    ranks = _ranks(VOCABULARY)
    own = Own(LEXICON.read_text())
    words = sorted({*_vocabulary(net, ranks), *own.words})
    index = {word: place for place, word in enumerate(words)}
    lemmas = np.array([index[_lemma(word, net, ranks, index)] for word in words], dtype=np.uint16)
    senses = [net.senses.get(word, []) for word in words]
    used = sorted({sense for of_word in senses for sense in of_word})
    parents = [net.parents.get(sense, []) for sense in used]
    known = {sense: place for place, sense in enumerate(dict.fromkeys([*used, *(up for ups in parents for up in ups)]))}
    np.savez_compressed(
        TARGET,
        words=np.frombuffer("\n".join(words).encode(), dtype=np.uint8),
        ranks=np.array([min(ranks.get(word, 60_000), 60_000) for word in words], dtype=np.uint16),
        lemmas=lemmas,
        vectors=_vectors(words),
        **_rows("senses", [[known[sense] for sense in of_word] for of_word in senses]),
        **_rows("parents", [[known[up] for up in ups] for ups in parents]),
        opposites=_pairs(net.opposites() | own.opposites, index),
        derived=_pairs(net.derived, index),
        interchangeable=_pairs(own.interchangeable, index),
        exclusive=_pairs(own.exclusive, index),
    )
    print(f"{len(words):,} words, {len(known):,} meanings, {TARGET.stat().st_size:,} bytes")


class WordNet:
    """Meanings of single words, and how they hang together."""

    def __init__(self, folder: Path) -> None:
        self.senses: dict[str, list[str]] = defaultdict(list)
        self.parents: dict[str, list[str]] = defaultdict(list)
        self.parts: dict[str, set[str]] = defaultdict(set)
        self.derived: set[tuple[str, str]] = set()
        self._words: dict[str, list[str]] = {}
        self._antonyms: set[tuple[str, str, str, str]] = set()
        self._similar: dict[str, list[str]] = defaultdict(list)
        links = [link for part, letter in PARTS.items() for link in self._read(folder / f"data.{part}", letter)]
        for part, letter in PARTS.items():
            self._order(folder / f"index.{part}", letter)
        for kind, sense, place, other, other_place in links:
            self._link(kind, sense, place, other, other_place)

    def _read(self, path: Path, letter: str) -> list[tuple[str, str, int, str, int]]:
        links = []
        for line in path.read_text().splitlines():
            if line.startswith(" "):
                continue
            fields = line.split("|")[0].split()
            sense, num_words = letter + fields[0], int(fields[3], 16)
            self._words[sense] = [word.split("(")[0].lower() for word in fields[4 : 4 + 2 * num_words : 2]]
            rest = fields[5 + 2 * num_words :]
            for kind, offset, part, places in zip(rest[0::4], rest[1::4], rest[2::4], rest[3::4], strict=False):
                if kind in ("!", "@", "&", "+", "\\") and len(places) == 4:
                    links.append(
                        (kind, sense, int(places[:2], 16), ("a" if part == "s" else part) + offset, int(places[2:], 16))
                    )
        return links

    def _order(self, path: Path, letter: str) -> None:
        for line in path.read_text().splitlines():
            if line.startswith(" "):
                continue
            fields = line.split()
            word, num_senses = fields[0], int(fields[2])
            if word.isalpha():
                self.parts[word].add(letter)
                self.senses[word] += [letter + offset for offset in fields[-num_senses:][:SENSES]]

    def _link(self, kind: str, sense: str, place: int, other: str, other_place: int) -> None:
        if kind == "@":
            self.parents[sense].append(other)
        elif kind == "&":
            self._similar[sense].append(other)
        elif place and other_place:
            one, another = self._words[sense][place - 1], self._words[other][other_place - 1]
            if kind == "!":
                self._antonyms.add((one, another, sense, other))
            elif one != another:
                self.derived.add((one, another))

    def opposites(self) -> set[tuple[str, str]]:
        """As WordNet has them, and of words that mean nearly the same as one of a pair (`quick`, like `fast`, and `slow`)."""
        pairs = {(one, another) for one, another, _, _ in self._antonyms}
        for one, another, sense, other in self._antonyms:
            if sense[0] in "av":
                near = [
                    word
                    for like in [sense, *self._similar[sense]]
                    for word in self._words[like]
                    if sense in self.senses[one][:2]
                ]
                pairs |= {(word, another) for word in near if other in self.senses[another][:2] and word != another}
        return pairs


class Own:
    """What the list beside this file says."""

    def __init__(self, text: str) -> None:
        self.words: set[str] = set()
        self.opposites: set[tuple[str, str]] = set()
        self.interchangeable: set[tuple[str, str]] = set()
        self.exclusive: set[tuple[str, str]] = set()
        for line in text.splitlines():
            sides = [[word for word in side.split() if word.isalpha()] for side in line.strip("+=| ").split("/")]
            if line.startswith("#"):
                continue
            self.words.update(word for side in sides for word in side)
            if line.startswith("="):
                self.interchangeable.update(combinations(sides[0], 2))
            elif line.startswith("|"):
                self.exclusive.update(combinations(sides[0], 2))
            elif not line.startswith("+"):
                self.opposites.update((one, another) for one in sides[0] for another in sides[1])


def _ranks(vocabulary: Path) -> dict[str, int]:
    pieces = vocabulary.read_text(encoding="utf-8").split("\n")
    return {piece: place for place, piece in enumerate(pieces) if piece.isascii() and piece.isalpha() and len(piece) > 1}


def _vocabulary(net: WordNet, ranks: dict[str, int]) -> list[str]:
    """Frequent words, and those of WordNet that are joined of two frequent pieces, as `unsubscribe` or `overdraft`."""
    endings = "s ed er ing ly al ic able less ful ness ment ion ity ist ize ise"
    tails = {**dict.fromkeys(endings.split(), 5_000), **ranks}

    def is_joined(word: str) -> bool:
        cuts = [(word[:cut], word[cut:]) for cut in range(2, len(word))]
        return any(ranks[head] + tails[tail] < 22_000 for head, tail in cuts if head in ranks and tail in tails)

    joined = {word for word in net.senses if word not in ranks and 4 < len(word) < 16 and is_joined(word)}
    forms = {*IRREGULAR, *IRREGULAR.values()}
    return sorted(set(ranks) | joined | forms)


def _lemma(word: str, net: WordNet, ranks: dict[str, int], index: dict[str, int]) -> str:
    if word in IRREGULAR:
        return IRREGULAR[word]
    if word in NO_FORMS or len(word) < 4:
        return word
    rules = [("ies", "y", "nv"), ("es", "", "nv"), ("es", "e", "nv"), ("s", "", "nv")]
    rules += [("ied", "y", "v"), ("ed", "", "v"), ("ed", "e", "v"), ("ing", "", "v"), ("ing", "e", "v")]
    found = []
    for end, instead, parts in rules:
        if not word.endswith(end):
            continue
        base = word[: len(word) - len(end)] + instead
        bases = [base, base[:-1]] if end in ("ed", "ing") and not instead and base[-1:] == base[-2:-1] else [base]
        found += [b for b in bases if len(b) > 2 and b in index and net.parts.get(b, set()) & set(parts)]
    found = [base for base in found if ranks.get(base, 30_000) < max(4 * ranks.get(word, 30_000), 8_000)]
    return min(found, key=lambda base: ranks.get(base, 30_000)) if found else word


def _rows(name: str, rows: list[list[int]]) -> dict[str, npt.NDArray[np.uint32]]:
    ends = np.cumsum([0, *map(len, rows)])
    flat = [value for row in rows for value in row]
    return {name: np.array(flat, dtype=np.uint32), f"{name}_ends": np.array(ends, dtype=np.uint32)}


def _pairs(pairs: set[tuple[str, str]], index: dict[str, int]) -> npt.NDArray[np.uint16]:
    known = sorted(
        {(min(index[a], index[b]), max(index[a], index[b])) for a, b in pairs if a in index and b in index and a != b}
    )
    return np.array(known, dtype=np.uint16)


def _vectors(words: list[str]) -> npt.NDArray[np.int8]:
    """Each word alone through the encoder; then the directions in which words differ most."""
    encoder = MiniLM()
    vectors = np.concatenate([encoder.encode([word]) for word in words])
    vectors = vectors - vectors.mean(axis=0)
    _, _, directions = np.linalg.svd(vectors[:: max(1, len(vectors) // 8000)], full_matrices=False)
    vectors = vectors @ directions[:DIMENSIONS].T
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True) + 1e-9
    return np.clip(np.round(vectors * 254), -127, 127).astype(np.int8)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
