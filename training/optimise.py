"""Step sizes: the same rules for the distillation and for the heads."""

from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def groups(module: nn.Module, rate: float) -> list[dict[str, Any]]:
    """One optimiser group per trained parameter of `module`.

    Adam moves every weight by about `rate` a step, whatever its size. Some matrices of a transplanted trunk are six times
    as large as others and would learn six times as slowly; so the rate of a matrix, or of the `lora_B` that adapts it,
    follows its root mean square.
    """
    sizes = {
        name.removesuffix(".base_layer"): linear.weight.pow(2).mean().sqrt().item()
        for name, linear in module.named_modules()
        if isinstance(linear, nn.Linear) and ".lora_" not in name
    }
    typical = sorted(sizes.values())[len(sizes) // 2]
    return [
        {"params": [parameter], "lr": rate * sizes.get(_matrix(name), typical) / typical}
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    ]


def _matrix(parameter: str) -> str:
    """The linear layer a parameter belongs to, or adapts."""
    return parameter.rpartition(".lora_B.")[0] or parameter.rpartition(".")[0]


def schedule(optimiser: Optimizer, steps: int, warm_up: int) -> LambdaLR:
    """Rise linearly over `warm_up` steps and fall linearly to 2 % over all `steps`."""
    return LambdaLR(optimiser, lambda step: min(1.0, (step + 1) / (warm_up + 1)) * max(0.02, 1 - step / steps))
