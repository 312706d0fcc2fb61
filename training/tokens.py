"""Texts to padded tensors and back to one vector each; the tokeniser is the file that is served."""

import random
from collections.abc import Iterator, Sequence
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
