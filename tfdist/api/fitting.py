"""One call of `Run.fit`: what it was given, read, checked, shared out among the workers, and trained."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Sequence
from typing import Any

import keras

from tfdist import keras_internals
from tfdist.api.arguments import FitArguments, FitData, epoch_ends, read_fit_data
from tfdist.api.checks import check_batches, check_callbacks, check_stages, check_sync, choose_steps_per_loop
from tfdist.api.privacy import PrivateFit, plan_private
from tfdist.api.run_state import RunState
from tfdist.config.ps_options import PS_SHARED
from tfdist.config.run_config import check_jit
from tfdist.config.settings import check_owner
from tfdist.data.service import DataService
from tfdist.training.checkpoint.saver import Saver
from tfdist.training.loop import Fit, FitOptions, plan_steps
from tfdist.training.model_loop import Loop
from tfdist.training.monitoring.callbacks import split_callbacks
from tfdist.training.on_nan import OnNan
from tfdist.training.pipeline.loop import PipelineLoop
from tfdist.training.pipeline.whole_weights import WholeWeights
from tfdist.training.ps.loop import CoordinatorLoop
from tfdist.training.sync.loop import SyncLoop

_log = logging.getLogger("tfdist")


class Fitting:
    """Carries out one call."""

    def __init__(self, state: RunState, given: FitArguments) -> None:
        if given.steps_per_loop is None and given.model.steps_per_execution > 1:
            given = dataclasses.replace(given, steps_per_loop=given.model.steps_per_execution)
        self._state = state
        self._given = given

    def run(self) -> keras.callbacks.History:
        """Trains; returns the history."""
        state, given = self._state, self._given
        data = read_fit_data(given)
        loop = state.find_loop(given.model, data.source)
        if data.validation is not None:
            state.check_elements(given.model, data.validation)
        private = self._plan_private(loop, data)
        data = data if private is None else private.data
        self._configure(loop, data, private)
        check_batches(
            loop,
            data.source,
            state.strategy_name,
            batch_size=data.batch_size,
            drop_remainder=given.drop_remainder,
            on_nan=given.on_nan,
        )
        check_callbacks(given.callbacks, state.strategy_name)
        data, service = self._share(loop, data)
        self._train(loop, data, service, private)
        if private is not None:
            state.spent[given.model] = private.spent
        return given.model.history

    def _plan_private(self, loop: Loop, data: FitData) -> PrivateFit | None:
        state, given = self._state, self._given
        if given.privacy is None or not given.privacy.is_on:
            return None
        given.privacy.check_run(
            state.strategy_name,
            sync=given.sync_options,
            on_nan=given.on_nan,
            jit_compile=given.jit_compile,
        )
        before = state.spent.get(given.model, ())
        return plan_private(given, data, broadcast=loop.broadcast, before=before)

    def _configure(self, loop: Loop, data: FitData, private: PrivateFit | None) -> None:
        """Tells the loop how steps are shared out and compiled, and a person what was chosen."""
        state, given = self._state, self._given
        check_owner(given.ps_options, state.strategy_name, owner="ps", shared=PS_SHARED)
        check_sync(given.sync_options, state.strategy_name, is_elastic=state.members is not None)
        check_jit(state.strategy_name, given.jit_compile)
        lines = [] if private is None else [private.line]
        if isinstance(loop, CoordinatorLoop):
            loop.configure(given.ps_options)
        elif isinstance(loop, SyncLoop):
            lines.append(loop.configure(given.sync_options, None if private is None else private.mechanism))
            # Noise is drawn outside of what XLA compiles.
            jit_compile = given.jit_compile if private is None else "off"
            lines.append(loop.choose_compiler(jit_compile, data.source, data.batch_size))
        elif isinstance(loop, PipelineLoop):
            check_stages(
                (data.source, data.validation),
                is_served=given.data_service is not None,
                is_elastic=state.members is not None,
            )
            lines.append(loop.describe())
        if state.cluster.is_chief and given.verbose != 0:
            print("".join(f"tfdist: {line}\n" for line in lines if line), end="", flush=True)

    def _share(self, loop: Loop, data: FitData) -> tuple[FitData, contextlib.AbstractContextManager[Any]]:
        """Returns what this process reads of the data, and the service that prepares them, or a stand-in for it."""
        shard, address = self._given.shard, self._given.data_service
        validation = None if data.validation is None else loop.shard_source_of(data.validation, shard)
        if address is None:
            source = loop.shard_source_of(data.source, shard)
            return dataclasses.replace(data, source=source, validation=validation), contextlib.nullcontext()
        service = DataService(address, loop=loop, cluster=self._state.cluster)
        return dataclasses.replace(data, source=service.share(data.source), validation=validation), service

    def _train(
        self,
        loop: Loop,
        data: FitData,
        service: contextlib.AbstractContextManager[Any],
        private: PrivateFit | None,
    ) -> None:
        state, given, model = self._state, self._given, self._given.model
        steps = plan_steps(
            data.source, data.batch_size, given.steps_per_epoch, drop_remainder=given.drop_remainder
        )
        options = self._options(loop, data, steps, given.epochs if private is None else private.epochs)
        callbacks = self._callbacks(loop, options, steps, [] if private is None else private.callbacks)
        saver = Saver(
            checkpoints=given.checkpoints,
            loop=loop,
            model=model,
            callbacks=callbacks,
            is_chief=state.cluster.is_chief,
            say=_log.info if given.verbose == 0 else functools.partial(print, flush=True),
            num_steps=steps,
            order=options.order_of(data.source, num_readers=loop.num_readers),
            members=state.members,
            carried=state.carried,
        )
        on_nan = OnNan(
            policy=given.on_nan,
            max_loss_spike=given.max_loss_spike,
            loop=loop,
            model=model,
            source=data.source,
            saver=saver,
            is_chief=state.cluster.is_chief,
        )
        with state.working(), service, self._answering(), saver:
            Fit(
                loop=loop,
                model=model,
                source=data.source,
                validation=data.validation,
                options=options,
                callbacks=callbacks,
                saver=saver,
                heartbeat=state.heartbeat,
                on_nan=on_nan,
            ).run()

    def _options(self, loop: Loop, data: FitData, steps: int | None, epochs: int) -> FitOptions:
        given, steps_per_loop = self._given, self._given.steps_per_loop
        if isinstance(loop, SyncLoop):
            steps_per_loop = choose_steps_per_loop(
                steps_per_loop,
                on_nan=given.on_nan,
                max_loss_spike=given.max_loss_spike,
                is_elastic=self._state.members is not None,
            )
        return FitOptions(
            global_batch_size=data.batch_size,
            epochs=epochs,
            initial_epoch=given.initial_epoch,
            steps_per_epoch=given.steps_per_epoch or steps,
            shuffle=given.shuffle,
            seed=self._state.seed,
            validation_batch_size=data.validation_batch_size,
            validation_steps=given.validation_steps,
            validation_freq=given.validation_freq,
            shown=given.verbose not in (0, 2),
            drop_remainder=given.drop_remainder,
            steps_per_loop=steps_per_loop,
        )

    def _callbacks(
        self, loop: Loop, options: FitOptions, steps: int | None, first: Sequence[keras.callbacks.Callback]
    ) -> keras.callbacks.CallbackList:
        """Returns those that run here; the others shall see the logs of the first."""
        own, _ = split_callbacks(self._given.callbacks, is_chief=self._state.cluster.is_chief)
        own = [*first, *own, *epoch_ends(self._given.x)]
        callbacks = keras.callbacks.CallbackList(
            [*own, *self._progress(own)], add_history=True, model=self._given.model
        )
        if self._state.strategy_name == "pipeline":
            for callback in own:
                if isinstance(callback, keras.callbacks.EarlyStopping):
                    callback.set_model(WholeWeights(self._given.model, is_chief=self._state.cluster.is_chief))
        callbacks.set_params(
            {  # Keras's, and ours
                "epochs": options.epochs,
                "steps": steps,
                "verbose": self._given.verbose,
                "global_batch_size": options.global_batch_size,
                "input_wait": lambda: loop.input_wait.share,
                "measures": loop.measures,
            }
        )
        return callbacks

    def _answering(self) -> contextlib.AbstractContextManager[None]:
        """Lets callbacks call the model's own `predict` and `evaluate`."""
        if self._state.strategy_name in ("one_device", "pipeline"):
            return contextlib.nullcontext()
        return keras_internals.answering_alone(self._given.model, self._state.strategy)

    def _progress(self, own: Sequence[Any]) -> list[keras.callbacks.Callback]:
        has_bar = any(isinstance(c, keras.callbacks.ProgbarLogger) for c in own)
        if not self._state.cluster.is_chief or self._given.verbose == 0 or has_bar:
            return []
        # Here, since drawing brings rich, which a silent run need not load.
        from tfdist.training.monitoring.progress import ProgressBar

        return [] if any(isinstance(c, ProgressBar) for c in own) else [ProgressBar()]
