"""A card that is not there: the real comfy-aimdo over the CUDA driver of fake_cuda.c.

A driver cannot be unloaded, and torch would take it for a real one. So each test that uses it runs
in a fork of its own, decorated with `on_fake_card`, and calls `FakeCard` inside.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import pytest
import torch

LIMIT_S = 120  # of a test
_LIBRARY = "libcuda.so.1"
_MODULES = ("model_vbar", "host_buffer", "vram_buffer", "model_mmap", "torch")

F = TypeVar("F", bound=Callable[..., None])


def on_fake_card(test: F) -> F:
    """Runs a test in a fork, where it may make a `FakeCard`; skipped where that cannot be."""

    @functools.wraps(test)
    def in_fork(*args: Any, **kwargs: Any) -> None:
        if sys.platform != "linux":
            pytest.skip("the fake card needs Linux")
        if shutil.which("cc") is None:
            pytest.skip("the fake card needs a C compiler, cc")
        _library()
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            _run(test, args, kwargs, writing)
        os.close(writing)
        with os.fdopen(reading, encoding="utf-8") as pipe:
            told = pipe.read()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code or told:
            pytest.fail(told or f"the fork ended with {code}", pytrace=False)

    return cast(F, in_fork)


def _run(test: Callable[..., None], args: Any, kwargs: Any, writing: int) -> None:
    """Runs the test, writes its failure into the pipe, and ends the fork."""
    signal.alarm(LIMIT_S)
    torch.set_num_threads(1)  # the threads of the parent's pool are not in the fork
    try:
        test(*args, **kwargs)
    except BaseException:
        os.write(writing, traceback.format_exc().encode()[-60_000:])
    finally:
        os._exit(0)  # the parent's exit handlers are not the fork's


@functools.cache
def _library() -> Path:
    """The driver, built once a process."""
    folder = tempfile.TemporaryDirectory(prefix="fake-cuda-")
    _kept.append(folder)
    built = Path(folder.name, _LIBRARY)
    source = Path(__file__).with_name("fake_cuda.c")
    options = ["-shared", "-fPIC", "-O0", f"-Wl,-soname,{_LIBRARY}"]
    subprocess.run(["cc", *options, "-o", built, source], check=True)
    return built


_kept: list[tempfile.TemporaryDirectory[str]] = []


class FakeCard:
    """A card of that size with comfy-aimdo started on it; one in a process.

    The allocations of `activation` stand for those of torch's allocator, which counts them here as
    torch does: `allocated` and `peak`, without pages.
    """

    def __init__(self, size_bytes: int) -> None:
        self._driver = ctypes.CDLL(str(_library()), mode=ctypes.RTLD_GLOBAL)
        self._driver.fake_set_card.argtypes = [ctypes.c_size_t]
        self._driver.fake_used.restype = ctypes.c_size_t
        self._driver.fake_set_card(size_bytes)
        self.size_bytes = size_bytes
        self.allocated = self.peak = 0
        import comfy_aimdo.control as control

        control.init("cuda")
        control.set_log_error()
        if not control.init_devices([(0, 0)]):
            raise RuntimeError("comfy-aimdo did not start on the fake card")
        # They bind the library when they are imported, which the host has done without a card.
        for name in _MODULES:
            importlib.reload(importlib.import_module(f"comfy_aimdo.{name}"))

    @property
    def used_bytes(self) -> int:
        """Everything on the card, as the driver counts it."""
        return self._driver.fake_used()

    @contextmanager
    def activation(self, size_bytes: int) -> Iterator[None]:
        """Holds so many bytes, for which comfy-aimdo evicts pages where it must.

        Raises:
            MemoryError: the card is full.
        """
        pointer = ctypes.c_uint64()
        size = ctypes.c_size_t(size_bytes)
        if self._driver.cuMemAllocAsync(ctypes.byref(pointer), size, None):
            raise MemoryError(f"{size_bytes} bytes do not fit")
        self.allocated += size_bytes
        self.peak = max(self.peak, self.allocated)
        try:
            yield
        finally:
            self._driver.cuMemFreeAsync(pointer, None)
            self.allocated -= size_bytes

    def reset_peak(self) -> None:
        self.peak = self.allocated


class Pages:
    """Real pages on the fake card for weights of those sizes, in place of a model's own.

    Args:
        patcher: of the model.
        refused: calls of `set_watermark` that raise.
    """

    def __init__(
        self,
        patcher: Any,
        sizes: Sequence[int],
        *,
        refused: Callable[[int], bool] = lambda _: False,
    ) -> None:
        from comfy_aimdo.model_vbar import ModelVBAR

        class Refusing(ModelVBAR):
            def set_watermark(self, size_bytes: int) -> None:
                if refused(size_bytes):
                    raise RuntimeError("VBAR set_watermark failed")  # as comfy_aimdo 0.6.0
                super().set_watermark(size_bytes)

        self.vbar = Refusing(2 * sum(sizes), 0)
        self.weights = [self.vbar.alloc(size) for size in sizes]
        self.resident: list[int] = []
        patcher.model.dynamic_vbars = {patcher.load_device: self.vbar}

    def forward(self) -> int:
        """Asks for each weight, as a forward does; returns how much is resident then."""
        from comfy_aimdo.model_vbar import vbar_fault, vbar_unpin

        for weight in self.weights:
            if vbar_fault(weight) is not None:
                vbar_unpin(weight)
        self.resident.append(self.vbar.loaded_size())
        return self.resident[-1]

    def load(self) -> int:
        """As the host does at each load."""
        self.vbar.prioritize()
        return self.forward()


def forward(model: Any) -> None:
    """Asks for each weight's page once, as a forward does; what gets none would be streamed."""
    from comfy_aimdo.model_vbar import vbar_fault, vbar_unpin

    for layer in model.modules():
        if hasattr(layer, "_v") and vbar_fault(layer._v) is not None:
            vbar_unpin(layer._v)
