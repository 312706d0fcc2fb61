"""A small ModernBERT from all-MiniLM-L6-v2, in closed form: no training, a few hundred texts to calibrate on.

The teacher is a post-norm BERT with learned absolute positions and a plain MLP; ModernBERT is pre-norm, rotary, gated.
Layer by layer, each built upon the ones already built:

- per head, queries and keys are rotated so that the directions that carry most of their product sit in the slowest
  rotary pairs, where content is matched almost regardless of position;
- values and outputs are copied. The teacher's post-norms shrink what lies in the stream before each addition; nothing
  does that in a pre-norm stream, so outputs grow by the accumulated gain to the power GAIN_POWER instead;
- the gate starts at 1 (weight 0, bias 1): the gated MLP begins as the teacher's plain one;
- each output matrix then takes up, by ridge regression, what its inputs can still tell of the teacher's stream;
- a pre-norm's scale and shift are fitted by least squares to put out what the teacher's post-norm did there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertModel, ModernBertConfig, ModernBertModel
from transformers.models.modernbert.modeling_modernbert import ModernBertAttention, ModernBertMLP

Batch = tuple[Tensor, Tensor]  # token ids and attention mask, int64 [B, T]

GAIN_POWER = 0.5  # cosine to the teacher without the ridge step: 0.65 at 0, 0.77 at 0.5, 0.37 at 1
RIDGE = 0.3  # of the mean second moment of the inputs
POSITIONS = 40  # the mean of the teacher's first position vectors stands in for all of them


@dataclass
class Sublayer:
    """What the teacher does at one point, over all N calibration tokens; each list holds one tensor per batch."""

    output: list[Tensor] = field(default_factory=list)  # after the post-norm [N, H]
    spread: list[Tensor] = field(default_factory=list)  # standard deviation before it [N]
    query: list[Tensor] = field(default_factory=list)  # [N, H], attention only
    key: list[Tensor] = field(default_factory=list)


@torch.no_grad()
def transplant(teacher: BertModel, calibration: Sequence[Batch]) -> ModernBertModel:
    """A ModernBERT of the teacher's width, depth and vocabulary whose last hidden states come close to its own."""
    student = ModernBertModel(small_config(teacher)).eval()
    seen = _observe(teacher, calibration)
    _embeddings(teacher, student)
    gain = torch.ones(teacher.config.hidden_size)
    sources: list[Any] = list(teacher.encoder.layer)
    targets: list[Any] = list(student.layers)
    student.layers = nn.ModuleList()
    for i, (source, target, (attention, mlp)) in enumerate(zip(sources, targets, seen, strict=True)):
        student.layers.append(target)
        _attention(source.attention, target.attn, attention, gain**GAIN_POWER)
        gain = gain * _gain(attention, source.attention.output.LayerNorm)
        inner, stream = _inputs(student, [target.attn.Wo, target.mlp_norm], calibration)
        _fit(target.mlp_norm, _refit(target.attn.Wo, inner, stream, attention), attention)
        _mlp(source, target.mlp, gain**GAIN_POWER)
        gain = gain * _gain(mlp, source.output.LayerNorm)
        inner, stream = _inputs(student, [target.mlp.Wo, student.final_norm], calibration)
        following = targets[i + 1].attn_norm if i + 1 < len(targets) else student.final_norm
        _fit(following, _refit(target.mlp.Wo, inner, stream, mlp), mlp)
    return student


def small_config(teacher: BertModel) -> ModernBertConfig:
    """ModernBERT's defaults with the teacher's sizes and, since the teacher has them, biases."""
    return ModernBertConfig(
        vocab_size=teacher.config.vocab_size,
        hidden_size=teacher.config.hidden_size,
        intermediate_size=teacher.config.intermediate_size,
        num_hidden_layers=teacher.config.num_hidden_layers,
        num_attention_heads=teacher.config.num_attention_heads,
        norm_bias=True,
        attention_bias=True,
        mlp_bias=True,
        pad_token_id=0,
        cls_token_id=101,
        sep_token_id=102,
        bos_token_id=101,
        eos_token_id=102,
        classifier_pooling="mean",
    )


def _observe(teacher: BertModel, calibration: Sequence[Batch]) -> list[tuple[Sublayer, Sublayer]]:
    """Attention and MLP of each teacher layer, as they act on the calibration texts (padding left out)."""
    seen = [(Sublayer(), Sublayer()) for _ in teacher.encoder.layer]
    mask = torch.empty(0)

    def keep(to: list[Tensor]) -> Callable[..., None]:
        return lambda module, inputs, output: to.append(output[mask])

    def keep_spread(to: list[Tensor]) -> Callable[..., None]:
        return lambda module, inputs, output: to.append(inputs[0][mask].std(-1))

    hooks = []
    layers: list[Any] = list(teacher.encoder.layer)
    for layer, (attention, mlp) in zip(layers, seen, strict=True):
        hooks += [
            layer.attention.self.query.register_forward_hook(keep(attention.query)),
            layer.attention.self.key.register_forward_hook(keep(attention.key)),
            layer.attention.output.LayerNorm.register_forward_hook(keep(attention.output)),
            layer.attention.output.LayerNorm.register_forward_hook(keep_spread(attention.spread)),
            layer.output.LayerNorm.register_forward_hook(keep(mlp.output)),
            layer.output.LayerNorm.register_forward_hook(keep_spread(mlp.spread)),
        ]
    for input_ids, attention_mask in calibration:
        mask = attention_mask.bool()
        teacher(input_ids=input_ids, attention_mask=attention_mask)
    for hook in hooks:
        hook.remove()
    return seen


