import copy

import pytest
import torch

from shb import NSHB, QHM, SGD, SHB

OPTIMIZERS = {"sgd": SGD, "shb": SHB, "nshb": NSHB, "qhm": QHM}
METHODS = [*((name, None) for name in OPTIMIZERS), ("qhm", 0), ("qhm", 0.7), ("qhm", 1)]  # and ν
SHAPES = [(3,), (4, 5), (2, 3, 3, 3), ()]


def params(seed, shapes=SHAPES, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=g, dtype=dtype)) for s in shapes]


def gradients(x, t):
    """A smooth function's gradient plus noise that depends on t alone."""
    g = torch.Generator().manual_seed(t)
    return [torch.sin(p.detach()) + 0.1 * torch.randn(p.shape, generator=g, dtype=p.dtype) for p in x]


def backward(x, t):
    for p, g in zip(x, gradients(x, t), strict=True):
        p.grad = g


def slow_step(name, m, g, beta, nu=0.5):
    """(m_t, d_t) by the formula of the paper's table, one tensor at a time."""
    m = {"sgd": 0 * m, "shb": beta * m + g}.get(name, beta * m + (1 - beta) * g)
    return m, {"sgd": g, "qhm": (1 - nu) * g + nu * m}.get(name, m)


def make(name, x, lr=0.03, beta=0.9, nu=None):
    options = {} if name == "sgd" else {"momentum": beta}
    return OPTIMIZERS[name](x, lr=lr, **options, **({} if nu is None else {"nu": nu}))


