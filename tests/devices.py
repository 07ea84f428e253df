"""A device that is not the CPU, for rehearsals without a GPU: it computes on the CPU and refuses what CUDA does.

Its tensors are real ones behind torch's PrivateUse1 backend, which Python may implement: a tensor of the CPU
among them is an error in the same places as on CUDA, and every result is that of the CPU. It is there for the
whole process, so it has one of its own: `rehearse_device.py`.
"""

import contextlib

import torch
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "rehearsal"
LIBRARY = torch.library.Library("_", "IMPL")  # what it registers lasts as long as it does


class _Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, device=None):
        return torch.get_rng_state()

    def set_rng_state(self, state, device=None):
        torch.set_rng_state(state)

    def set_device(self, device):
        pass

    def synchronize(self, device=None):
        pass

    def empty_cache(self):
        pass

    def device(self, index):
        return contextlib.nullcontext()


class DeviceTensor(torch.Tensor):
    """A tensor of the device; `inner` holds its numbers."""

    @staticmethod
    def __new__(cls, inner):
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(NAME, 0),
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, operator, kinds, args=(), kwargs=None):
        return _run(operator, args, kwargs or {})

    def tolist(self):
        return self.inner.tolist()

    def __repr__(self):
        return f"DeviceTensor({self.inner})"


class _Device(TorchDispatchMode):
    def __torch_dispatch__(self, operator, kinds, args=(), kwargs=None):
        return _run(operator, args, kwargs or {})


def _run(operator, args, kwargs):
    """Run an operator on the numbers, its result on the device where CUDA's would be."""
    given = tree_leaves((args, kwargs))
    on_device = any(isinstance(one, DeviceTensor) for one in given)
    if on_device:
        _refuse_others(operator, args, given)
    if asked := [one for one in given if isinstance(one, torch.device)]:
        on_device = asked[0].type == NAME
    found = operator(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    if operator._schema.name.endswith("_") and args and isinstance(args[0], torch.Tensor):
        return args[0]
    return (
        tree_map(lambda one: DeviceTensor(one) if isinstance(one, torch.Tensor) else one, found)
        if on_device
        else found
    )


def _inner(one):
    if isinstance(one, torch.device):
        return torch.device("cpu")
    return one.inner if isinstance(one, DeviceTensor) else one


def _refuse_others(operator, args, given):
    """Raise as CUDA does for tensors of the CPU, but for copies, numbers, and the places of an index."""
    name = operator._schema.name.removeprefix("aten::")
    if name in ("copy_", "_to_copy", "to"):
        return
    if name in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index") and isinstance(
        args[0], DeviceTensor
    ):
        given = tree_leaves((args[0], args[2:]))
    for one in given:
        if isinstance(one, torch.Tensor) and not isinstance(one, DeviceTensor) and one.dim():
            raise RuntimeError(
                f"{name}: expected all tensors to be on the same device, found {NAME} and {one.device},"
                f" of shape {tuple(one.shape)}"
            )


def register():
    """Make the device known to torch; once, and before the first gradient of the process is computed."""
    _setup_privateuseone_for_python_backend(NAME, _Backend())
    LIBRARY.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")


@contextlib.contextmanager
def other_device():
    """Give the device, and run all that is computed meanwhile through it."""
    torch._C._set_only_lift_cpu_tensors(True)  # else torch.tensor(..., device=) asks the backend, not Python
    try:
        with _Device():
            yield torch.device(NAME, 0)
    finally:
        torch._C._set_only_lift_cpu_tensors(False)


def install_varlen_kernels():
    """Give torch's variable-length attention kernels for the CPU: its own are for CUDA alone.

    What is tested with them is the call and its gradient, as torch.nn.attention.varlen defines both.
    """

    def examples(ends_q, ends_k, scale, window, *states):
        """Yield each example's states, `(heads, tokens, head_dim)` in float32, and its attention's weights."""
        assert ends_q.dtype == ends_k.dtype == torch.int32 and ends_q.tolist() == ends_k.tolist()
        assert window[1] == 0 and all(s.dtype in (torch.bfloat16, torch.float16) for s in states)
        for start, end in zip(ends_q.tolist(), ends_q.tolist()[1:], strict=False):
            groups = states[0].shape[1] // states[1].shape[1]
            q, k, v, *rest = (s[start:end].transpose(0, 1).float() for s in states)
            k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
            ages = torch.arange(end - start)[:, None] - torch.arange(end - start)
            hidden = (ages < 0) | (ages > window[0]) if window[0] >= 0 else ages < 0
            weights = (q @ k.transpose(1, 2) * scale).masked_fill(hidden, float("-inf")).softmax(-1)
            yield q, k, v, weights, *rest

    def rows(parts, like):
        """Return examples one behind the other as `like` has them; heads of a group added up."""
        whole = torch.cat(parts, 1).transpose(0, 1)
        return whole.unflatten(1, (like.shape[1], -1)).sum(2).to(like.dtype).contiguous()

    @varlen._varlen_attn.register_kernel("cpu")
    def forward(q, k, v, ends_q, ends_k, max_q, max_k, is_causal, scale, window_size, *_):
        assert max_q == max_k == int(ends_q.diff().max()) and ends_q[-1] == len(q) == len(k)
        seen = [weights @ v for _, _, v, weights in examples(ends_q, ends_k, scale, window_size, q, k, v)]
        return rows(seen, q), torch.zeros(q.shape[1], len(q)), torch.zeros(2, dtype=torch.uint64)

    @varlen._varlen_attn_backward.register_kernel("cpu")
    def backward(grad, q, k, v, out, lse, ends_q, ends_k, max_q, max_k, is_causal, rng, scale, window_size):
        found = []
        for one, keys, values, weights, up in examples(ends_q, ends_k, scale, window_size, q, k, v, grad):
            by_weights = up @ values.transpose(1, 2)
            by_scores = weights * (by_weights - (by_weights * weights).sum(-1, keepdim=True)) * scale
            found.append((by_scores @ keys, by_scores.transpose(1, 2) @ one, weights.transpose(1, 2) @ up))
        return tuple(
            rows(parts, like) for parts, like in zip(zip(*found, strict=True), (q, k, v), strict=True)
        )
