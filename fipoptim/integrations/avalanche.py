"""FIPOptimizer as a plugin of Avalanche: what was learnt of earlier experiences is held while the next is learnt."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from avalanche.evaluation.metric_results import MetricValue
from avalanche.models import MultiTaskModule
from avalanche.training.plugins import SupervisedPlugin
from torch import Generator, Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from fipoptim.anchors.batch import AnchorBatch
from fipoptim.anchors.held_outputs import HeldOutputs
from fipoptim.anchors.refusals import check_callable, check_positive
from fipoptim.integrations.figures import drift_figures, settle_figures
from fipoptim.optimizer import FIPOptimizer

# What stands in place of an output that is not held: less than any score, so that a held class is predicted.
NOT_HELD = -1000.0


class FIPPlugin(SupervisedPlugin):
    """Holds the outputs of the classes known so far, on inputs remembered from each experience.

    The first experience is learnt by the optimizer that the strategy is given. At the end of each, some of its inputs
    become anchors with the outputs that they then have, for all classes known by then. Outputs of later classes are
    free. From the second experience on, the strategy has a new :class:`FIPOptimizer` for each. The head may grow
    (``IncrementalClassifier``), as the optimizer is built after it has.

    With a budget, the network is brought within it (:meth:`FIPOptimizer.settle`) at the end of each experience and
    before each evaluation. It counts on the check inputs of all earlier experiences together.

    The loggers get ``FIP/drift`` and ``FIP/flips`` after each epoch, and ``FIP/settle_*`` after a settlement.

    Args:
        per_experience: The number of inputs remembered from each experience, check inputs included; all, if it has
            fewer.
        optimizer: Makes the optimizer from the model's parameters and the anchors, as
            ``functools.partial(FIPOptimizer, beta="auto", max_flips=0.01, check_every=None)`` does.
        classes: The number of classes that may come; each is a whole number below it.
        check: The share of the remembered inputs on which budgets count and no step trains; None counts on all.
        schedule: Makes a scheduler from the optimizer and the number of steps of the experience; it is stepped after
            each step. None leaves ``eps`` as it is.
        generator: Draws the remembered inputs; None takes torch's default one.
        **anchors: Further options of :class:`AnchorBatch`, such as ``output`` and ``batch_size``.

    Attributes:
        anchors: The anchors; None before the first experience has been learnt.
        known: The classes known so far.

    Raises:
        TypeError: If an argument has the wrong type, the model takes task labels, or ``optimizer`` makes no
            FIPOptimizer.
        ValueError: If a number is out of range, or an experience has a class beyond ``classes``.

    Example:
        >>> fip = functools.partial(FIPOptimizer, beta="auto", max_flips=0.02, check_every=None)
        >>> plugin = FIPPlugin(200, fip, classes=10)
        >>> strategy = Naive(model=model, optimizer=Adam(model.parameters()), plugins=[plugin])
    """

    def __init__(
        self,
        per_experience: int,
        optimizer: Callable[[Iterable[Tensor], AnchorBatch], FIPOptimizer],
        *,
        classes: int,
        check: float | None = 0.2,
        schedule: Callable[[FIPOptimizer, int], LRScheduler] | None = None,
        generator: Generator | None = None,
        **anchors: Any,
    ) -> None:
        super().__init__()
        check_positive("per_experience", per_experience)
        check_positive("classes", classes)
        check_callable("optimizer", optimizer)
        check_callable("schedule", schedule)
        self.per_experience, self.classes, self.check = per_experience, classes, check
        self.generator = generator
        self.anchors: AnchorBatch | None = None
        self.known: set[int] = set()
        self._make_optimizer, self._make_schedule = optimizer, schedule
        self._options = anchors
        self._optimizer: FIPOptimizer | None = None  # of the experience that is being learnt
        self._scheduler: LRScheduler | None = None

    def hold(self, model: nn.Module, inputs: Tensor, classes: Collection[int]) -> None:
        """Add anchors with the outputs of now. A network that was trained elsewhere is held by this from the start.

        Args:
            model: The strategy's model.
            inputs: The new anchors, shape ``(n, ...)``.
            classes: Classes that are known by now, in addition to those known before.

        Raises:
            TypeError: If the model takes task labels.
            ValueError: If a class is not below the number of classes.
        """
        if isinstance(model, MultiTaskModule):
            raise TypeError(
                f"model: {type(model).__name__} takes task labels, which anchors do not have; give a model with one "
                "head, such as IncrementalClassifier."
            )
        if beyond := [c for c in classes if not 0 <= c < self.classes]:
            raise ValueError(f"classes: {self.classes} may come, got class {max(beyond)}.")
        known = self.known | set(classes)
        held = torch.zeros(len(inputs), self.classes, dtype=torch.bool, device=inputs.device)
        held[:, sorted(known)] = True
        if self.anchors is None:
            network = HeldOutputs(model, self.classes, NOT_HELD)
            self.anchors = AnchorBatch(network, (inputs, held), check=self.check, **self._options)
        else:
            self.anchors.extend((inputs, held), check=self.check)
        self.known = known

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Give the strategy an optimizer of the network as it is now, grown, if there is something to hold."""
        if self.anchors is None:
            return
        made = self._make_optimizer(strategy.model.parameters(), self.anchors)
        if not isinstance(made, FIPOptimizer):
            raise TypeError(f"optimizer: must make a FIPOptimizer, got {type(made).__name__}.")
        strategy.optimizer = self._optimizer = made
        if self._make_schedule is not None:
            steps = strategy.train_epochs * len(strategy.dataloader)
            self._scheduler = self._make_schedule(made, steps)

    def after_update(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Step the schedule."""
        if self._scheduler is not None:
            self._scheduler.step()

    def after_training_epoch(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Log the drift."""
        if self._optimizer is not None:
            self._log(strategy, drift_figures(self._optimizer))

    def before_eval(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Settle the network that is evaluated, if it is being trained."""
        self._settle(strategy)

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Settle, and remember inputs of the experience."""
        self._settle(strategy)
        self._optimizer = self._scheduler = None
        experience = strategy.experience
        dataset = experience.dataset.eval()
        order = torch.randperm(len(dataset), generator=self.generator)[: self.per_experience]
        inputs = torch.stack([torch.as_tensor(dataset[i][0]) for i in order.tolist()])
        self.hold(strategy.model, inputs, experience.classes_in_this_experience)

    def _settle(self, strategy: Any) -> None:
        if self._optimizer is not None and self._optimizer.budget.given:
            self._log(strategy, settle_figures(self._optimizer.settle()))

    def _log(self, strategy: Any, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            found = MetricValue(self, f"FIP/{name}", value, strategy.clock.train_iterations)
            strategy.evaluator.publish_metric_value(found)
