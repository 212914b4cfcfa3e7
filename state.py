"""What a run changes: the synthetic images, their labels, α, and what is known about them."""

import math
import time

import torch

import files
import utils
from image_sets import initial_set
from preprocessing import Data
from process import ReportedError, first_line
from saved_sets import classes_of
from scores import Evaluations, from_json, to_json

IMAGE_OPTIMIZERS = {  # --optimizer_img
    "sgd": lambda images, rate: torch.optim.SGD([images], lr=rate, momentum=0.5),
    "adam": lambda images, rate: torch.optim.Adam([images], lr=rate),
}


class State:
    """All that changes in a run, which a checkpoint keeps.

    image_syn    synthetic images (K, 3, S, S)
    label_syn    their classes (K,)
    logits       of their soft labels, (K, classes); None: the labels are the classes
    syn_lr       α, a scalar; alpha: its value
    source       what the images start from: "real", "noise", or a saved set's digest
    losses       the objective in each iteration so far
    evaluations  of the synthetic images
    baselines    evaluations of random real images, at the initial α and at the best one
    """

    def __init__(self, args, data: Data):
        """Where a run starts."""
        device = data.train[0].device
        random = utils.make_generator("distillation", args.seed)
        images, labels, self.source = initial_set(args, data, random)
        images, labels = images.to(device), labels.to(device)
        self.image_syn = images.requires_grad_(True)
        self.label_syn = classes_of(labels)
        self.logits = labels.clamp(min=1e-12).log() if labels.dim() == 2 else None
        self.syn_lr = torch.tensor(args.lr_teacher, device=device, requires_grad=True)  # ()
        self.alpha = self.syn_lr.item()
        self.optimizers = [
            IMAGE_OPTIMIZERS[args.optimizer_img](self.image_syn, args.lr_img),
            torch.optim.SGD([self.syn_lr], lr=args.lr_lr, momentum=0.5),
        ]
        self.clips = args.objective == "loss"
        self.norms = None  # with `clips`: running norms of the gradients
        self.losses = []
        self.evaluations = Evaluations()
        self.baselines = []
        self.seconds_before = 0.0  # of the processes that this one resumes
        self.start = time.time()
        self.finished = False

    def soften(self, logits, rate):
        """Use these logits (K, classes) as labels, and learn them unless `rate` is None."""
        self.logits = logits.detach().clone()
        if rate is not None:
            self.logits.requires_grad_(True)
            self.optimizers.append(torch.optim.SGD([self.logits], lr=rate, momentum=0.9))

    @property
    def synthetic(self):
        """What is learned, except α."""
        learned = self.logits is not None and self.logits.requires_grad
        return (self.image_syn, self.logits) if learned else (self.image_syn,)

    @property
    def labels(self):
        """What networks learn from: classes (K,), or probabilities (K, classes)."""
        return self.label_syn if self.logits is None else self.logits.detach().softmax(1)

    def batch_maker(self, augment):
        """A function that makes (x, y) from the learned tensors and a drawn batch, for engines."""

        def make_batch(synthetic, batch):
            image_syn, *logits = synthetic
            return augment(image_syn, batch, logits[0].softmax(1) if logits else self.labels)

        return make_batch

    @property
    def seconds(self):
        return self.seconds_before + time.time() - self.start

    def step(self, loss, *gradients):
        """Update all that is learned by the gradients of this loss, in the engine's order.

        Returns as text what is not finite, or that α is not positive; None if all is well.
        """
        learned = (*self.synthetic, self.syn_lr)
        for tensor, gradient in zip(learned, self.clipped(gradients) if self.clips else gradients):
            tensor.grad = gradient
        for optimizer in self.optimizers:
            optimizer.step()
        names = ("∂L/∂images", *(["∂L/∂labels"] if len(learned) == 3 else []), "∂L/∂α")
        checked = {**dict(zip(names, gradients)), "images": self.image_syn}
        finite = [tensor.isfinite().all() for tensor in checked.values()]
        # One transfer fetches all that is needed from an iteration, since it waits for the device.
        values = [loss, self.syn_lr.detach(), *(flag.to(loss.dtype) for flag in finite)]
        loss, self.alpha, *finite = torch.stack(values).tolist()
        self.losses.append(loss)
        return first_fault(loss, self.alpha, dict(zip(checked, finite)))

    def clipped(self, gradients):
        """Gradients, each no longer than twice the running mean of its norm.

        As RaT-BPTT does (arXiv 2311.07025): the gradient of a long unroll has rare, huge values.
        """
        norms = torch.stack([gradient.norm() for gradient in gradients])
        if self.norms is None:
            self.norms = norms
        limits = torch.minimum(norms, 2 * self.norms)
        self.norms = 0.9 * self.norms + 0.1 * limits
        return [
            g * (limit / norm.clamp(min=1e-30)) for g, limit, norm in zip(gradients, limits, norms)
        ]

    def resume(self, iterations, evaluator):
        """Continue a run that may have been finished, and may be evaluated in another way."""
        self.finished &= len(self.losses) == iterations
        # Baselines are for the same networks, as many, trained for as many epochs.
        wanted = evaluator.pool.keys(), evaluator.epochs, evaluator.num_eval
        for row in self.baselines[:1]:
            scores = row["scores"]
            seen = scores.keys(), row.get("epochs"), len(next(iter(scores.values())).test)
            self.baselines = [] if seen != wanted and not self.finished else self.baselines

    def save(self, path):
        files.write_tensors(path, self.content())

    def load(self, path):
        """Restore what `save` wrote, if anything. Raises ReportedError for a damaged file."""
        try:
            self.restore(torch.load(path, map_location="cpu", weights_only=True))
        except FileNotFoundError:
            pass  # a new run
        except Exception as error:  # a foreign or damaged file raises whatever its bytes trigger
            raise ReportedError(
                f"{path} is damaged ({first_line(error)}): remove it, and the run starts from "
                "scratch"
            ) from None

    def content(self):
        """All that changes, as tensors on the CPU, lists and numbers."""
        tensors = {
            "images": self.image_syn.detach(),
            "labels": self.label_syn,
            "logits": None if self.logits is None else self.logits.detach(),
            "syn_lr": self.syn_lr.detach(),
            "norms": self.norms,
        }
        return {name: None if t is None else t.cpu() for name, t in tensors.items()} | {
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "losses": self.losses,
            "evaluations": to_json(self.evaluations.rows),
            "baselines": to_json(self.baselines),
            "seconds": self.seconds,
            "finished": self.finished,
        }

    @torch.no_grad()
    def restore(self, content):
        """Go back to such a content."""
        # Copied in place: the optimisers refer to these tensors.
        self.image_syn.copy_(content["images"])
        self.label_syn.copy_(content["labels"])
        if self.logits is not None:
            self.logits.copy_(content["logits"])
        self.syn_lr.copy_(content["syn_lr"])
        self.alpha = self.syn_lr.item()
        for optimizer, saved in zip(self.optimizers, content["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        if content["norms"] is not None:
            self.norms = content["norms"].to(self.syn_lr.device)
        self.losses = content["losses"]
        self.evaluations = Evaluations(from_json(content["evaluations"]))
        self.baselines = from_json(content["baselines"])
        self.seconds_before = content["seconds"]
        self.finished = content["finished"]


def first_fault(loss, alpha, finite):
    """What went wrong in an iteration, and what may help. None: nothing. `finite` is by name."""
    faults = [] if math.isfinite(loss) else ["loss is not finite"]
    faults += [f"{name} is not finite" for name, is_finite in finite.items() if not is_finite]
    if not 0 < alpha < math.inf:
        faults.append("α is not positive")
    if not faults:
        return None
    return (
        f"{faults[0]}, α = {alpha:.4g}. Lower --lr_lr, --lr_img, --lr_teacher or --syn_steps, and "
        "start another run; the last checkpoint of this one is kept"
    )
