"""Texts to padded tensors and back to one vector each; the tokeniser is the file that is served."""

import random
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokeniser in `folder`, without the truncation and padding its author saved; the server sets its own."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
    """Token ids of each text with its special tokens, cut to `max_tokens` in all."""
    tokenizer.enable_truncation(max_tokens)
    ids = [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
    tokenizer.no_truncation()
    return ids


@dataclass(frozen=True)
class Windows:
    """Texts cut into windows of token ids, each with its own special tokens."""

    ids: list[list[int]]  # [W] windows, those of one text in a row
    text: list[int]  # [W] which text each belongs to
    truncated: list[bool]  # [B] the text has more windows than are read

    def of(self, texts: Sequence[int]) -> "Windows":
        """The windows of these `texts` alone, numbered anew."""
        spans = [range(bisect_left(self.text, i), bisect_right(self.text, i)) for i in texts]
        ids = [self.ids[w] for span in spans for w in span]
        return Windows(ids, [new for new, span in enumerate(spans) for _ in span], [self.truncated[i] for i in texts])

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids and mask, int64 [W, T], and text, int64 [W]."""
        return *pad(self.ids), torch.tensor(self.text)


def windows(tokenizer: Tokenizer, texts: Sequence[str], window: int, most: int) -> Windows:
    """Each text as up to `most` windows of at most `window` tokens, special tokens included."""
    tokenizer.enable_truncation(window)
    encodings = tokenizer.encode_batch(list(texts))
    tokenizer.no_truncation()
    cut = [[encoding, *encoding.overflowing] for encoding in encodings]
    ids = [part.ids for parts in cut for part in parts[:most]]
    return Windows(ids, [i for i, parts in enumerate(cut) for _ in parts[:most]], [len(parts) > most for parts in cut])


def pad(ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both int64 [B, T], right-padded with 0 to the longest."""
    length = max(map(len, ids))
    input_ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in ids])
    return input_ids, mask


def mean_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean of `hidden` [B, T, H] over the positions where `mask` [B, T] is 1: [B, H]."""
    weight = mask[..., None].to(hidden.dtype)
    return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)


def batches(lengths: Sequence[int], tokens: int, shuffle: random.Random | None = None) -> Iterator[list[int]]:
    """Indices grouped so that no batch, padded to its longest, exceeds `tokens` (or holds one text only).

    Without `shuffle` sorted by length; with it the batches come in random order and neighbours in length vary.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i] * (shuffle.uniform(0.8, 1.25) if shuffle else 1))
    grouped: list[list[int]] = []
    longest = 0
    for i in order:
        longest = max(longest, lengths[i])
        if not grouped or (len(grouped[-1]) + 1) * longest > tokens:
            grouped.append([])
            longest = lengths[i]
        grouped[-1].append(i)
    if shuffle:
        shuffle.shuffle(grouped)
    yield from grouped
