"""AdamW for bfloat16 weights that loses nothing: each weight's float32 value is kept in two halves.

The model holds the rounded half in bfloat16, the optimizer the rest as 16 bits. A step joins the two, moves
the float32 value as torch's own AdamW does and splits it again. The first moment is kept in bfloat16, which
its change of a tenth a step outweighs (so does DeepSeek-V3, arXiv:2412.19437, section 3.3.1); the second,
which changes by a thousandth, stays in float32. So training takes
12 bytes a parameter (weight 2, rest 2, moments 2 and 4, gradient 2) where float32 weights under autocast take
16 and a copy of the weights.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

PIECE = 2**20  # parameters moved at a time: the float32 copies stay small and near the processor
LOWEST, HIGHEST = -(2**15), 2**15 - 1  # of the rest; a tie rounded down would need 2**15, one bit too far


class SplitAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter, arXiv:1711.05101) over bfloat16 parameters with float32 precision."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        # Now and not in the first step: what stays must not lie scattered among what comes and goes
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = {
                    "step": torch.zeros((), device=parameter.device),
                    "rest": torch.zeros_like(parameter, dtype=torch.int16),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter, dtype=torch.float32),
                }

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group)

    def _move(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        state["step"] += 1
        whole = (parameter, parameter.grad, state["rest"], state["exp_avg"], state["exp_avg_sq"])
        pieces = zip(*(tensor.view(-1).split(PIECE) for tensor in whole if tensor is not None), strict=True)
        for weights, gradient, rest, average, square in pieces:
            value, first = joined(weights, rest), average.float()
            torch._fused_adamw_(
                [value],
                [gradient.float()],
                [first],
                [square],
                [],
                [state["step"].clone()],
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )
            average.copy_(first)
            weights.copy_(value)
            rest.copy_(rest_of(value, weights))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state in the types it was saved in; torch would round it to the parameters' type."""
        super().load_state_dict(state_dict)
        parameters = [p for group in self.param_groups for p in group["params"]]
        places = [place for group in state_dict["param_groups"] for place in group["params"]]
        for parameter, place in zip(parameters, places, strict=True):
            saved = state_dict["state"].get(place, {})
            self.state[parameter] = {key: value.to(parameter.device) for key, value in saved.items()}


def rest_of(value: Tensor, rounded: Tensor) -> Tensor:
    """Return the bits of a float32 tensor that its bfloat16 lacks, as int32 that fits int16."""
    return (value.view(torch.int32) - _bits(rounded)).clamp_(LOWEST, HIGHEST)


def joined(rounded: Tensor, rest: Tensor) -> Tensor:
    """Return the float32 tensor whose halves these are."""
    return _bits(rounded).add_(rest).view(torch.float32)


def _bits(rounded: Tensor) -> Tensor:
    return rounded.float().view(torch.int32)