def _inputs(student: ModernBertModel, modules: Sequence[nn.Module], calibration: Sequence[Batch]) -> list[Tensor]:
    """What reaches each of the `modules` of the student built so far: [N, width of that module]."""
    caught: list[list[Tensor]] = [[] for _ in modules]
    mask = torch.empty(0)

    def keep(to: list[Tensor]) -> Callable[..., None]:
        return lambda module, inputs: to.append(inputs[0][mask])

    hooks = [module.register_forward_pre_hook(keep(to)) for module, to in zip(modules, caught, strict=True)]
    for input_ids, attention_mask in calibration:
        mask = attention_mask.bool()
        student(input_ids=input_ids, attention_mask=attention_mask)
    for hook in hooks:
        hook.remove()
    return [torch.cat(parts) for parts in caught]


def _refit(output: nn.Linear, inner: Tensor, stream: Tensor, seen: Sublayer) -> Tensor:
    """Add to `output` the ridge regression, from its inputs `inner` [N, I], of what `stream` [N, H] lacks.

    Wanted is the teacher's output in the scale, per dimension, that the stream has anyway. Returns the improved stream.
    """
    teacher = torch.cat(seen.output)
    teacher = teacher - teacher.mean(0)
    scale = (teacher * stream).sum(0) / teacher.pow(2).sum(0).clamp(min=1e-6)
    lack = scale * teacher - (stream - stream.mean(0))
    x = (inner - inner.mean(0)).double()
    moment = x.T @ x
    penalty = RIDGE * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)
    update = torch.linalg.solve(moment + penalty, x.T @ lack.double()).float()
    shift = -inner.mean(0) @ update
    output.weight.add_(update.T)
    output.bias.add_(shift)
    return stream + inner @ update + shift


def _fit(norm: nn.LayerNorm, inputs: Tensor, seen: Sublayer) -> None:
    """Scale and shift of `norm` by least squares per dimension, from `inputs` [N, H] to the teacher's output."""
    target = torch.cat(seen.output)
    z = nn.functional.layer_norm(inputs, norm.normalized_shape, eps=norm.eps)
    centred = z - z.mean(0)
    scale = (centred * target).sum(0) / centred.pow(2).sum(0).clamp(min=1e-6)
    norm.weight.copy_(scale)
    norm.bias.copy_(target.mean(0) - scale * z.mean(0))


@torch.no_grad()
def token_embeddings(teacher: BertModel) -> Tensor:
    """The student's embedding table [V, H]: the teacher's words, its first segment and its mean position in one."""
    source = teacher.embeddings
    constant = source.token_type_embeddings.weight[0] + source.position_embeddings.weight[:POSITIONS].mean(0)
    return source.word_embeddings.weight + constant


def _embeddings(teacher: BertModel, student: ModernBertModel) -> None:
    student.embeddings.tok_embeddings.weight.copy_(token_embeddings(teacher))
    student.embeddings.norm.load_state_dict(teacher.embeddings.LayerNorm.state_dict())


def _attention(source: Any, target: ModernBertAttention, seen: Sublayer, gain: Tensor) -> None:
    query, key, value, output = source.self.query, source.self.key, source.self.value, source.output.dense
    to_query, to_key = _slow_first(torch.cat(seen.query), torch.cat(seen.key), target.head_dim)
    target.Wqkv.weight.copy_(torch.cat([to_query @ query.weight, to_key @ key.weight, value.weight]))
    target.Wqkv.bias.copy_(torch.cat([to_query @ query.bias, to_key @ key.bias, value.bias]))
    target.Wo.weight.copy_(gain[:, None] * output.weight)
    target.Wo.bias.copy_(gain * output.bias)


def _mlp(source: Any, target: ModernBertMLP, gain: Tensor) -> None:
    inner = source.intermediate.dense
    target.Wi.weight.copy_(torch.cat([inner.weight, torch.zeros_like(inner.weight)]))
    target.Wi.bias.copy_(torch.cat([inner.bias, torch.ones_like(inner.bias)]))
    target.Wo.weight.copy_(gain[:, None] * source.output.dense.weight)
    target.Wo.bias.copy_(gain * source.output.dense.bias)


def _gain(seen: Sublayer, norm: nn.LayerNorm) -> Tensor:
    """How much the teacher's `norm` shrinks the stream, per dimension [H]."""
    return torch.cat(seen.spread).mean() / norm.weight.abs().clamp(min=0.2)


def _slow_first(query: Tensor, key: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Two maps [H, H], block by head, that keep every q.k and sort its energy into the slowest rotary pairs.

    With second moments Q = A A^T and K = B B^T, the singular vectors of A^T B are the directions in which q.k varies
    most. Rotary pair j is dimensions j and j + head_dim / 2, and turns the slower the larger j.
    """
    maps = []
    fast_to_slow = torch.arange(head_dim).view(-1, 2).flip(0).T.flatten()
    for q, k in zip(query.double().split(head_dim, 1), key.double().split(head_dim, 1), strict=True):
        a, b = _root(q), _root(k)
        u, energy, v = torch.linalg.svd(a.T @ b)
        root = energy.sqrt()[:, None]
        maps.append(((root * (u.T @ a.inverse()))[fast_to_slow], (root * (v @ b.inverse()))[fast_to_slow]))
    to_query, to_key = (torch.block_diag(*blocks).float() for blocks in zip(*maps, strict=True))
    return to_query, to_key


def _root(x: Tensor) -> Tensor:
    """Cholesky factor of the second moment of `x` [N, D]."""
    return torch.linalg.cholesky(x.T @ x / len(x) + 1e-6 * torch.eye(x.shape[1], dtype=x.dtype))
