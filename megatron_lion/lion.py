"""Lion as an ordinary ``torch.optim.Optimizer``."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from megatron_lion import kernels
from megatron_lion.config import MOMENTUM_INITS, PAPER_BETAS, LionError, check_betas, check_choice, check_non_negative

# What tells Lion's parameter groups from another optimizer's.
LION_GROUP_KEYS = frozenset({"lr", "betas", "weight_decay", "momentum_init", "maximize"})


class Lion(torch.optim.Optimizer):
    """Lion (evolved sign momentum), Algorithm 1 of Dong, Li, Lin (2025) after Chen et al. (2023), arXiv 2302.06675::

        c_k         = beta1 * m_{k-1} + (1 - beta1) * g_k
        theta_{k+1} = theta_k - lr * (sign(c_k) + weight_decay * theta_k)
        m_k         = beta2 * m_{k-1} + (1 - beta2) * g_k

    ``sign(0) = 0``; weight decay is decoupled and acts on the old theta. The rounding is fixed, see
    :mod:`megatron_lion.update`, so the step on a shard of a tensor equals the step on the whole bit for bit.

    State, per parameter: ``exp_avg`` (m), of the parameter's shape and dtype. Issues no collective.

    Args:
        params: parameters or parameter groups; each group may have its own ``lr``, ``betas``, ``weight_decay``,
            ``momentum_init`` and ``maximize``.
        lr: step size, >= 0. 3 to 10 times lower than AdamW's.
        betas: (beta1, beta2), each in [0, 1). For language models the paper uses (0.9, 0.95).
        weight_decay: decoupled weight decay lambda, >= 0.
        momentum_init: ``"zero"`` starts from m_0 = 0, as practice does; ``"gradient"`` from m_0 = g_1, as the
            convergence proof does (Lemma 6), so that the first step is along sign(g_1).
        maximize: ascend instead of descend.
        kernel: ``"auto"``, ``"reference"``, ``"foreach"`` or ``"fused"``; all give the same bits. Fused is one
            pass over memory, on the CPU so far; auto takes it where it can.

    Raises:
        LionError: for a hyperparameter out of range, a complex or integer parameter, a sparse gradient, or a state
            dict that another optimizer wrote.

    Example:
        >>> layer = torch.nn.Linear(2, 1)
        >>> optimizer = Lion(layer.parameters(), lr=1e-4, weight_decay=0.1)
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
    """

    # For whoever drives the step from outside, as Megatron's distributed optimizer does: a factor on every gradient,
    # and 16-bit copies of parameters, by parameter, that the step writes too. Class attributes, so that an unpickled
    # optimizer, which keeps groups and state alone, has them.
    grad_scale: float = 1.0
    copies: Mapping[Tensor, Tensor] = MappingProxyType({})

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-4,
        betas: tuple[float, float] = PAPER_BETAS,
        weight_decay: float = 0.0,
        *,
        momentum_init: str = "zero",
        maximize: bool = False,
        kernel: str = "auto",
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "momentum_init": momentum_init,
            "maximize": maximize,
            "kernel": kernel,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with the defaults for what it leaves out; nothing is added if a check fails."""
        group = {**self.defaults, **param_group}
        group["betas"] = check_betas(group["betas"])
        for key in ("lr", "weight_decay"):
            if not torch.is_tensor(group[key]):  # a learning rate in a tensor is read at each step
                group[key] = check_non_negative(key, group[key])
        check_choice("momentum_init", group["momentum_init"], MOMENTUM_INITS)
        check_choice("kernel", group["kernel"], kernels.KERNELS)
        params = group["params"]
        group["params"] = [params] if torch.is_tensor(params) else list(params)
        for entry in group["params"]:
            param = entry[1] if isinstance(entry, tuple) else entry  # torch takes (name, parameter) too
            if torch.is_tensor(param) and not param.is_floating_point():
                raise LionError(
                    f"Lion needs real floating-point parameters, got {param.dtype} of shape {tuple(param.shape)}"
                )
        super().add_param_group(group)

    def init_state(self) -> None:
        """Give every parameter that has no state yet m = 0, as loading a checkpoint into fresh state needs."""
        for group in self.param_groups:
            for param in group["params"]:
                if not self.state[param]:
                    self.state[param]["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient, in place; gradients are left as they are.

        Args:
            closure: re-evaluates the model and returns the loss.

        Returns:
            What ``closure`` returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:  # before anything is updated
            for param in group["params"]:
                if param.grad is not None and param.grad.is_sparse:
                    raise LionError(
                        f"Lion does not take sparse gradients (parameter of shape {tuple(param.shape)}): "
                        "build the embedding with sparse=False. Nothing was updated"
                    )
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        params: list[Tensor] = [param for param in group["params"] if param.grad is not None]
        grads: list[Tensor] = [-param.grad if group["maximize"] else param.grad for param in params]  # type: ignore[operator, misc]
        for param, grad in zip(params, grads, strict=True):
            if not self.state[param]:
                start = grad * self.grad_scale if group["momentum_init"] == "gradient" else torch.zeros_like(param)
                self.state[param]["exp_avg"] = torch.empty_like(param, memory_format=torch.preserve_format).copy_(start)
        for copied in (True, False):
            rows = [row for row in zip(params, grads, strict=True) if (row[0] in self.copies) == copied]
            if rows:
                self._update(group, [param for param, _ in rows], [grad for _, grad in rows], copied)

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], copied: bool) -> None:
        exp_avgs = [self.state[param]["exp_avg"] for param in params]
        update = kernels.choose(group.get("kernel", "auto"), params, grads, exp_avgs)
        update(
            params,
            grads,
            exp_avgs,
            lr=float(group["lr"]),
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=float(group["weight_decay"]),
            grad_scale=self.grad_scale,
            copies=[self.copies[param] for param in params] if copied else None,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict()`` returned: the next steps equal, bit for bit, those of an optimizer never saved.

        Raises LionError, changing nothing, where the groups are those of another optimizer.
        """
        for group in state_dict["param_groups"]:
            missing = sorted(LION_GROUP_KEYS - group.keys())
            if missing:
                raise LionError(
                    f"this optimizer state was not written by Lion: its parameter groups lack {', '.join(missing)} and "
                    f"have {', '.join(sorted(group.keys() - {'params'}))}. Load the weights alone and start Lion's "
                    "momentum at zero (in Megatron: --no-load-optim)"
                )
        asked = [group["kernel"] for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, kernel in zip(self.param_groups, asked, strict=True):
            group["kernel"] = kernel  # a matter of this machine, not of the state
