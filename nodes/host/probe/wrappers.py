"""Watches a model while the host samples it: wrappers on a clone, gone when the sampling ends."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from comfy.model_management import InterruptProcessingException
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from ...probe.recorder import Recorder
from ...words import Words
from ..base.block_events import add_observer, watched
from ..base.options import OPTIONS_KEY
from .events import Sender
from .files import about_sampling
from .prompt import current
from .sampling import Sampling
from .settings import ProbeSettings

# Where the host's OUTER_SAMPLE hands over the function that it calls after each step.
_CALLBACK = 5


def with_probe(value: Any, settings: ProbeSettings) -> Any:
    """Returns a model's clone that is watched whenever the host samples it; other values as is.

    The model itself is left as it is. Every later record is written into `settings.live`.
    """
    if not isinstance(value, ModelPatcher):
        return value
    clone = value.clone()
    wrapped = _Wrappers(settings)
    # Every probe has wrappers of its own, also where several stand on one wire.
    key = f"{OPTIONS_KEY}.probe.{settings.node_id or id(wrapped)}"
    wrappers: dict[str, Callable[..., Any]] = {
        WrappersMP.OUTER_SAMPLE: wrapped.outer_sample,
        WrappersMP.SAMPLER_SAMPLE: wrapped.sampler_sample,
    }
    if settings.sees_blocks:
        wrappers[WrappersMP.APPLY_MODEL] = wrapped.apply_model
        add_observer(clone.model_options, wrapped.block_ended)
    for kind, wrapper in wrappers.items():
        clone.remove_wrappers_with_key(kind, key)
        clone.add_wrapper_with_key(kind, key, wrapper)
    return clone


class _Wrappers:
    """One probe's wrappers. Between two samplings it holds numbers and text, no tensor."""

    def __init__(self, settings: ProbeSettings) -> None:
        self._settings = settings
        self._sampling: Sampling | None = None
        self._recorder: Recorder | None = None
        # One for all samplings: a node may sample many times in a second.
        self._sender = Sender()

    def outer_sample(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Around a whole sampling, with the loading of the model in front."""
        if self._sampling is not None:  # a sampling inside of a sampling belongs to the outer one
            return executor(*args, **kwargs)
        sampling = self._sampling = self._begin(executor.class_obj, args)
        state = "failed"
        try:
            args, kwargs = _with_callback(sampling.step_ended, args, kwargs)
            result = executor(*args, **kwargs)
            state = "done"
            return result
        except InterruptProcessingException:
            state = "interrupted"
            raise
        finally:
            self._sampling = None
            sampling.end(state)

    def sampler_sample(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Around the steps; the model is loaded."""
        with nullcontext() if self._sampling is None else self._sampling.steps():
            return executor(*args, **kwargs)

    def apply_model(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Around one call of the model."""
        sampling = self._sampling
        if sampling is None:
            return executor(*args, **kwargs)
        model = getattr(executor.class_obj, "diffusion_model", None)
        with nullcontext() if model is None else watched(model, self.block_ended):
            out = executor(*args, **kwargs)
        sampling.point(Words("afterBlocks", "after the blocks"))
        return out

    def block_ended(self, name: str) -> None:
        if self._sampling is not None:
            self._sampling.point(name)

    def _begin(self, guider: Any, args: tuple[Any, ...]) -> Sampling:
        recorder, patcher = self._recorder, guider.model_patcher
        blank = current().blank_record(patcher.load_device, self._settings)
        # A second sampler in the same prompt goes on where the first one ended.
        if recorder is None or not blank.prompt_id or recorder.blank.prompt_id != blank.prompt_id:
            recorder = self._recorder = Recorder(blank)
        about = about_sampling(patcher, args[0] if args else None)
        return Sampling(self._settings, patcher, recorder, about, self._sender)


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
