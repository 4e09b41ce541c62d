"""Two texts that ship with Python, for `lora_finetune.py`: source code and reference manual."""

import os
import pydoc_data.topics
import random
from pathlib import Path
from typing import NamedTuple

import numpy as np

ALPHABET = "\n" + "".join(map(chr, range(32, 127)))  # newline and printable ASCII
UNKNOWN = ALPHABET.index("?")
MAX_SOURCE = 4_000_000  # characters


class Manual(NamedTuple):
    """Tokens of three disjoint parts of the manual."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def encode(text: str) -> np.ndarray:
    """Characters as indices into `ALPHABET`; a tab becomes a space, other characters `?`."""
    codes = np.frombuffer(text.encode("ascii", "replace"), np.uint8)
    table = np.full(128, UNKNOWN, np.int32)
    table[[ord(c) for c in ALPHABET]] = np.arange(len(ALPHABET))
    table[ord("\t")] = ALPHABET.index(" ")
    return table[codes]


def source_code(max_chars: int = MAX_SOURCE) -> np.ndarray:
    """Tokens of the top-level modules of the standard library, in alphabetical order."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    text = "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in files)
    return encode(text[:max_chars])


def unique_paragraphs(topics: list[str]) -> str:
    """The topics one after the other, without the paragraphs that were there before."""
    paragraphs = (part.strip("\n") for topic in topics for part in topic.split("\n\n"))
    return "\n\n".join(dict.fromkeys(part for part in paragraphs if part.strip()))


def manual(train_size: int, validation_size: int, test_size: int) -> Manual:
    """Parts of the reference manual that `help("topics")` shows, in a fixed random order.

    Some topics repeat whole sections of others. A paragraph is kept only where it comes first,
    so that none of those in training is met again in the held-out parts.
    """
    topics = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    random.Random(0).shuffle(topics)
    tokens = encode(unique_paragraphs(topics))
    ends = np.cumsum([train_size, validation_size, test_size])
    if ends[-1] > len(tokens):
        raise ValueError(f"the manual has {len(tokens)} characters, not {ends[-1]}")
    return Manual(*np.split(tokens[: ends[-1]], ends[:-1]))
