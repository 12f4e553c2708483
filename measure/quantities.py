"""Every number that is measured or logged, declared once. Columns, wandb keys, labels, table heads and docs read it.

To add a number: return it from measure/, declare it here. A number that is not declared cannot be logged.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Quantity:
    """A number: its name in every file and table, symbol, unit, group, meaning, source, and whether NAME_se exists."""

    name: str
    symbol: str
    unit: str
    group: str
    meaning: str
    source: str
    has_se: bool = False

    @property
    def key(self) -> str:
        """Its key in wandb: the name, in a section of its group unless the paper's authors log it too."""
        own = self.group in ("training", "result") or self.name == "noise_norm"
        return self.name if own else f"{self.group}/{self.name}"


PAPER, OURS = "paper", "ours"
SIMSEKLI, BEHAVIOUR, IZMAILOV = "Şimşekli 2019", "Andreyev and Beneventano", "Izmailov 2018"

Q = Quantity
QUANTITIES = {
    q.name: q
    for q in (
        # --- where: the columns that say which step, mode, batch size and layer a row is about
        Q("steps", "t", "updates", "training", "updates made", PAPER),
        Q("epoch", "", "epochs", "training", "passes over the training data", PAPER),
        Q("seconds", "", "s", "training", "time taken so far, over all parts of the run", OURS),
        # --- training: columns of metrics.csv
        Q("training_loss", "f", "nats", "training", "mean loss of this epoch's mini-batches so far", PAPER),
        Q("training_acc", "", "%", "training", "training accuracy of this epoch's mini-batches so far", PAPER),
        Q("g-norm", "‖g‖", "", "training", "mean mini-batch gradient norm since the row before", PAPER),
        Q("min_g-norm", "min ‖g‖", "", "training", "smallest mini-batch gradient norm since the row before", OURS),
        Q("max_g-norm", "max ‖g‖", "", "training", "largest mini-batch gradient norm since the row before", OURS),
        Q("ave-norm", "mean ‖g‖", "", "training", "mean of all mini-batch gradient norms so far", PAPER),
        Q("accuracy", "", "%", "training", "test accuracy", PAPER),
        Q("test_loss", "", "nats", "training", "mean loss of the test data", OURS),
        Q("accuracy_recalibrated", "", "%", "training", "test accuracy, BatchNorm's statistics recomputed", IZMAILOV),
        Q("test_loss_recalibrated", "", "nats", "training", "mean test loss, the same way", IZMAILOV),
        # --- results: what only a run's end knows
        Q("best_accuracy", "", "%", "result", "highest test accuracy after an epoch", OURS),
        Q("steps_to_eps", "", "updates", "result", "updates until the mean gradient norm is at most ε", PAPER),
        Q("sfo", "", "gradients", "result", "SFO complexity: steps to ε times b, in gradients of one image", PAPER),
        Q("at_first_check", "", "", "result", "ε reached when first checked: their steps are upper bounds", OURS),
        Q("steps_to_eps_full", "", "updates", "result", "first measured step with ‖∇f‖ at most ε", OURS),
        Q("last_above_eps_full", "", "updates", "result", "measured step before that one", OURS),
        Q("max_gradient_norm", "max ‖g‖", "", "result", "largest mini-batch gradient norm of the run", OURS),
        Q("diverged_at_step", "", "updates", "result", "first step whose loss or gradient is not finite", OURS),
        # --- noise: ω_t = d_t − ∇f(x_t) and what it is made of
        Q("draws", "M", "", "noise", "mini-batches drawn; 1 is the batch that training takes next", OURS),
        Q("noise_norm", "‖ω‖", "", "noise", "search direction noise of the batch that training takes next", PAPER),
        Q("direction_norm", "‖d‖", "", "noise", "length of that batch's search direction", OURS),
        Q("gradient_noise_norm", "‖g − ∇f‖", "", "noise", "distance of that batch's gradient to the full one", OURS),
        Q("cosine", "cos(d, ∇f)", "", "noise", "cosine between search direction and full gradient", OURS),
        Q("omega_mean", "", "", "noise", "mean of the entries of that batch's ω", OURS),
        Q("omega_std", "", "", "noise", "standard deviation of the entries of that ω", OURS),
        Q("omega_skewness", "", "", "noise", "skewness of the entries of that ω", OURS),
        Q("omega_excess_kurtosis", "", "", "noise", "excess kurtosis of the entries of that ω", OURS),
        Q("full_gradient_norm", "‖∇f‖", "", "noise", "norm of the gradient over all training data", PAPER),
        Q("noise_square", "E‖ω‖²", "", "noise", "mean squared search direction noise over the draws", OURS),
        Q("delta", "δ", "", "noise", "degree of smoothing η E‖ω‖, over the draws", "paper, section 3", True),
        Q("delta_as_shb", "δ as SHB", "", "noise", "δ of the same run when written as SHB", OURS, True),
        Q("delta_as_nshb", "δ as NSHB", "", "noise", "δ of the same run when written as NSHB", OURS, True),
        Q("fresh", "w²V_b", "", "noise", "part of E‖ω‖² that this mini-batch adds, with injected noise", OURS),
        Q("memory", "‖μ‖²", "", "noise", "part of E‖ω‖² that momentum makes, whatever this mini-batch is", OURS),
        Q("memory_noise", "", "", "noise", "part of the memory made of noise of earlier mini-batches", OURS),
        Q("memory_drift", "", "", "noise", "part of the memory made of the change of ∇f", OURS),
        Q("memory_cross", "", "", "noise", "twice the inner product of these two parts", OURS),
        Q("injected", "E‖u‖²", "", "noise", "mean square of the noise that --inject adds to a gradient", OURS),
        # --- variance of mini-batch gradients, at every batch size drawn
        Q("variance", "V_b", "", "variance", "variance of a mini-batch gradient, tr Cov(g)", OURS, True),
        Q("c_squared", "C²", "", "variance", "variance of one image's gradient, b (N − 1)/(N − b) V_b", PAPER, True),
        Q("batchnorm_bias", "", "", "variance", "squared bias of a mini-batch gradient, from BatchNorm", OURS),
        Q("noise_scale", "B_simple", "", "variance", "gradient noise scale C²/‖∇f‖²", "McCandless 2018"),
        Q("max_draw_norm", "max ‖g_i‖", "", "variance", "largest mini-batch gradient norm among the draws", OURS),
        Q("augmentation_variance", "", "", "variance", "part of V_b that random augmentation makes", OURS, True),
        Q("c_squared_augmentation", "", "", "variance", "part of C² that random augmentation makes", OURS),
        # --- shape of the noise, over the draws; of the whole vector and of each layer
        Q("entries", "d", "", "shape", "number of weights", OURS),
        Q("moving", "", "", "shape", "number of weights whose gradient differs between draws", OURS),
        Q("noise_trace", "tr Σ", "", "shape", "trace of the noise's covariance, from pairs of draws", OURS),
        Q("isotropy", "U", "", "shape", "d tr(Σ²)/(tr Σ)²: 1 if the noise is isotropic", OURS),
        Q("effective_rank", "d/U", "", "shape", "number of directions that the noise fills", OURS),
        Q("coordinate_kurtosis", "", "", "shape", "excess kurtosis across draws, mean over weights; normal: 0", OURS),
        Q("non_normal_share", "", "", "shape", "share of weights whose noise fails a normality test", OURS),
        Q("pooled_kurtosis", "", "", "shape", "excess kurtosis of one draw's entries, pooled", PAPER),
        Q("scales_kurtosis", "", "", "shape", "what unequal scales alone would give for that number", OURS),
        Q("hill", "α", "", "shape", "tail index by Hill's estimator, over weights", SIMSEKLI),
        Q("hill_normal", "", "", "shape", "the same for normal draws", OURS),
        Q("components_kurtosis", "", "", "shape", "excess kurtosis along the top principal components", OURS),
        Q("components_rejected", "", "", "shape", "share of these components that fail a normality test", OURS),
        Q("gradient_kurtosis", "", "", "shape", "excess kurtosis of the noise along ∇f", OURS),
        Q("memory_kurtosis", "", "", "shape", "excess kurtosis of the noise along the momentum", OURS),
        # --- smoothing: what the noise of one step does to the loss of the probe images
        Q("probe_images", "", "images", "smoothing", "training data whose loss is looked at", OURS),
        Q("loss_x", "f(x)", "nats", "smoothing", "loss at the present weights", OURS),
        Q("loss_y", "f(y)", "nats", "smoothing", "loss after a step of full gradient descent", OURS),
        Q("loss_z", "f(z)", "nats", "smoothing", "loss after the expected step, momentum included", OURS),
        Q("excess", "", "nats", "smoothing", "loss added by ω: displacement plus fresh noise", OURS, True),
        Q("displacement", "", "nats", "smoothing", "loss added by momentum, which moves but does not smooth", OURS),
        Q("excess_real", "", "nats", "smoothing", "loss added by one step's fresh noise", OURS, True),
        Q("excess_real_half1", "", "nats", "smoothing", "the same on the first half of the images", OURS),
        Q("excess_real_half2", "", "nats", "smoothing", "the same on the second half", OURS),
        Q("excess_linear", "", "nats", "smoothing", "linear part, taken off: BatchNorm's bias", OURS, True),
        Q("excess_gaussian", "", "nats", "smoothing", "the same for Gaussian noise of equal covariance", OURS, True),
        Q("excess_isotropic", "", "nats", "smoothing", "the same for isotropic noise of equal length", OURS, True),
        Q("excess_predicted", "η² tr(HΣ)/2", "nats", "smoothing", "prediction for the fresh noise", OURS, True),
        Q("excess_predicted_isotropic", "η² tr(H) tr(Σ)/(2d)", "nats", "smoothing", "the same, isotropic", OURS, True),
        Q("fluctuation_norm", "√E‖ηφ‖²", "", "smoothing", "length of a step's fresh noise, in the weights", OURS),
        # --- sharpness of the loss of the probe images
        Q("lambda_max", "λ_max", "", "sharpness", "largest eigenvalue of the Hessian, mean of halves", "Lanczos"),
        Q("lambda_max_half1", "", "", "sharpness", "the same on the first half of the images", OURS),
        Q("lambda_max_half2", "", "", "sharpness", "the same on the second half", OURS),
        Q("hessian_trace", "tr H", "", "sharpness", "trace of the Hessian", "Hutchinson 1990", True),
        Q("hessian_trace_half1", "", "", "sharpness", "the same on the first half of the images", OURS),
        Q("hessian_trace_half2", "", "", "sharpness", "the same on the second half", OURS),
        Q("average_sharpness", "", "nats", "sharpness", "loss added by a random displacement of length δ", OURS, True),
        Q("batch_sharpness", "", "", "sharpness", "curvature along mini-batch gradients", BEHAVIOUR, True),
        Q("direction_curvature", "dᵀHd/‖d‖²", "", "sharpness", "curvature along the next search direction", OURS),
        Q("gradient_curvature", "gᵀHg/‖g‖²", "", "sharpness", "curvature along the next mini-batch gradient", OURS),
    )
}

# What says where in a run a row of measurements.csv was measured, and how; the rest of its columns are quantities.
INDEX = ("steps", "epoch", "batchnorm", "batch_size", "layer")

EVALUATED = ("accuracy", "test_loss", "accuracy_recalibrated", "test_loss_recalibrated")  # what a test of it gives


def columns(*groups: str) -> list[str]:
    """The columns of `groups` in order, each standard error behind its number."""
    found = []
    for q in QUANTITIES.values():
        if q.group in groups:
            found += [q.name, f"{q.name}_se"] if q.has_se else [q.name]
    return found


MEASURED = ("noise", "variance", "shape", "smoothing", "sharpness")  # the groups in measurements.csv


def quantity(column: str) -> Quantity:
    """The quantity that a column or standard error belongs to. KeyError if it is not declared."""
    return QUANTITIES.get(column) or QUANTITIES[column.removesuffix("_se")]
