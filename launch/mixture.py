"""Several data folders mixed by weight.

Position n of the mixture, counted in samples from the start of training, belongs to one folder and
is a certain visit of it; both follow from n and the weights alone. The folders are the leaves of a
binary tree. A node divides its first m visits between its children, the left one getting

    round(m * weight(left) / weight(node))

of them. So the walk from the root to the leaf of a position takes as many steps as the tree is
deep, wherever the position is. After any number of samples, each folder has its share of them to
within two: a rounding adds half a sample, and a child is off by its parent's error times its share
of it. In Huffman's tree that share is at most 2/3 for a node that is no leaf, so its error stays
below 1/2 / (1 - 2/3) = 3/2, and that of a leaf below 2.

The visits of a folder are its samples in an endless seeded shuffle.
"""

import functools
import heapq
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from launch.data import DataFolder, IndexedSource, order_of_pass
from launch.data_digests import describe_tokenizer
from launch.exit_codes import DataError
from launch.tokenizer import Tokenizer


@dataclass(frozen=True)
class _Node:
    """Weights are whole numbers; `folder` is that of a leaf."""

    weight: int
    folder: int | None = None
    left: "_Node | None" = None
    right: "_Node | None" = None

    def left_visits(self, visits: int) -> int:
        """How many of the first visits go left."""
        assert self.left is not None
        return (2 * visits * self.left.weight + self.weight) // (2 * self.weight)


class Shares:
    """Which folder each position belongs to, by weights above 0 of any scale."""

    def __init__(self, weights: Sequence[float]) -> None:
        # By the decimals that were written: 0.1 is a tenth.
        exact = [Fraction(str(weight)) for weight in weights]
        scale = math.lcm(*(weight.denominator for weight in exact))
        self.weights = [float(weight / sum(exact)) for weight in exact]
        # Huffman's tree, whose light leaves are the deep ones.
        numbers = itertools.count()
        nodes = [
            (int(weight * scale), next(numbers), _Node(int(weight * scale), folder))
            for folder, weight in enumerate(exact)
        ]
        heapq.heapify(nodes)
        while len(nodes) > 1:
            (*_, light), (*_, heavy) = heapq.heappop(nodes), heapq.heappop(nodes)
            both = _Node(light.weight + heavy.weight, left=heavy, right=light)
            heapq.heappush(nodes, (both.weight, next(numbers), both))
        self._root = nodes[0][-1]

    def locate(self, position: int) -> tuple[int, int]:
        """(folder, how many earlier positions belong to it) of a position."""
        node = self._root
        while node.folder is None:
            assert node.left is not None and node.right is not None
            left = node.left_visits(position)
            goes_left = node.left_visits(position + 1) > left
            node = node.left if goes_left else node.right
            position = left if goes_left else position - left
        return node.folder, position


class MixedSource:
    """The samples of several sources, numbered one source after another.

    Args:
        weights: shares of the samples, of any scale.
    """

    def __init__(self, sources: Sequence[IndexedSource], weights: Sequence[float]) -> None:
        self._sources = sources
        self._shares = Shares(weights)
        self._starts = np.cumsum([0, *(source.num_samples for source in sources)])
        self.num_samples = int(self._starts[-1])
        # One permutation of each source is kept: it is as long as the source.
        self._passes = [functools.lru_cache(maxsize=1)(order_of_pass) for _ in sources]
        ratios = [each.bytes_per_token for each in sources if each.bytes_per_token is not None]
        self.bytes_per_token: float | None = None
        self.words_per_token: float | None = None
        if len(ratios) == len(sources):
            pairs = zip(self._shares.weights, ratios, strict=True)
            self.bytes_per_token = sum(weight * ratio for weight, ratio in pairs)

    def sample(self, index: int, start: int, stop: int) -> np.ndarray:
        source, own = self._find(index)
        return source.sample(own, start, stop)

    def document_starts(self, index: int, start: int, stop: int) -> np.ndarray:
        source, own = self._find(index)
        return source.document_starts(own, start, stop)

    def _find(self, index: int) -> tuple[IndexedSource, int]:
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._sources[number], index - int(self._starts[number])

    def order(self, consumed: int, count: int, seed: int) -> list[int]:
        """Sample indices at positions consumed..consumed + count - 1."""
        indices = []
        for position in range(consumed, consumed + count):
            number, visit = self._shares.locate(position)
            size = self._sources[number].num_samples
            turn, offset = divmod(visit, size)
            order = self._passes[number](seed, turn, size, number)
            indices.append(int(self._starts[number]) + int(order[offset]))
        return indices

    def first(self, count: int) -> list[int]:
        """Sample indices to validate on, with the same shares. A small folder's are repeated; there
        are fewer than `count` if that is enough to read every sample of all."""
        sizes = [source.num_samples for source in self._sources]
        enough = max(
            -(-size // weight) for size, weight in zip(sizes, self._shares.weights, strict=True)
        )
        located = map(self._shares.locate, range(min(count, int(enough))))
        return [int(self._starts[number]) + visit % sizes[number] for number, visit in located]

    @property
    def identity(self) -> list[Any]:
        """What the order depends on besides seed and position."""
        sizes = [source.num_samples for source in self._sources]
        pairs = zip(sizes, self._shares.weights, strict=True)
        return [self.num_samples, *([size, weight] for size, weight in pairs)]

    @property
    def content(self) -> list[dict[str, Any]]:
        """What tells the tokens of each folder from others, as JSON."""
        return [each for source in self._sources for each in source.content]


@dataclass(frozen=True)
class DataMixture:
    """Data folders with one tokenizer; with a single folder, it alone.

    Attributes:
        tokenizer: None without a meta.json, as of files written by Megatron's tools.
    """

    folders: list[DataFolder]
    weights: list[float]

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self.folders[0].tokenizer

    def source(
        self, split: str, seq_len: int, vocab_size: int, *, verify: bool = False
    ) -> IndexedSource | MixedSource:
        """The samples of "train" or "val"; with `verify`, all of a large file is checked now."""
        sources = [
            folder.source(split, seq_len, vocab_size, verify=verify) for folder in self.folders
        ]
        return sources[0] if len(sources) == 1 else MixedSource(sources, self.weights)


def open_mixture(folders: Sequence[tuple[Path, float]]) -> DataMixture:
    """Open folders, each with its weight.

    Raises:
        DataError: one is missing or damaged, or their tokenizers differ.
    """
    opened = [DataFolder(path) for path, _ in folders]
    first = opened[0]
    for folder in opened[1:]:
        if describe_tokenizer(folder.tokenizer) != describe_tokenizer(first.tokenizer):
            raise DataError(
                f"data.folders {first.folder} and {folder.folder} have different tokenizers "
                f"({_describe(first)} and {_describe(folder)}): prepare one of them again with "
                "launch/prepare_data.py --tokenizer and the folder of the other."
            )
    return DataMixture(opened, [weight for _, weight in folders])


def _describe(folder: DataFolder) -> str:
    if folder.tokenizer is None:
        return "none, as there is no meta.json"
    return f"{folder.tokenizer.spec()['kind']} with {folder.tokenizer.vocab_size:,} tokens"
