"""The demonstration: the documentation of Python's standard library, searchable by meaning.

Every machine with Python has it, so it needs no download. A document is the docstring of a module,
class or function. Its embedding is made by latent semantic analysis: TF-IDF weights of its words,
reduced by a truncated singular value decomposition.

Sources: Deerwester et al., "Indexing by latent semantic analysis", 1990; Halko, Martinsson and
Tropp, "Finding structure with randomness", 2011, for the decomposition.
"""

from __future__ import annotations

import ast
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ehub.types import Matrix, Vector

DIMS = 128

_SKIPPED = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "site-packages"}
_WORDS = 6000
_SHORTEST = 40
_WORD = re.compile(r"[a-z]+")
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])|_")
_ENDINGS = ("ings", "ing", "ies", "ied", "ed", "es", "s")
_STOP = frozenset(
    {"a", "an", "and", "are", "arg", "argument", "as", "at", "be", "by", "can", "false", "for"}
    | {"from", "given", "has", "have", "if", "in", "is", "it", "its", "none", "not", "object"}
    | {"of", "on", "or", "return", "self", "that", "the", "then", "this", "to", "true", "was"}
    | {"when", "which", "will", "with", "you", "your"}
)


class Document(NamedTuple):
    """Something that the standard library describes."""

    name: str
    kind: str
    text: str

    @property
    def summary(self) -> str:
        """The first line of its documentation."""
        return self.text.strip().splitlines()[0].strip()


def documents(folder: Path | None = None) -> Iterator[Document]:
    """Read the docstrings of the public modules, classes and functions in the standard library.

    The sources are parsed, not run.
    """
    root = folder or Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if _SKIPPED & set(parts) or any(part.startswith("_") for part in parts[:-1]):
            continue
        if parts[-1] == "__init__":
            parts = parts[:-1]
        if not parts or parts[-1].startswith("_"):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError):
            continue
        yield from _describe(tree, ".".join(parts), "module")


def _describe(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str, kind: str
) -> Iterator[Document]:
    text = ast.get_docstring(node)
    if text and len(text) >= _SHORTEST:
        yield Document(name, kind, text)
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if not child.name.startswith("_"):
                inner = "class" if isinstance(child, ast.ClassDef) else "function"
                yield from _describe(child, f"{name}.{child.name}", inner)


class Embedder:
    """Turns texts into vectors, after it has seen a collection of them."""

    def __init__(self, texts: Sequence[str]) -> None:
        counts = [Counter(_words(text)) for text in texts]
        frequency = Counter(word for words in counts for word in words)
        common = frequency.most_common(_WORDS)
        self._vocabulary = {word: i for i, (word, n) in enumerate(common) if n > 1}
        found = np.array([n for _, n in common if n > 1], np.float32)
        self._weights = np.log(len(texts) / found).astype(np.float32)
        weighted = np.stack([self._weigh(words) for words in counts])
        self._directions = _principal_directions(weighted, DIMS)
        self.vectors: Matrix = _unit(weighted @ self._directions)

    def embed(self, text: str) -> Vector:
        """Return the vector of a text, of length 1; raises ValueError if no word is known."""
        weighted = self._weigh(Counter(_words(text)))
        if not weighted.any():
            raise ValueError(f"no word of {text!r} occurs in the documents")
        vector: Vector = _unit(weighted[None] @ self._directions)[0]
        return vector

    def _weigh(self, words: Counter[str]) -> Vector:
        row = np.zeros(len(self._vocabulary), np.float32)
        for word, count in words.items():
            place = self._vocabulary.get(word)
            if place is not None:
                row[place] = (1 + np.log(count)) * self._weights[place]
        return row / (np.linalg.norm(row) or 1)


def _words(text: str) -> Iterator[str]:
    for word in _WORD.findall(_CAMEL.sub(" ", text).lower()):
        if len(word) > 1 and word not in _STOP:
            for ending in _ENDINGS:
                if word.endswith(ending) and len(word) - len(ending) > 2:
                    word = word.removesuffix(ending)
                    break
            yield word


def _principal_directions(matrix: Matrix, rank: int) -> Matrix:
    """Return the leading right singular vectors by a randomised range finder."""
    random = np.random.default_rng(0)
    basis = random.standard_normal((matrix.shape[1], rank + 16), np.float32)
    for _ in range(3):
        basis, _ = np.linalg.qr(matrix.T @ (matrix @ basis))
    _, _, right = np.linalg.svd(matrix @ basis, full_matrices=False)
    directions: Matrix = (basis @ right.T)[:, :rank]
    return directions


def _unit(matrix: Matrix) -> Matrix:
    norms = np.linalg.norm(matrix, axis=1, keepdims=True)
    unit: Matrix = (matrix / np.maximum(norms, 1e-12)).astype(np.float32)
    return unit
