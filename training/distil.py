"""Teach the transplanted ModernBERT what the closed form left over: the teacher's hidden states and embeddings."""

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from tqdm import tqdm
from transformers import BertModel, ModernBertModel

from training.compute import device, mixed_precision
from training.tokens import batches, encode, mean_pool, pad

TOKENS = 2048  # of each batch
NATURAL = 256  # tokens at which a text is cut when it stands alone
PACKED = (128, 256, 512, 1024, 2048)  # lengths, drawn evenly, to which texts are joined
PACKED_SHARE = 0.15  # of the batches
SCRAMBLED_SHARE = 0.5  # of the texts, so that no text is seen twice alike
SCRAMBLED = 0.12  # of their tokens, each replaced by one of another text
WEIGHTS = (0.25, 0.5, 20.0)  # of the loss: middle layers, last layer, embedding
RATE = 5e-4
VECTOR_RATE = 3e-4  # of norms and biases
WARM_UP = 20  # batches
LAST_RATE = 0.02  # of RATE


def distil(
    teacher: BertModel, student: ModernBertModel, tokenizer: Tokenizer, texts: Sequence[str], steps: int, seed: int
) -> None:
    """Train all of `student` but its embedding table for `steps` batches of about TOKENS tokens of `texts`."""
    teacher.eval().to(device())
    student.train().to(device())
    student.embeddings.tok_embeddings.weight.requires_grad_(False)
    middle, hooks = _watch(student)
    optimisers = _optimisers(student)
    warm_up = min(WARM_UP, steps // 10 + 1)
    rates = [
        torch.optim.lr_scheduler.LambdaLR(
            optimiser, lambda step: min((step + 1) / warm_up, LAST_RATE + (1 - LAST_RATE) * (1 - step / steps))
        )
        for optimiser in optimisers
    ]
    ids, draw = encode(tokenizer, texts, NATURAL), random.Random(seed)  # noqa: S311 (nothing secret)
    drawn = (_scrambled(batch, ids, draw) for batch in _drawn(ids, draw))
    progress = tqdm(zip(range(steps), drawn, strict=False), total=steps, desc="distil", unit="batch", mininterval=2)
    for _, batch in progress:
        input_ids, mask = (tensor.to(device()) for tensor in pad(batch))
        with mixed_precision():
            expected = _taught(teacher, input_ids, mask)
            last = student(input_ids=input_ids, attention_mask=mask).last_hidden_state
        loss, cosine = _loss([*middle, last], expected, mask)
        middle.clear()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        for optimiser, rate in zip(optimisers, rates, strict=True):
            optimiser.step()
            rate.step()
        student.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.3f}", cosine=f"{cosine.item():.3f}", refresh=False)
    for hook in hooks:
        hook.remove()
    student.eval().cpu()
    teacher.cpu()


@torch.no_grad()
def _taught(teacher: BertModel, input_ids: Tensor, mask: Tensor) -> list[Tensor]:
    """The teacher's hidden states after each layer, [B, T, H]; what is longer than it reads is read in pieces."""
    window = teacher.config.max_position_embeddings
    pieces = zip(input_ids.split(window, 1), mask.split(window, 1), strict=True)
    states = [teacher(input_ids=i, attention_mask=m, output_hidden_states=True).hidden_states[1:] for i, m in pieces]
    return [torch.cat(layer, 1) for layer in zip(*states, strict=True)]


def _optimisers(student: ModernBertModel) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the matrices of `student`, AdamW for its norms and biases.

    A matrix learns at a rate in proportion to its root mean square: some transplanted ones are six times as large as
    others.
    """
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.ndim == 2]
    sizes = [matrix.detach().pow(2).mean().sqrt().item() for matrix in matrices]
    typical = sorted(sizes)[len(sizes) // 2]
    groups: list[dict[str, Any]] = [
        {"params": [matrix], "lr": RATE * size / typical} for matrix, size in zip(matrices, sizes, strict=True)
    ]
    vectors = [parameter for parameter in trained if parameter.ndim < 2]
    return [
        torch.optim.Muon(groups, weight_decay=0.0, momentum=0.9, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(vectors, lr=VECTOR_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def _watch(student: ModernBertModel) -> tuple[list[Tensor], list[RemovableHandle]]:
    """A list that each forward pass fills with what all layers but the first see, [B, T, H] each; and its hooks."""
    seen: list[Tensor] = []
    layers: list[Any] = list(student.layers)[1:]
    hooks = [layer.attn_norm.register_forward_hook(lambda module, inputs, out: seen.append(out)) for layer in layers]
    return seen, hooks


def _drawn(ids: Sequence[list[int]], draw: random.Random) -> Iterator[list[list[int]]]:
    """Batches without end: passes over all texts as they are, with batches of joined texts in between."""
    while True:
        for batch in batches([len(text) for text in ids], TOKENS, draw):
            while draw.random() < PACKED_SHARE:
                yield _packed(ids, draw)
            yield [ids[i] for i in batch]


def _packed(ids: Sequence[list[int]], draw: random.Random) -> list[list[int]]:
    """A batch of one drawn length, each text several of `ids` in a row between one [CLS] and one [SEP]."""
    length = draw.choice(PACKED)
    batch = []
    for _ in range(max(TOKENS // length, 1)):
        joined = list(draw.choice(ids))
        while len(joined) < length:
            joined[-1:] = draw.choice(ids)[1:]
        batch.append([*joined[: length - 1], joined[-1]])
    return batch


def _scrambled(batch: Sequence[list[int]], ids: Sequence[list[int]], draw: random.Random) -> list[list[int]]:
    """`batch` with tokens between the first and the last of some texts replaced by tokens drawn from `ids`."""

    def token(old: int) -> int:
        return draw.choice(draw.choice(ids)) if draw.random() < SCRAMBLED else old

    return [[text[0], *map(token, text[1:-1]), text[-1]] if draw.random() < SCRAMBLED_SHARE else text for text in batch]


def _loss(states: Sequence[Tensor], expected: Sequence[Tensor], mask: Tensor) -> tuple[Tensor, Tensor]:
    """Relative errors of middle layers (mean) and last, and 1 - cosine of embeddings, weighted; and that cosine."""
    keep = mask.bool()
    errors = [_relative_error(a[keep].float(), b[keep].float()) for a, b in zip(states, expected, strict=True)]
    a, b = (mean_pool(layers[-1].float(), mask) for layers in (states, expected))
    cosine = torch.cosine_similarity(a, b).mean()
    middle, last, embedding = WEIGHTS
    return middle * torch.stack(errors[:-1]).mean() + last * errors[-1] + embedding * (1 - cosine), cosine


def _relative_error(actual: Tensor, expected: Tensor) -> Tensor:
    """Squared error over the variance of `expected`, both [N, H]."""
    return (actual - expected).pow(2).sum() / (expected - expected.mean(0)).pow(2).sum()
