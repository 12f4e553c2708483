"""What the paper publishes of CIFAR-100 at lr 0.1, β 0.9: constants, and the one curve of steps known exactly."""

from pathlib import Path

import numpy as np
import pandas as pd

# By `curve` of report.records; section 3 of the paper: C² is at ε = 0.5, b* by ε.
SHB = "CIFAR100, ResNet18, lr 0.1, SHB, beta1 0.9"
CONSTANTS = {
    "CIFAR100, ResNet18, lr 0.1, SGD": {"c_squared": 1280, "b_star": {0.5: 512}},
    SHB: {"c_squared": 25.3, "k": 1.77, "b_star": {0.5: 1024, 0.7: 512, 1.0: 256}},
    "CIFAR100, ResNet18, lr 0.1, NSHB, beta1 0.9": {"c_squared": 128, "k": 4.5, "b_star": {0.5: 512}},
    "CIFAR100, WideResNet-28-10, lr 0.1, SGD": {"c_squared": 10},
    "CIFAR100, WideResNet-28-10, lr 0.1, SHB, beta1 0.9": {"c_squared": 0.79, "k": 1.66},
    "CIFAR100, WideResNet-28-10, lr 0.1, NSHB, beta1 0.9": {"c_squared": 1.0, "k": 4.262},
}


def steps():
    """Return the published steps to ε, column published, of SHB, ResNet18, CIFAR-100, as `critical.steps_to_eps` does.

    Exact counts, recovered from the authors' vector figure.
    """
    table = pd.read_csv(Path(__file__).with_name("published_shb_steps.csv"), comment="#", index_col="batch_size")
    table.columns = table.columns.str.removeprefix("steps_eps_").astype(float)
    found = table.rename_axis(index="b", columns="eps").stack().rename("published").reset_index()
    sfo = (found["published"] * found["b"]).astype(float)
    about = {"setting": "", "label": "SHB, published", "curve": SHB, "optimizer": "shb", "lr": 0.1, "beta1": 0.9}
    about |= {"min_epochs": 11, "seeds": 1, "reached": 1, "diverged": 0, "at_first_check": 0, "after_fit": 0}
    about |= {"steps_mean": found["published"].astype(float), "sfo_mean": sfo, "sfo_max": sfo}
    return found.assign(**about, log_sfo_mean=np.log(sfo), log_sfo_se=np.nan)
