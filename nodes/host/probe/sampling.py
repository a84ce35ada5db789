"""Watches a model while the host samples it: wrappers on a clone, gone when the sampling ends."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from comfy.model_management import InterruptProcessingException
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from ..base import block_events as block_watch
from ..base.options import OPTIONS_KEY
from . import events as probe_events
from . import files as probe_files
from . import prompt as probe_prompt
from .sampling_run import SamplingRun
from .settings import ProbeSettings

# Where the host's OUTER_SAMPLE hands over the function that it calls after each step.
_CALLBACK = 5


def is_model(value: Any) -> bool:
    """True for what travels on a MODEL wire."""
    return isinstance(value, ModelPatcher)


def with_probe(model: ModelPatcher, settings: ProbeSettings) -> ModelPatcher:
    """Returns a clone that is watched whenever the host samples it.

    Args:
        model: left as it is.
        settings: what the user asked; its `live` gets every later record.
    """
    clone = model.clone()
    watcher = _Watcher(settings)
    # Every probe has wrappers of its own, also where several stand on one wire.
    key = f"{OPTIONS_KEY}.probe.{settings.node_id or id(watcher)}"
    wrappers: dict[str, Callable[..., Any]] = {
        WrappersMP.OUTER_SAMPLE: watcher.outer_sample,
        WrappersMP.SAMPLER_SAMPLE: watcher.sampler_sample,
    }
    if settings.sees_blocks:
        wrappers[WrappersMP.APPLY_MODEL] = watcher.apply_model
        block_watch.add_observer(clone.model_options, watcher.block_ended)
    for kind, wrapper in wrappers.items():
        clone.remove_wrappers_with_key(kind, key)
        clone.add_wrapper_with_key(kind, key, wrapper)
    return clone


class _Watcher:
    """One probe's wrappers. Between two samplings it holds numbers and text, no tensor."""

    def __init__(self, settings: ProbeSettings) -> None:
        self._settings = settings
        self._run: SamplingRun | None = None
        self._recorder: Any = None
        self._prompt_id = ""
        # One for all samplings: a node may sample many times in a second.
        self._outlet = probe_events.Outlet(settings.tools.pace(probe_events.EVENTS_PER_SECOND))

    def outer_sample(self, executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around a whole sampling, with the loading of the model in front."""
        if self._run is not None:  # a sampling inside of a sampling belongs to the outer one
            return executor(*args, **kwargs)
        run = self._run = self._begin(executor.class_obj, args)
        state = "failed"
        try:
            args, kwargs = _with_callback(run.step_ended, args, kwargs)
            result = executor(*args, **kwargs)
            state = "done"
            return result
        except InterruptProcessingException:
            state = "interrupted"
            raise
        finally:
            self._run = None
            run.end(state)

    def sampler_sample(self, executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around the steps; the model is loaded."""
        run = self._run
        if run is None:
            return executor(*args, **kwargs)
        with run.steps():
            return executor(*args, **kwargs)

    def apply_model(self, executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around one call of the model."""
        run = self._run
        if run is None:
            return executor(*args, **kwargs)
        with ExitStack() as until:
            model = getattr(executor.class_obj, "diffusion_model", None)
            if model is not None:
                until.enter_context(block_watch.watched(model, self.block_ended))
            out = executor(*args, **kwargs)
        run.point("after the blocks")
        return out

    def block_ended(self, name: str) -> None:
        if self._run is not None:
            self._run.point(name)

    def _begin(self, guider: Any, args: tuple[Any, ...]) -> SamplingRun:
        settings = self._settings
        watch = probe_prompt.current(settings.tools)
        patcher = guider.model_patcher
        blank = probe_prompt.blank_record(watch, patcher.load_device, settings)
        # A second sampler in the same prompt goes on where the first one ended.
        if self._recorder is None or blank.prompt_id != self._prompt_id or not blank.prompt_id:
            self._recorder = settings.tools.recorder(blank)
            self._prompt_id = blank.prompt_id
        about = probe_files.about_sampling(patcher, args[0] if args else None)
        return SamplingRun(settings, watch, patcher, self._recorder, about, self._outlet)


def _with_callback(
    ended: Callable[[], None], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a sampling whose callback also tells us that a step has ended."""
    is_positional = "callback" not in kwargs and len(args) > _CALLBACK
    callback = args[_CALLBACK] if is_positional else kwargs.get("callback")

    def after_step(*given: Any, **named: Any) -> Any:
        ended()
        return None if callback is None else callback(*given, **named)

    if is_positional:
        return (*args[:_CALLBACK], after_step, *args[_CALLBACK + 1 :]), kwargs
    return args, {**kwargs, "callback": after_step}
