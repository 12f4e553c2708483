"""What the paper publishes: numbers of its experiments on CIFAR-100, their settings, and one curve of steps."""

from pathlib import Path

import pandas as pd

# Section 3 of the paper: lr 0.1, β 0.9. C² is at ε 0.5; b* per ε; accuracy in percent per b.
CONSTANTS = {
    "ResNet18": {
        "sgd": {"c_squared": 1280, "b_star": {0.5: 512}, "accuracy": {256: 68}},
        "shb": {"c_squared": 25.3, "k": 1.77, "b_star": {0.5: 1024, 0.7: 512, 1.0: 256}},
        "nshb": {"c_squared": 128, "k": 4.5, "b_star": {0.5: 512}, "accuracy": {256: 65}},
    },
    "WideResNet-28-10": {
        "sgd": {"c_squared": 10},
        "shb": {"c_squared": 0.79, "k": 1.66},
        "nshb": {"c_squared": 1.0, "k": 4.262},
    },
}
# The arguments of a run, by mode, without which its results are not set beside the published.
SETTINGS = {
    "normal": {"epochs": 200, "max_steps": None, "precision": "default"},
    "critical": {"min_epochs": 11, "precision": "default"},
    "sampling": {},
}


def constants(dataset, model, lr, beta):
    """Return {optimizer: its published numbers}, {} where nothing is published. beta: None where none has a β."""
    published = dataset == "CIFAR100" and lr == 0.1 and beta in (0.9, None)
    return CONSTANTS.get(model, {}) if published else {}


def shb_steps(constants):
    """Return SHB's published steps by (optimizer, batch_size, eps); none where `constants` are of another network.

    Exact counts, recovered from the authors' vector figure: ResNet18 on CIFAR-100.
    """
    table = pd.read_csv(Path(__file__).with_name("published_shb_steps.csv"), comment="#", index_col="batch_size")
    table.columns = table.columns.str.removeprefix("steps_eps_").astype(float).rename("eps")
    steps = pd.concat({"shb": table.stack()}, names=["optimizer"]).astype("Int64").rename("steps")
    return steps if constants is CONSTANTS["ResNet18"] else steps[:0]
