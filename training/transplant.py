"""A small ModernBERT from all-MiniLM-L6-v2, in closed form: no training, a few hundred texts to calibrate on.

The teacher is a post-norm BERT with learned absolute positions and a plain MLP; ModernBERT is pre-norm, rotary and gated.
Layer by layer, each built upon the ones already built:

- a pre-norm's scale and shift are fitted by least squares, so that it puts out what the teacher's post-norm did there;
- per head, queries and keys are rotated so that the directions that carry most of their product sit in the slowest
  rotary pairs, where content is matched almost regardless of position;
- values and outputs are copied. The teacher's post-norms shrink what lies in the stream before each addition; nothing does
  that in a pre-norm stream, so outputs grow by the accumulated gain to the power GAIN_POWER instead;
- the gate starts at 1 (weight 0, bias 1): the gated MLP begins as the teacher's plain one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import BertModel, ModernBertConfig, ModernBertModel

Batch = tuple[Tensor, Tensor]  # token ids and attention mask, int64 [B, T]

GAIN_POWER = 0.5  # cosine to the teacher 0.65 at 0, 0.77 at 0.5, 0.37 at 1
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
    """A ModernBERT of the teacher's width, depth and vocabulary whose last hidden states come close to the teacher's."""
    student = ModernBertModel(small_config(teacher)).eval()
    seen = _observe(teacher, calibration)
    _embeddings(teacher, student)
    gain = torch.ones(teacher.config.hidden_size)
    empty, student.layers = student.layers, nn.ModuleList()
    for source, target, (attention, mlp) in zip(teacher.encoder.layer, empty, seen, strict=True):
        student.layers.append(target)
        _attention(source.attention, target.attn, attention, gain**GAIN_POWER)
        gain = gain * _gain(attention, source.attention.output.LayerNorm)
        _fit(target.mlp_norm, _inputs(student, target.mlp_norm, calibration), torch.cat(attention.output))
        _mlp(source, target.mlp, gain**GAIN_POWER)
        gain = gain * _gain(mlp, source.output.LayerNorm)
        following = student.final_norm if target is empty[-1] else empty[len(student.layers)].attn_norm
        _fit(following, _inputs(student, student.final_norm, calibration), torch.cat(mlp.output))
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
    for layer, (attention, mlp) in zip(teacher.encoder.layer, seen, strict=True):
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


def _inputs(student: ModernBertModel, module: nn.Module, calibration: Sequence[Batch]) -> Tensor:
    """What reaches `module` of the student built so far: [N, H]."""
    caught: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0]))
    for input_ids, attention_mask in calibration:
        student(input_ids=input_ids, attention_mask=attention_mask)
    hook.remove()
    return torch.cat([hidden[mask.bool()] for hidden, (_, mask) in zip(caught, calibration, strict=True)])


def _fit(norm: nn.LayerNorm, inputs: Tensor, target: Tensor) -> None:
    """Scale and shift of `norm` by least squares per dimension, from `inputs` to `target`, both [N, H]."""
    z = nn.functional.layer_norm(inputs, norm.normalized_shape, eps=norm.eps)
    centred = z - z.mean(0)
    scale = (centred * target).sum(0) / centred.pow(2).sum(0).clamp(min=1e-6)
    norm.weight.copy_(scale)
    norm.bias.copy_(target.mean(0) - scale * z.mean(0))


def _embeddings(teacher: BertModel, student: ModernBertModel) -> None:
    source = teacher.embeddings
    constant = source.token_type_embeddings.weight[0] + source.position_embeddings.weight[:POSITIONS].mean(0)
    student.embeddings.tok_embeddings.weight.copy_(source.word_embeddings.weight + constant)
    student.embeddings.norm.load_state_dict(source.LayerNorm.state_dict())


def _attention(source: nn.Module, target: nn.Module, seen: Sublayer, gain: Tensor) -> None:
    query, key, value, output = source.self.query, source.self.key, source.self.value, source.output.dense
    to_query, to_key = _slow_first(torch.cat(seen.query), torch.cat(seen.key), target.head_dim)
    target.Wqkv.weight.copy_(torch.cat([to_query @ query.weight, to_key @ key.weight, value.weight]))
    target.Wqkv.bias.copy_(torch.cat([to_query @ query.bias, to_key @ key.bias, value.bias]))
    target.Wo.weight.copy_(gain[:, None] * output.weight)
    target.Wo.bias.copy_(gain * output.bias)


def _mlp(source: nn.Module, target: nn.Module, gain: Tensor) -> None:
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
