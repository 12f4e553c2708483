"""SGD, stochastic heavy ball (SHB), normalized SHB and quasi-hyperbolic momentum: one search direction each.

With the mini-batch gradient g_t, learning rate η, momentum factor β and m_{−1} = 0 (paper, section 2)

    d_t = g_t                          SGD
    d_t = β m_{t−1} + g_t              SHB
    d_t = β m_{t−1} + (1 − β) g_t      NSHB
    x_{t+1} = x_t − η d_t,   m_t = d_t

and with one more number ν, and m_t ≠ d_t (the paper's family; Ma and Yarats 2019)

    d_t = (1 − ν) g_t + ν m_t,   m_t = β m_{t−1} + (1 − β) g_t      QHM

SHB(lr=η) has the trajectory of torch.optim.SGD(lr=η, momentum=β), and NSHB(lr=η) that of
torch.optim.SGD(lr=η(1−β), momentum=β); with nesterov=True that is QHM(lr=η, nu=β). NSHB is not torch's
`dampening=β`, whose buffer starts undamped.
"""

import torch
from torch import Tensor
from torch.optim import Optimizer

TORCH = {"momentum": 0, "dampening": 0, "weight_decay": 0, "nesterov": False, "maximize": False}


class SGD(Optimizer):
    """Stochastic gradient descent, d_t = g_t. params: tensors or parameter groups. lr: η ≥ 0. Raises ValueError.

    torch.optim.SGD takes the states of SGD and SHB, and they take its.
    """

    neutral = TORCH  # the settings of torch.optim.SGD that a state may hold, at the values that change nothing

    def __init__(self, params, lr: float = 0.1):
        super().__init__(params, {"lr": lr})

    @staticmethod
    def _search_direction(m: list[Tensor], g: list[Tensor], group: dict) -> list[Tensor]:
        """d_t of a group's gradients g; turns its buffers m from m_{t−1} into m_t, in place. May be g or m itself."""
        return g

    def add_param_group(self, param_group: dict) -> None:
        """Add a group of parameters, with its own lr and momentum if it names them. ValueError if invalid."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        self._refuse_others(group)
        if not 0 <= group["lr"] < float("inf"):
            raise ValueError(f"lr must be finite and at least 0, got {group['lr']}")
        if not 0 <= group.get("momentum", 0) < 1:
            raise ValueError(f"momentum must be in [0, 1), got {group['momentum']}")
        if not 0 <= group.get("nu", 0) <= 1:
            raise ValueError(f"nu must be in [0, 1], got {group['nu']}")

    def state_dict(self) -> dict:
        """As torch's, with what torch.optim.SGD needs of it."""
        state = super().state_dict()
        return state | {"param_groups": [self.neutral | group for group in state["param_groups"]]}

    def load_state_dict(self, state_dict: dict) -> None:
        """Go on from a state. ValueError if it is one of another method, of which something would be ignored."""
        groups = state_dict["param_groups"]
        for group in groups:
            self._refuse_others(group)
            missing = (self.defaults.keys() | self.neutral.keys()) - group.keys()
            if missing:
                raise ValueError(f"this state is of another method than {type(self).__name__}, it has no {missing}")
        foreign = self.neutral.keys() - self.defaults.keys()
        groups = [{key: value for key, value in group.items() if key not in foreign} for group in groups]
        super().load_state_dict(state_dict | {"param_groups": groups})

    def _refuse_others(self, group: dict) -> None:
        for key in sorted((TORCH.keys() | {"nu"}) & group.keys() - self.defaults.keys()):
            if group[key] != self.neutral.get(key):
                raise ValueError(f"{type(self).__name__} knows no {key}, and would ignore {key}={group[key]}")

    @torch.no_grad()
    def step(self, closure=None):
        """x ← x − η d_t for every parameter that holds a gradient; `.grad` stays. Returns the loss of a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.update()
        return loss

    @torch.no_grad()
    def update(self) -> None:
        """`step` without closure and without torch's hooks and profiling, a thirtieth of a small network's step."""
        for group, params, m, g in self._groups():
            if params:
                d = self._search_direction(m, g, group)
                torch._foreach_add_(params, d, alpha=-group["lr"])

    @torch.no_grad()
    def direction(self) -> list[Tensor]:
        """d_t of the gradients now held, without the step: a new tensor a parameter, zeros if it has no gradient."""
        direction = []
        for group, params, m, g in self._groups(peek=True):
            d = self._search_direction(m, [x.clone() for x in g], group) if params else []
            moved = dict(zip(params, d, strict=True))
            direction += [moved[p] if p in moved else torch.zeros_like(p) for p in group["params"]]
        return direction

    def _groups(self, peek: bool = False):
        """For each group: itself, its parameters that hold a gradient, m_{t−1} (copies if `peek`), gradients."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            yield group, params, self._momentum(params, peek), [p.grad for p in params]

    def _momentum(self, params: list[Tensor], peek: bool) -> list[Tensor]:
        return []


class SHB(SGD):
    """Stochastic heavy ball, d_t = β m_{t−1} + g_t: PyTorch's SGD with momentum. As SGD, and momentum: β in [0, 1)."""

    neutral = {key: value for key, value in TORCH.items() if key != "momentum"}  # noqa: RUF012

    def __init__(self, params, lr: float = 0.1, momentum: float = 0.9):
        Optimizer.__init__(self, params, {"lr": lr, "momentum": momentum})

    @staticmethod
    def _search_direction(m: list[Tensor], g: list[Tensor], group: dict) -> list[Tensor]:
        torch._foreach_mul_(m, group["momentum"])
        torch._foreach_add_(m, g)
        return m

    def _momentum(self, params: list[Tensor], peek: bool) -> list[Tensor]:
        m = []
        for p in params:
            buffer = self.state.get(p, {}).get("momentum_buffer")
            if buffer is None:
                buffer = torch.zeros_like(p)
                if not peek:
                    self.state[p]["momentum_buffer"] = buffer
            m.append(buffer.clone() if peek else buffer)
        return m


class NSHB(SHB):
    """Normalized stochastic heavy ball, d_t = β m_{t−1} + (1 − β) g_t: at an lr, steps 1 − β as long as SHB's."""

    neutral = {}  # noqa: RUF012 (torch's would be another momentum)

    @staticmethod
    def _search_direction(m: list[Tensor], g: list[Tensor], group: dict) -> list[Tensor]:
        beta = group["momentum"]
        torch._foreach_mul_(m, beta)
        torch._foreach_add_(m, g, alpha=1 - beta)
        return m


class QHM(NSHB):
    """Quasi-hyperbolic momentum, d_t = (1 − ν) g_t + ν m_t with NSHB's m_t: ν = 0 is SGD, ν = 1 is NSHB.

    nu: ν in [0, 1]; the other arguments as in SHB. ν = β is Nesterov's momentum, normalized. ValueError as in SHB.
    """

    def __init__(self, params, lr: float = 0.1, momentum: float = 0.9, nu: float = 0.5):
        Optimizer.__init__(self, params, {"lr": lr, "momentum": momentum, "nu": nu})

    @staticmethod
    def _search_direction(m: list[Tensor], g: list[Tensor], group: dict) -> list[Tensor]:
        m = NSHB._search_direction(m, g, group)
        return torch._foreach_lerp(g, m, group["nu"])  # exactly g at ν = 0, and m at ν = 1
