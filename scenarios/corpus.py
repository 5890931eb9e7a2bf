"""A small, fixed corpus: sentences put together from word lists, the same on every machine.

Used to train the tiny tokenizer and as the rows of the synthetic data set.  Only numpy's legacy RandomState is used,
whose stream numpy promises never to change.
"""

from __future__ import annotations

from typing import Final

import numpy as np

_SUBJECTS: Final = (
    "the gardener", "a young pilot", "our neighbour", "the old clock", "my sister", "the night train", "a grey heron",
    "the baker", "every student", "the lighthouse keeper", "a careful editor", "the second violin",
)  # fmt: skip
_VERBS: Final = (
    "watches", "repairs", "remembers", "carries", "forgets", "paints", "measures", "follows", "describes", "borrows",
)  # fmt: skip
_OBJECTS: Final = (
    "seven small boats", "the broken window", "a letter from Oslo", "the harbour at dawn", "two pots of honey",
    "an unfinished map", "the longest bridge", "a box of silver keys", "the first snow", "a story about rivers",
)  # fmt: skip
_ENDINGS: Final = (
    "", " before breakfast", " without a word", " in the rain", " for the third time this week", " and smiles",
    " because nobody else will", ", then closes the door and walks home along the river", " at 6:45",
)  # fmt: skip


def sentences(count: int, seed: int) -> list[str]:
    """`count` sentences drawn with `seed`; the first n of a longer draw are those of a draw of n."""
    random = np.random.RandomState(seed)
    return [_sentence(random) for _ in range(count)]


def _sentence(random: np.random.RandomState) -> str:
    parts = [words[random.randint(len(words))] for words in (_SUBJECTS, _VERBS, _OBJECTS, _ENDINGS)]
    text = f"{parts[0]} {parts[1]} {parts[2]}{parts[3]}."
    return text[0].upper() + text[1:]
