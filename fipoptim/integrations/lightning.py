"""FIPOptimizer in the ``Trainer`` of Lightning."""

from __future__ import annotations

import logging
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from fipoptim.integrations.carried import carry_anchors
from fipoptim.integrations.figures import drift_figures, settle_figures
from fipoptim.integrations.wrapped import check_trains, refuse_clipping
from fipoptim.optimizer import FIPOptimizer

logger = logging.getLogger(__name__)


class FIPCallback(Callback):
    """Settles a network before it is validated or saved, saves and resumes the anchors, and logs the drift.

    The module's ``configure_optimizers`` returns a :class:`FIPOptimizer`, alone or beside other optimizers.

    * With a budget, the network is brought within it (:meth:`FIPOptimizer.settle`) before each validation and each
      checkpoint, and at the end of each epoch. A checkpoint of weights alone (``save_weights_only``) that is written
      within an epoch is not settled: Lightning tells callbacks nothing of it.
    * The checkpoint holds the anchors with their first reference and the seed of their draws, in the optimizer's state
      (:func:`fipoptim.integrations.carry_anchors`). ``trainer.fit(ckpt_path=...)`` puts them back, even if the anchors
      were built on the trained network.
    * ``drift`` and ``flips``, counted on the check inputs if there are any, and the budget are logged every
      ``log_every_n_steps``; after a settlement, its account, ``settle_*``.
    * With several processes it settles and measures on each.
    * In manual optimization ``opt.step()`` takes the gradient as it stands. Without this callback it would move
      nothing, as Lightning hands over a closure that returns None.

    Raises:
        TypeError: If the module has no FIPOptimizer, or several.
        ValueError: If ``gradient_clip_val`` is given, or the optimizer is not one of the module's parameters.

    Example:
        >>> trainer = Trainer(max_epochs=3, callbacks=[FIPCallback()])
        >>> trainer.fit(module, loader)
    """

    def __init__(self) -> None:
        self._settled_at: int | None = None  # the number of the step
        self._logged_at: int | None = None
        self._manual: RemovableHandle | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the arguments of the Trainer, and let the anchors travel in the optimizer's state.

        Lightning restores the states of the optimizers behind this.
        """
        optimizer = _fip_optimizer(trainer)
        check_trains(optimizer, pl_module.parameters(), "the Trainer")
        refuse_clipping("gradient_clip_val", trainer.gradient_clip_val)
        carry_anchors(optimizer)
        self._settled_at = self._logged_at = None
        self._end_manual()
        if not pl_module.automatic_optimization:
            self._manual = optimizer.register_step_pre_hook(_without_closure)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the optimizer's steps as they were."""
        self._end_manual()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """As :meth:`on_fit_end`."""
        self._end_manual()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the drift every ``log_every_n_steps``."""
        step, every = trainer.global_step, trainer.log_every_n_steps
        if every and step % every == 0 and step != self._logged_at:
            self._logged_at = step
            self.log_dict(drift_figures(_fip_optimizer(trainer)))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Settle; checkpoints of the epoch follow."""
        self._settle(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Settle the network that is validated, if it is being trained."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._settle(trainer)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Settle, and write the settled network into the checkpoint, which Lightning has filled before."""
        if self._settle(trainer):
            strategy = trainer.strategy
            checkpoint["state_dict"] = strategy.lightning_module_state_dict()
            checkpoint["optimizer_states"] = [
                strategy.optimizer_state(optimizer) for optimizer in trainer.optimizers
            ]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Settle the network that is left."""
        self._settle(trainer)

    def _settle(self, trainer: Trainer) -> bool:
        optimizer, step = _fip_optimizer(trainer), trainer.global_step
        if not optimizer.budget.given or self._settled_at == step:
            return False
        settled = optimizer.settle()
        self._settled_at = step
        logger.info("step %d: %s", step, settled)
        for reporter in trainer.loggers:
            reporter.log_metrics(settle_figures(settled), step=step)
        return True

    def _end_manual(self) -> None:
        if self._manual is not None:
            self._manual.remove()
            self._manual = None


def _fip_optimizer(trainer: Trainer) -> FIPOptimizer:
    """The one FIPOptimizer of a Trainer.

    Raises:
        TypeError: If there is none, or more than one.
    """
    found = [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, FIPOptimizer)]
    if len(found) != 1:
        kinds = [type(optimizer).__name__ for optimizer in trainer.optimizers]
        raise TypeError(
            f"configure_optimizers: must return one FIPOptimizer, got {kinds}; build one there on the module's "
            "parameters."
        )
    return found[0]


def _without_closure(
    optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Call the closure of a step, and let the step take the gradient as it stands."""
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if closure is not None:
        with torch.enable_grad():
            closure()
    return args[:1], {}
