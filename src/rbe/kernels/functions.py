"""The operations as functions that torch.func can transform: grad, vjp, jvp, vmap and their compositions.

The registered operations serve compilers; torch.func cannot look through their generated autograd. Here the same
operations and formulas stand behind `torch.autograd.Function` with a context, a tangent rule and a batching rule.
Where nobody watches they call the operation's body, which is several times cheaper than the registered operation.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

from rbe.errors import RbeError
from rbe.kernels import ops
from rbe.kernels.formulas import Calls, Formulas
from rbe.kernels.tensors import unwatched


def _function(
    name: str,
    operation: CustomOpDef,
    backward: Callable[..., tuple[Any, ...]] | None,
    tangent: Callable[..., Any] | None,
    merges: bool = False,
) -> Callable[..., Any]:
    """A function around one operation.

    Args:
        merges: the first argument takes any leading sides, so a batch of them is one call.
    """

    body: Callable[..., Any] = operation._init_fn

    def run(*inputs: Any) -> Any:
        return body(*inputs) if unwatched(inputs) else operation(*inputs)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.others = tuple(a for a in inputs if isinstance(a, str))
        tensors = inputs[: len(inputs) - len(ctx.others)]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    def run_backward(ctx: Any, *g: Any) -> Any:
        inputs = (*ctx.saved_tensors, *ctx.others)
        if all(part is None for part in g):
            return (None,) * len(inputs)
        if backward is None:
            raise RbeError(
                f"{name}: second derivatives by radius, angle and scale are not offered; "
                "differentiate the values() of the format's module instead"
            )
        return backward(ctx.needs_input_grad, inputs, *g)

    def run_tangent(ctx: Any, *tangents: Any) -> Any:
        if tangent is None:
            raise RbeError(f"{name}: derivatives of gradients along radius, angle and scale are not offered")
        return tangent(tangents, (*ctx.saved_tensors, *ctx.others))

    def batched(info: Any, sides: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        known = [side if isinstance(value, Tensor) else None for side, value in zip(sides, inputs, strict=True)]
        if merges and known[0] is not None and all(side is None for side in known[1:]):
            return made.apply(inputs[0].movedim(known[0], 0), *inputs[1:]), 0
        outputs = [
            made.apply(*(v if side is None else v.select(side, b) for side, v in zip(known, inputs, strict=True)))
            for b in range(info.batch_size)
        ]
        if isinstance(outputs[0], Tensor):
            return torch.stack(outputs), 0
        return tuple(torch.stack(parts) for parts in zip(*outputs, strict=True)), (0,) * len(outputs[0])

    made: Any = type(
        name,
        (torch.autograd.Function,),
        {
            "forward": staticmethod(run),
            "setup_context": staticmethod(setup_context),
            "backward": staticmethod(run_backward),
            "jvp": staticmethod(run_tangent),
            "vmap": staticmethod(batched),
        },
    )

    def apply(*inputs: Any) -> Any:
        recorded = torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in inputs)
        return run(*inputs) if not recorded and unwatched(inputs) else made.apply(*inputs)

    return apply


def _calls() -> Calls:
    gradients = [
        _function(name, getattr(ops.CALLS, name), None, None)
        for name in ("gradient", "decode_gradient", "rows_gradient", "backward")
    ]

    # The formulas need the functions and the functions the formulas.
    def late(name: str) -> Callable[..., Any]:
        return lambda *args: getattr(calls, name)(*args)

    formulas = Formulas(Calls(*map(late, Calls._fields)))
    calls = Calls(
        _function("decode", ops.decode, formulas.decode_backward, formulas.decode_tangent),
        _function("rows", ops.rows, formulas.rows_backward, formulas.rows_tangent, merges=True),
        _function("matmul", ops.seed_matmul, formulas.matmul_backward, formulas.matmul_tangent, merges=True),
        _function(
            "transposed",
            ops.seed_matmul_transposed,
            formulas.transposed_backward,
            formulas.transposed_tangent,
            merges=True,
        ),
        *gradients,
    )
    return calls


CALLS = _calls()