@pytest.mark.parametrize("beta", [0.0, 0.9])
@pytest.mark.parametrize(("name", "nu"), METHODS)
def test_follows_the_formula_for_300_steps(name, nu, beta):
    x, twin = params(0), [p.detach().clone() for p in params(0)]
    m = [torch.zeros_like(p) for p in twin]
    optimizer = make(name, x, beta=beta, nu=nu)
    for t in range(300):
        backward(x, t)
        for i, g in enumerate(gradients(twin, t)):
            m[i], d = slow_step(name, m[i], g, beta, 0.5 if nu is None else nu)
            twin[i] = twin[i] - 0.03 * d
        optimizer.step()
    for p, q in zip(x, twin, strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_torch_sgd_for_1000_steps(name):
    """QHM with ν = β is Nesterov's momentum, normalized."""
    lr, beta = 0.05, 0.9
    x, twin = params(3), params(3)
    optimizer = make(name, x, lr, beta, nu=beta if name == "qhm" else None)
    torch_lr, torch_beta = {"sgd": (lr, 0), "shb": (lr, beta)}.get(name, (lr * (1 - beta), beta))
    reference = torch.optim.SGD(twin, lr=torch_lr, momentum=torch_beta, nesterov=name == "qhm")
    for t in range(1000):
        for a, each in ((x, optimizer), (twin, reference)):
            backward(a, t)
            each.step()
    for p, q in zip(x, twin, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_groups_missing_gradients_and_an_empty_group(name):
    x = params(1)
    optimizer = make(name, [{"params": x[:2]}, {"params": x[2:], "lr": 0.2}, {"params": []}], lr=0.01)
    before = [p.detach().clone() for p in x]
    grads = gradients(x, 0)
    x[0].grad, x[2].grad, x[3].grad = grads[0], grads[2], grads[3]  # x[1] has none
    optimizer.step()
    weight = {"nshb": 0.1, "qhm": 1 - 0.5 * 0.9}.get(name, 1.0)
    for i, lr in ((0, 0.01), (2, 0.2), (3, 0.2)):
        torch.testing.assert_close(x[i].detach(), before[i] - lr * weight * grads[i])
    assert torch.equal(x[1], before[1]) and x[1] not in optimizer.state


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_direction_is_what_step_subtracts_and_changes_nothing(name, steps):
    x = params(2)
    optimizer = make(name, x, lr=1.0, beta=0.8)
    for t in range(steps):
        backward(x, t)
        optimizer.step()
    backward(x, steps)
    x[1].grad = None
    grads = [None if p.grad is None else p.grad.clone() for p in x]
    state, before = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in x]
    d = optimizer.direction()
    assert [t.shape for t in d] == [p.shape for p in x] and not d[1].any()
    assert str(optimizer.state_dict()) == str(state)
    for p, q, g in zip(x, before, grads, strict=True):
        assert torch.equal(p, q) and (p.grad is None if g is None else torch.equal(p.grad, g))
    assert d[0].data_ptr() != x[0].grad.data_ptr()
    optimizer.step()
    for p, q, step in zip(x, before, d, strict=True):
        assert torch.equal(p.detach(), q - step)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_step_leaves_grad_alone_and_returns_the_closure_s_loss(name):
    x = params(4)
    optimizer = make(name, x)

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = sum((p**2).sum() for p in x)
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert loss.item() == pytest.approx(sum((p**2).sum().item() for p in params(4)))
    kept = [p.grad.clone() for p in x]
    optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(x, kept, strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_dict_in_mid_run_goes_on_bit_for_bit(name, tmp_path):
    x = params(5, dtype=torch.float32)
    optimizer = make(name, x)

    def train(x, optimizer, steps):
        for t in steps:
            backward(x, t)
            optimizer.step()

    train(x, optimizer, range(20))
    torch.save({"x": [p.detach() for p in x], "o": optimizer.state_dict()}, tmp_path / "s.pt")
    train(x, optimizer, range(20, 40))
    saved = torch.load(tmp_path / "s.pt", weights_only=True)
    y = [torch.nn.Parameter(p) for p in saved["x"]]
    nu = {"nu": 0.9} if name == "qhm" else {}
    resumed = make(name, y, lr=1.0, beta=0.1, **nu)  # the state_dict brings lr, momentum and ν too
    resumed.load_state_dict(saved["o"])
    train(y, resumed, range(20, 40))
    assert all(torch.equal(p, q) for p, q in zip(x, y, strict=True))


@pytest.mark.parametrize(("ours", "beta"), [(SGD, 0.0), (SHB, 0.9)])
def test_states_go_over_to_torch_sgd_and_back(ours, beta):
    x, y = params(5), params(5)
    a, b = make(ours.__name__.lower(), x, beta=beta), torch.optim.SGD(y, lr=0.03, momentum=beta)
    for t in range(9):
        for p, q, g in zip(x, y, gradients(x, t), strict=True):
            p.grad, q.grad = g, g.clone()
        a.step(), b.step()
        assert all(torch.equal(p, q) for p, q in zip(x, y, strict=True))
        states = copy.deepcopy((a.state_dict(), b.state_dict()))
        a, b = ours(x, lr=9.0), torch.optim.SGD(y, lr=9.0)
        a.load_state_dict(states[1]), b.load_state_dict(states[0])
        assert not {"nesterov", "weight_decay", *({"momentum"} if ours is SGD else [])} & a.param_groups[0].keys()


@pytest.mark.parametrize(
    ("of", "to", "named"),
    [
        *((lambda x, o=o: torch.optim.SGD(x, **{"lr": 1, "momentum": 0.9} | o), SHB, next(iter(o))) for o in (
            {"weight_decay": 1e-4}, {"nesterov": True}, {"maximize": True}, {"dampening": 0.9})),
        *((lambda x: torch.optim.SGD(x, lr=1, momentum=0.9), to, named) for to, named in (
            (SGD, "momentum"), (NSHB, "dampening"), (QHM, "dampening"))),
        (SHB, SGD, "momentum"), (SHB, NSHB, "dampening"), (NSHB, SHB, "dampening"),
        (QHM, NSHB, "nu"), (NSHB, QHM, "nu"), (torch.optim.Adam, SHB, "momentum|weight_decay"),
    ],
)  # fmt: skip
def test_a_state_of_another_method_is_refused_and_nothing_changes(of, to, named):
    optimizer = to(params(5), lr=0.5)
    with pytest.raises(ValueError, match=named):
        optimizer.load_state_dict(of(params(5)).state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.5
    with pytest.raises(ValueError, match="knows no weight_decay"):
        to([{"params": params(5), "weight_decay": 1e-4}])


NAN = float("nan")
BAD = [*(("lr", value) for value in (-0.1, NAN, float("inf"))), *(("momentum", value) for value in (-0.1, 1.0, NAN))]
BAD += [("nu", value) for value in (-0.1, 1.1, NAN)]


@pytest.mark.parametrize(("key", "value"), BAD)
def test_refuses_what_is_out_of_range(key, value):
    for cls in {"lr": [SGD, SHB, NSHB, QHM], "momentum": [SHB, NSHB, QHM], "nu": [QHM]}[key]:
        with pytest.raises(ValueError, match=f"{key} must be"):
            cls(params(0), **{key: value})
        with pytest.raises(ValueError, match=f"{key} must be"):
            cls([{"params": params(0), key: value}])
