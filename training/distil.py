"""Teach the transplanted ModernBERT what the closed form left over: the teacher's hidden states and embeddings."""

import random
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm import trange
from transformers import BertModel, ModernBertModel

from training.optimise import groups, schedule
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
    middle = _watch(student)
    optimiser = torch.optim.AdamW(groups(student, RATE), betas=(0.9, 0.98), weight_decay=0.0)
    plan = schedule(optimiser, steps, warm_up=min(40, steps // 10))
    ids = encode(tokenizer, texts, max(LENGTHS))
    draw = random.Random(seed)
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
    student.eval()


def _watch(student: ModernBertModel) -> list[Tensor]:
    """A list that each forward pass fills with what layers 1 to n-1 see, [B, T, H] each: what the teacher's puts out."""
    seen: list[Tensor] = []
    for layer in student.layers[1:]:
        layer.attn_norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    return seen


def _joined(ids: Sequence[list[int]], draw: random.Random) -> list[list[int]]:
    """A batch of texts of about one drawn length, each one or more of `ids` in a row between one [CLS] and one [SEP]."""
    length = draw.choice(LENGTHS)
    batch = []
    for _ in range(TOKENS // length):
        joined = list(draw.choice(ids))
        while len(joined) < length:
            joined[-1:] = draw.choice(ids)[1:]
        batch.append([*joined[: length - 1], joined[-1]])
    return batch


def _loss(states: Sequence[Tensor], expected: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Half the mean relative error of the middle layers, that of the last, and five times 1 - cosine of the embeddings."""
    keep = mask.bool()
    errors = [_relative_error(a[keep], b[keep]) for a, b in zip(states, expected, strict=True)]
    cosine = torch.cosine_similarity(mean_pool(states[-1], mask), mean_pool(expected[-1], mask)).mean()
    return 0.5 * torch.stack(errors[:-1]).mean() + errors[-1] + 5 * (1 - cosine)


def _relative_error(actual: Tensor, expected: Tensor) -> Tensor:
    """Squared error over the variance of `expected`, both [N, H]."""
    return (actual - expected).pow(2).sum() / (expected - expected.mean(0)).pow(2).sum()
