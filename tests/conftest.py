import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
os.environ["WANDB_MODE"] = "disabled"  # tests of wandb say otherwise
os.environ |= {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}  # no test downloads anything
os.environ["OMP_NUM_THREADS"] = "1"  # small networks: threads that wait for each other cost more than they bring
torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # so a shell's `&` starts it, and every child would inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)
PATIENCE = 600  # seconds after which something hangs; nothing that a test waits for takes as long on any machine


@pytest.fixture(autouse=True)
def backends_restored():
    """Leave precision, autotuning and determinism as they were, whatever a test has `set_up`."""
    precise, variable = (torch.backends.cudnn.conv, torch.backends.cuda.matmul), "CUBLAS_WORKSPACE_CONFIG"
    precisions = [backend.fp32_precision for backend in precise]
    benchmark, deterministic = torch.backends.cudnn.benchmark, torch.are_deterministic_algorithms_enabled()
    workspace = {variable: os.environ[variable]} if variable in os.environ else {}
    yield
    for backend, precision in zip(precise, precisions, strict=True):
        backend.fp32_precision = precision
    torch.backends.cudnn.benchmark = benchmark
    if torch.are_deterministic_algorithms_enabled() != deterministic:
        torch.use_deterministic_algorithms(deterministic)
    os.environ.pop(variable, None)
    os.environ |= workspace


class Evil:
    """Pickled, it makes a directory where it is loaded."""

    def __reduce__(self):
        return os.mkdir, ("pwned",)


class Tiny(nn.Module):
    """A convolution, BatchNorm and a linear layer: quick, and with all that training has to keep."""

    def __init__(self, num_classes):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, 4, 1), nn.BatchNorm2d(4)
        self.linear = nn.Linear(4 * 64, num_classes)

    def forward(self, x):
        return self.linear(torch.relu(self.bn(self.conv(x))).flatten(1))


def run_main(*argv, cwd, env=None, timeout=PATIENCE, device="cpu"):
    """main.py as a real command, without a terminal. env: what to change; None takes a variable away.

    device: named on the command line, before `argv`, which may name another; None names none.
    """
    command = [sys.executable, str(ROOT / "main.py"), *(["--device", device] if device else []), *map(str, argv)]
    env = {k: v for k, v in (os.environ | (env or {})).items() if v is not None}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout, check=False)


def summary(directory):
    return json.loads((directory / "summary.json").read_text())


@pytest.fixture(scope="session")
def mnist1d_dir():
    """A directory with MNIST-1D, generated once for all processes and runs of the tests."""
    from datasets import read

    directory = ROOT / ".pytest_cache" / "data"
    directory.mkdir(parents=True, exist_ok=True)
    read("mnist1d", directory)
    return directory


@pytest.fixture(scope="session")
def runs_dir(tmp_path_factory):
    """The records of `recorded.study`."""
    from recorded import study

    folder = tmp_path_factory.mktemp("study")
    study(folder)
    return folder


@pytest.fixture
def train(tmp_path, mnist1d_dir):
    """A whole run in this process, on the CPU: its exit status and directory."""

    def train(*argv):
        import main

        args = parsed(mnist1d_dir, "--runs_dir", tmp_path, *argv)
        return main.main(args), tmp_path / args.name

    return train


def parsed(data_dir, *argv):
    flags = ["--device=cpu", "--dataset=mnist1d", "--lr=0.05", "--wandb_mode=disabled", "--data_dir", data_dir]
    flags += [] if "--model" in argv else ["--model", "MLP"]
    from arguments import parse

    return parse([*map(str, flags), *map(str, argv)])


def start(data_dir, *argv):
    """A Training without a record."""
    from training.data import load
    from training.loop import Training

    args = parsed(data_dir, *argv)
    data = load("mnist1d", args.data_dir, torch.device("cpu"), args.seed)
    return Training(args, data, None, None)


def rows(directory, name="metrics"):
    with open(directory / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def random_arrays(n, n_test, shape=(32, 32, 3)):
    """Images, or vectors of mean 2 and standard deviation 3, with random labels of 10 classes."""
    rng, arrays = np.random.default_rng(0), {}
    for part, k in (("train", n), ("test", n_test)):
        images, numbers = rng.integers(0, 256, (k, *shape), dtype=np.uint8), rng.normal(2, 3, (k, *shape))
        arrays[f"x_{part}"] = images if len(shape) == 3 else numbers.astype(np.float32)
        arrays[f"y_{part}"] = rng.integers(0, 10, k)
    return arrays


def make_data(n=60, n_test=20, augmented=True, device="cpu", shape=(32, 32, 3)):
    """`random_arrays` as a Data."""
    from datasets import Spec
    from training.data import Data

    mean, std = ((0.5, 0.4, 0.3), (0.2, 0.25, 0.3)) if len(shape) == 3 else ((2.0,), (3.0,))
    spec = Spec(n, n_test, 10, mean, std, None, augmented, 15.0 if augmented else 0.0, shape)
    return Data(spec, random_arrays(n, n_test, shape), torch.device(device), 0)


@pytest.fixture(scope="session")
def cifar_dir(tmp_path_factory):
    """A directory with the real CIFAR100.npz; skips where neither it nor the strips it is made of are to be had."""
    for directory in (ROOT / "data", Path(os.environ.get("DATA_DIR", ROOT / "data"))):
        if (directory / "CIFAR100.npz").exists():
            return directory
    unpack = ROOT.parent / "shared" / "data" / "unpack_cifar100.py"
    if not unpack.exists():
        pytest.skip("no real CIFAR-100: data/CIFAR100.npz is absent")
    directory = tmp_path_factory.mktemp("data")
    subprocess.run([sys.executable, str(unpack), str(directory)], check=True, capture_output=True)
    return directory
