"""FIPOptimizer in the ``Trainer`` of Hugging Face transformers."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from fipoptim.integrations.carried import carry_anchors
from fipoptim.integrations.figures import drift_figures, settle_figures
from fipoptim.integrations.wrapped import check_trains, refuse_clipping, unwrapped
from fipoptim.optimizer import FIPOptimizer

logger = logging.getLogger(__name__)

_ADVICE = "build one, and pass Trainer(optimizers=(opt, None), callbacks=[FIPCallback()])"


class FIPCallback(TrainerCallback):
    """Settles a network before it is evaluated or saved, saves and resumes the anchors, and logs the drift.

    The Trainer is given the optimizer: ``Trainer(model, args, optimizers=(opt, None), callbacks=[FIPCallback()])``.

    * With a budget, the network is brought within it (:meth:`FIPOptimizer.settle`) at each step after which the Trainer
      evaluates or saves, and at the end of training. The checkpoints of ``save_steps`` are thus within the budget.
    * ``checkpoint-N/optimizer.pt`` holds the anchors with their first reference and the seed of their draws
      (:func:`fipoptim.integrations.carry_anchors`). ``resume_from_checkpoint`` puts them back, even if the anchors were
      built on the trained network.
    * Each log of the training loss has ``drift`` and ``flips``, counted on the check inputs if there are any, and the
      budget. The first log after a settlement has its account, ``settle_*``. Reporters read their logs in the order of
      the callbacks: list yours behind this one, with ``report_to=[]``.
    * With several processes it settles and measures on each. Build ``TrainingArguments``, which join them, before the
      anchors.

    Raises:
        TypeError: If the Trainer has another optimizer.
        ValueError: If ``max_grad_norm`` is not 0, or the optimizer is not one of the model's parameters.

    Example:
        >>> anchors = AnchorBatch(model, old_inputs, check=0.2)
        >>> opt = FIPOptimizer(model.parameters(), anchors, beta="auto", max_flips=0.01, check_every=None)
        >>> args = TrainingArguments("runs", max_grad_norm=0)
        >>> trainer = Trainer(
        ...     model, args, train_dataset=data, optimizers=(opt, None), callbacks=[FIPCallback()]
        ... )
    """

    def __init__(self) -> None:
        self._settled_at: int | None = None  # the number of the step
        self._account: dict[str, float] = {}  # of the last settlement, until it is logged
        self._carries = False

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Check the arguments of the Trainer, and let the anchors travel in the optimizer's state."""
        self._begin(args, model, optimizer)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Check the arguments again, which may have changed."""
        if state.global_step > 0 and not self._carries:
            raise ValueError(
                "callbacks: FIPCallback came after the Trainer was built, too late to restore the anchors of the "
                "checkpoint; pass Trainer(callbacks=[FIPCallback()])."
            )
        self._begin(args, model, optimizer)
        self._settled_at, self._account = None, {}

    def _begin(self, args: TrainingArguments, model: nn.Module, optimizer: Any) -> None:
        found = unwrapped(optimizer, _ADVICE)
        check_trains(found, model.parameters(), "the Trainer")
        refuse_clipping("max_grad_norm", args.max_grad_norm)
        carry_anchors(found)
        self._carries = True

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Settle if an evaluation, a checkpoint or the end of training follows."""
        if control.should_evaluate or control.should_save or control.should_training_stop:
            self._settle(unwrapped(optimizer, _ADVICE), state)

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """As :meth:`on_step_end`."""
        self.on_step_end(args, state, control, optimizer=optimizer)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        logs: dict[str, Any] | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Add the drift, and the account of a settlement, to the logs of the training loss."""
        if logs is None or not {"loss", "train_loss"} & logs.keys():
            return
        figures = drift_figures(unwrapped(optimizer, _ADVICE)) | self._account
        logs.update(figures)
        state.log_history[-1].update(figures)  # the Trainer has copied the logs before
        self._account = {}

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Warn of a checkpoint that no settlement came before."""
        found = unwrapped(optimizer, _ADVICE)
        if found.budget.given and found.check_every != 1 and self._settled_at != state.global_step:
            logger.warning(
                "checkpoint-%d was saved before the network was settled, as a callback behind FIPCallback asked for "
                "it; list FIPCallback last.",
                state.global_step,
            )

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Settle the network that is left, which may be the best one of the run."""
        self._settled_at = None
        self._settle(unwrapped(optimizer, _ADVICE), state)

    def _settle(self, optimizer: FIPOptimizer, state: TrainerState) -> None:
        if not optimizer.budget.given or self._settled_at == state.global_step:
            return
        settled = optimizer.settle()
        self._settled_at, self._account = state.global_step, settle_figures(settled)
        logger.info("step %d: %s", state.global_step, settled)
