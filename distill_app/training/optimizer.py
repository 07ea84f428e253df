"""AdamW for bfloat16 weights that loses nothing: each weight's float32 value is kept in two halves.

The model holds the rounded half in bfloat16, the optimizer the rest as 16 bits. A step joins the two, moves
the float32 value as torch's own AdamW does and splits it again. The first moment is kept in bfloat16, which
its change of a tenth a step outweighs (so does DeepSeek-V3, arXiv:2412.19437, section 3.3.1); the second,
which changes by a thousandth, stays in float32. So training takes
12 bytes a parameter (weight 2, rest 2, moments 2 and 4, gradient 2) where float32 weights under autocast take
16 and a copy of the weights.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

PIECE = 2**20  # parameters that a CPU moves at a time: the float32 copies stay small and near the processor
GROUP = 2**25  # that a GPU moves at a time, of many tensors: few launches, and 1 GB of copies while no
# activations are there
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
                    "step": torch.zeros(()),  # on the CPU: Python reads it
                    "rest": torch.zeros_like(parameter, dtype=torch.int16),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter, dtype=torch.float32),
                }

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            moved: dict[tuple[torch.device, int], list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.state[parameter]["step"] += 1
                    alike = (parameter.device, int(self.state[parameter]["step"]))
                    moved.setdefault(alike, []).append(parameter)
            for (device, step), parameters in moved.items():
                for pieces in self._pieces(parameters, on_cpu=device.type == "cpu"):
                    _move(pieces, step, group)

    def _pieces(self, parameters: Sequence[Tensor], on_cpu: bool) -> Iterator["_Pieces"]:
        """Yield what is moved at a time: on a CPU a piece of one parameter, elsewhere many of them whole."""
        size = PIECE if on_cpu else GROUP
        found: _Pieces = []
        for parameter in parameters:
            state = self.state[parameter]
            whole = (parameter, parameter.grad, state["rest"], state["exp_avg"], state["exp_avg_sq"])
            for piece in zip(*(t.view(-1).split(size) for t in whole if t is not None), strict=True):
                if found and (on_cpu or sum(len(p[0]) for p in found) + len(piece[0]) > size):
                    yield found
                    found = []
                found.append(piece)
        if found:
            yield found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state in the types it was saved in; torch would round it to the parameters' type."""
        super().load_state_dict(state_dict)
        parameters = [p for group in self.param_groups for p in group["params"]]
        places = [place for group in state_dict["param_groups"] for place in group["params"]]
        for parameter, place in zip(parameters, places, strict=True):
            saved = state_dict["state"].get(place, {})
            self.state[parameter] = {
                key: value.to("cpu" if key == "step" else parameter.device) for key, value in saved.items()
            }


_Pieces = list[tuple[Tensor, ...]]  # of weights, gradients, rests and moments


def _move(pieces: _Pieces, step: int, group: dict[str, Any]) -> None:
    """Move weights one AdamW step, in place."""
    weights, gradient, rest, average, square = (_together(tensors) for tensors in zip(*pieces, strict=True))
    value, first = joined(weights, rest), average.float()
    torch._fused_adamw_(
        [value],
        [gradient.float()],
        [first],
        [square],
        [],
        [torch.full((), float(step), device=value.device)],
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
    if len(pieces) > 1:
        sizes = [len(piece[0]) for piece in pieces]
        for place, whole in ((0, weights), (2, rest), (3, average), (4, square)):
            torch._foreach_copy_([piece[place] for piece in pieces], list(whole.split(sizes)))


def _together(tensors: Sequence[Tensor]) -> Tensor:
    """Return flat tensors as one; a lone one as it is."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def rest_of(value: Tensor, rounded: Tensor) -> Tensor:
    """Return the bits of a float32 tensor that its bfloat16 lacks, as int32 that fits int16."""
    return (value.view(torch.int32) - _bits(rounded)).clamp_(LOWEST, HIGHEST)


def joined(rounded: Tensor, rest: Tensor) -> Tensor:
    """Return the float32 tensor whose halves these are."""
    return _bits(rounded).add_(rest).view(torch.float32)


def _bits(rounded: Tensor) -> Tensor:
    return rounded.float().view(torch.int32)
