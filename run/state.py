"""State of a run: what it learns, how a step updates that (rules.py), and its history."""

import math
import time
from typing import NamedTuple

import torch

from run.rules import IMAGE_OPTIMIZERS, LABELS, STEP_SIZE_OPTIMIZERS
from run.scores import Evaluations, from_json, to_json
from system import files
from system.process import ReportedError, first_line, is_out_of_memory


class Step(NamedTuple):
    """The result of an objective in one iteration."""

    loss: torch.Tensor  # ()
    gradients: dict  # by the names in `State.learned`; that of "alpha" is ∂L/∂α
    log: dict  # what is logged about its draws
    source: str  # what was drawn, for messages
    carried: dict | None = None  # tensors by name, from which the next iteration continues


class Start(NamedTuple):
    """The synthetic set that a run starts from."""

    images: torch.Tensor  # (K, C, S, S)
    classes: torch.Tensor  # of the images, or of their tiles (n,)
    logits: torch.Tensor | None  # what labels are read from (n, classes); None: they are classes
    alpha: float
    source: str  # of the images: "real", "noise", or a saved set's digest


class State:
    """All that changes in a run, which a checkpoint keeps.

    learned      what is learned, leaf tensors by name: "images" (K, C, S, S), "labels", if they are
                 learned, logits or targets (n, classes), and, if it is learned, "alpha", α or
                 log α, a scalar
    average      running means of `learned`, by name; None: there are none
    alpha        α as it is evaluated; current_alpha: as it is learned
    label_syn    the classes of the synthetic images, or of their tiles (n,), n = K * factor²
    logits       of soft labels that are not learned (n, classes), or None
    carried      tensors by name, from which the objective's next iteration continues, or None
    losses       the objective in each iteration so far
    evaluations  of the synthetic images
    baselines    evaluations of random real images, at the initial α and at the best one

    What is evaluated, drawn and saved are `images`, `labels` and `alpha`: the running means, if
    there are any.
    """

    def __init__(self, start, rules, device):
        """State of a run that begins."""
        self.rules = rules
        self.label_syn, self.source = start.classes.to(device), start.source
        self.kind = LABELS[rules.labels]
        of_alpha = STEP_SIZE_OPTIMIZERS[rules.optimizer_lr]
        of_images = IMAGE_OPTIMIZERS[rules.optimizer_img]
        self.learns_log = of_alpha.of_log
        self.alpha = self.current_alpha = torch.tensor(start.alpha).item()  # float32

        logits = None if start.logits is None else start.logits.to(device)
        self.logits = None if self.kind.learned else logits
        learned = {"images": (start.images.to(device), of_images, rules.lr_img)}
        if self.kind.learned:
            learned["labels"] = logits, self.kind.optimizer, rules.lr_labels
        if rules.lr_lr is not None:
            alpha = torch.tensor(start.alpha, device=device)
            alpha = alpha.log() if self.learns_log else alpha
            learned["alpha"] = alpha, of_alpha, rules.lr_lr
        self.learned, self.optimizers = {}, {}
        for name, (tensor, optimizer, rate) in learned.items():
            self.learned[name] = tensor.requires_grad_(True)
            self.optimizers[name] = optimizer.make([tensor], rate)
        self.average = None
        self.norms = None  # with `clip`: running norms of the gradients, by name
        self.carried = None
        self.losses = []
        self.evaluations = Evaluations()
        self.baselines = []
        self.seconds_before = 0.0  # of the processes that this one resumes
        self.started_at = time.time()
        self.finished = False

    def leaves(self):
        """Leaf tensors in the order of `learned`, to differentiate by; the last is α itself.

        For objectives that learn α.
        """
        *synthetic, alpha = self.learned.values()
        alpha = alpha.detach()
        alpha = alpha.exp() if self.learns_log else alpha.clone()
        return [*synthetic, alpha.requires_grad_(True)]

    @property
    def evaluated(self):
        """All that is learned, by name, as it is evaluated and saved: the running means, if any."""
        return self.average or {name: tensor.detach() for name, tensor in self.learned.items()}

    @property
    def images(self):
        """The synthetic images (K, C, S, S) that are evaluated, drawn and saved."""
        return self.evaluated["images"]

    @property
    def labels(self):
        """The labels that networks learn from: classes (n,), or probabilities (n, classes)."""
        logits = self.evaluated.get("labels", self.logits)
        return self.label_syn if logits is None else self.kind.read(logits)

    @property
    def targets(self):
        """The targets (n, classes) of kernel machines, if they are learned; else None."""
        return self.evaluated.get("labels") if self.kind.centred else None

    def batch_maker(self, augment):
        """A function that makes (x, y) from the learned tensors and a drawn batch, for engines."""

        def make_batch(learned, batch):
            image_syn, *logits = learned
            if logits:
                labels = self.kind.read(logits[0])
            else:  # read now: a checkpoint may have brought others
                labels = self.label_syn if self.logits is None else self.kind.read(self.logits)
            return augment(image_syn, batch, labels)

        return make_batch

    @property
    def seconds(self):
        return self.seconds_before + time.time() - self.started_at

    def step(self, step):
        """Update all that is learned by the gradients of a `Step`.

        Returns as text what is not finite, or that α is not positive; None if all is well.
        """
        loss, gradients = step.loss, step.gradients
        if "alpha" in gradients and self.learns_log:  # ∂L/∂(log α) = α ∂L/∂α
            alpha = self.learned["alpha"].detach().exp()  # else the running norms keep a graph
            gradients = gradients | {"alpha": gradients["alpha"] * alpha}
        self.follow(self.clipped(gradients) if self.rules.clip else gradients)
        self.carried = step.carried
        checked = {f"∂L/∂{name}": gradient for name, gradient in gradients.items()}
        checked |= {"images": self.learned["images"]}
        finite = {name: tensor.isfinite().all() for name, tensor in checked.items()}
        values = fetched({"loss": loss} | finite | self.step_sizes())
        alpha = None
        if "alpha" in self.learned:
            self.alpha = values["evaluated"]
            alpha = self.current_alpha = values["learned"]
        self.losses.append(values["loss"])
        if len(self.losses) in self.rules.halvings:
            self.optimizers["images"].param_groups[0]["lr"] /= 2
        return first_fault(values["loss"], alpha, {name: values[name] for name in finite})

    def follow(self, gradients):
        """A step of each optimiser on gradients by name, and of the running means."""
        for name, gradient in gradients.items():
            self.learned[name].grad = gradient
        for optimizer in self.optimizers.values():
            optimizer.step()
        if self.rules.ema:
            self.update_average()

    def step_sizes(self):
        """α as it is "learned" and as it is "evaluated", scalars; none if it is not learned."""
        if "alpha" not in self.learned:
            return {}
        sizes = {"learned": self.learned["alpha"], "evaluated": self.evaluated["alpha"]}
        sizes = {name: alpha.detach() for name, alpha in sizes.items()}
        return {name: alpha.exp() for name, alpha in sizes.items()} if self.learns_log else sizes

    @torch.no_grad()
    def update_average(self):
        """Move the running means (EMA) towards what is learned now."""
        if self.average is None:
            self.average = {name: tensor.clone() for name, tensor in self.learned.items()}
        for name, mean in self.average.items():
            mean.lerp_(self.learned[name], 1 - self.rules.ema)

    def clipped(self, gradients):
        """Gradients by name, each no longer than twice the running mean of its norm.

        As RaT-BPTT does (arXiv 2311.07025): the gradient of a long unroll has rare, huge values.
        """
        norms = {name: gradient.norm() for name, gradient in gradients.items()}
        before = self.norms or norms
        limits = {name: torch.minimum(norm, 2 * before[name]) for name, norm in norms.items()}
        self.norms = {name: 0.9 * before[name] + 0.1 * limits[name] for name in norms}
        return {
            name: gradient * (limits[name] / norms[name].clamp(min=1e-30))
            for name, gradient in gradients.items()
        }

    def add_evaluation(self, scores, epochs):
        """Add what networks of so many epochs reached on what is evaluated now."""
        self.evaluations.add(scores, self.alpha, self.losses, self.seconds, epochs)

    def resume(self, iterations, evaluator):
        """Continue a run that may have been finished, and may be evaluated in another way."""
        self.finished &= len(self.losses) == iterations
        # Baselines are for the same networks, as many, trained for as many epochs.
        wanted = evaluator.pool.keys(), evaluator.epochs, evaluator.num_eval
        if self.baselines and not self.finished and networks_in(self.baselines[0]) != wanted:
            self.baselines = []

    def save(self, path):
        files.write_tensors(path, self.content())

    def load(self, path):
        """Restore what `save` wrote, if anything.

        Raises ReportedError for a file that is damaged, or no checkpoint of this version.
        """
        if not path.exists():
            return  # a new run
        fault = files.damage(path)
        if fault:
            raise ReportedError(
                f"{path} is damaged ({fault}): remove it, and the run starts from scratch"
            )
        try:
            self.restore(files.load_tensors(path))
        except Exception as error:  # a foreign file raises whatever its content triggers
            if is_out_of_memory(error):
                raise
            raise ReportedError(
                f"{path} cannot be read as a checkpoint of this version ({first_line(error)}): "
                "resume it with the version that wrote it, or start from its images (--pix_init) "
                "under another --run_name"
            ) from None

    def content(self):
        """All that changes, as tensors on the CPU, lists and numbers."""
        return {
            "learned": on_cpu(self.learned),
            "average": on_cpu(self.average),
            "norms": on_cpu(self.norms),
            "carried": on_cpu(self.carried),
            "label_syn": self.label_syn.cpu(),
            "logits": None if self.logits is None else self.logits.cpu(),
            "optimizers": {name: each.state_dict() for name, each in self.optimizers.items()},
            "losses": self.losses,
            "alpha": self.alpha,
            "current_alpha": self.current_alpha,
            "evaluations": to_json(self.evaluations.rows),
            "baselines": to_json(self.baselines),
            "seconds": self.seconds,
            "finished": self.finished,
        }

    @torch.no_grad()
    def restore(self, content):
        """Go back to such a content."""
        device = self.label_syn.device
        # Copied in place: the optimisers, and what makes batches, refer to these tensors.
        for name, tensor in self.learned.items():
            tensor.copy_(content["learned"][name])
        self.label_syn.copy_(content["label_syn"])
        if self.logits is not None:
            self.logits.copy_(content["logits"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(content["optimizers"][name])
        self.average, self.norms, self.carried = (
            saved and {name: tensor.to(device) for name, tensor in saved.items()}
            for saved in (content["average"], content["norms"], content.get("carried"))
        )
        self.alpha, self.current_alpha = content["alpha"], content["current_alpha"]
        self.losses = content["losses"]
        self.evaluations = Evaluations(from_json(content["evaluations"]))
        self.baselines = from_json(content["baselines"])
        self.seconds_before = content["seconds"]
        self.finished = content["finished"]


def networks_in(row):
    """Names, epochs and number of the networks of an evaluation."""
    scores = row["scores"]
    count = max(len(of_network.test) for of_network in scores.values())
    return scores.keys(), row["epochs"], count


def fetched(scalars):
    """Scalar tensors by name as numbers, in one transfer, since it waits for the device."""
    kind = scalars["loss"].dtype
    values = torch.stack([scalar.to(kind) for scalar in scalars.values()]).tolist()
    return dict(zip(scalars, values))


def on_cpu(tensors):
    """Tensors by name on the CPU, where they share their memory; None for None."""
    return tensors and {name: tensor.detach().cpu() for name, tensor in tensors.items()}


def first_fault(loss, alpha, finite):
    """Say what went wrong in an iteration, and what may help; None: nothing.

    `alpha` is None if it is not learned.
    """
    faults = [] if math.isfinite(loss) else ["loss is not finite"]
    faults += [f"{name} is not finite" for name, is_finite in finite.items() if not is_finite]
    if alpha is not None and not 0 < alpha < math.inf:
        faults.append("α is not positive")
    if not faults:
        return None
    remedy = "Lower --lr_img in another run"
    if alpha is not None:
        faults[0] += f", α = {alpha:.4g}"
        remedy = (
            "Lower --lr_lr, --lr_img, --lr_teacher or --syn_steps, or learn log α "
            "(--optimizer_lr=log_adam), in another run"
        )
    return f"{faults[0]}. {remedy}; the last checkpoint of this one is kept"
