"""Teach the transplanted ModernBERT what the closed form left over: the teacher's hidden states and embeddings."""

import random
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from tqdm import trange
from transformers import BertModel, ModernBertModel, get_linear_schedule_with_warmup

from training.tokens import encode, mean_pool, pad

TOKENS = 1024  # of each batch
LENGTHS = (16, 32, 64, 128, 256)  # drawn evenly; texts are joined up to the drawn length, so long ones occur
RATE = 3e-4


def distil(
    teacher: BertModel, student: ModernBertModel, tokenizer: Tokenizer, texts: Sequence[str], steps: int, seed: int
) -> None:
    """Train all of `student` but its embedding table for `steps` batches of at most TOKENS tokens of `texts`."""
    teacher.eval()
    student.train()
    student.embeddings.tok_embeddings.weight.requires_grad_(False)
    middle, hooks = _watch(student)
    optimiser = torch.optim.AdamW(_groups(student), betas=(0.9, 0.98), weight_decay=0.0)
    plan = get_linear_schedule_with_warmup(optimiser, steps // 10, steps)
    ids = encode(tokenizer, texts, max(LENGTHS))
    draw = random.Random(seed)  # noqa: S311 (nothing secret)
    progress = trange(steps, desc="distil", unit="batch")
    for _ in progress:
        input_ids, mask = pad(_joined(ids, draw))
        with torch.no_grad():
            expected = teacher(input_ids=input_ids, attention_mask=mask, output_hidden_states=True).hidden_states
        last = student(input_ids=input_ids, attention_mask=mask).last_hidden_state
        loss = _loss([*middle, last], expected[1:], mask)
        middle.clear()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        plan.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")
    for hook in hooks:
        hook.remove()
    student.eval()


def _groups(student: ModernBertModel) -> list[dict[str, Any]]:
    """One optimiser group per trained parameter; a matrix learns at a rate in proportion to its root mean square.

    Adam moves every weight by about the rate a step, and some transplanted matrices are six times as large as others.
    """
    linear = {name: module for name, module in student.named_modules() if isinstance(module, nn.Linear)}
    sizes = {name: module.weight.pow(2).mean().sqrt().item() for name, module in linear.items()}
    typical = sorted(sizes.values())[len(sizes) // 2]
    return [
        {"params": [parameter], "lr": RATE * sizes.get(name.rpartition(".")[0], typical) / typical}
        for name, parameter in student.named_parameters()
        if parameter.requires_grad
    ]


def _watch(student: ModernBertModel) -> tuple[list[Tensor], list[RemovableHandle]]:
    """A list that each forward pass fills with what all layers but the first see, [B, T, H] each; and its hooks."""
    seen: list[Tensor] = []
    layers: list[Any] = list(student.layers)[1:]
    hooks = [layer.attn_norm.register_forward_hook(lambda module, inputs, out: seen.append(out)) for layer in layers]
    return seen, hooks


def _joined(ids: Sequence[list[int]], draw: random.Random) -> list[list[int]]:
    """A batch of one drawn length, each text one or more of `ids` in a row between one [CLS] and one [SEP]."""
    length = draw.choice(LENGTHS)
    batch = []
    for _ in range(TOKENS // length):
        joined = list(draw.choice(ids))
        while len(joined) < length:
            joined[-1:] = draw.choice(ids)[1:]
        batch.append([*joined[: length - 1], joined[-1]])
    return batch


def _loss(states: Sequence[Tensor], expected: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Half the mean relative error of the middle layers, that of the last, and 5 (1 - cosine of the embeddings)."""
    keep = mask.bool()
    errors = [_relative_error(a[keep], b[keep]) for a, b in zip(states, expected, strict=True)]
    cosine = torch.cosine_similarity(mean_pool(states[-1], mask), mean_pool(expected[-1], mask)).mean()
    return 0.5 * torch.stack(errors[:-1]).mean() + errors[-1] + 5 * (1 - cosine)


def _relative_error(actual: Tensor, expected: Tensor) -> Tensor:
    """Squared error over the variance of `expected`, both [N, H]."""
    return (actual - expected).pow(2).sum() / (expected - expected.mean(0)).pow(2).sum()
