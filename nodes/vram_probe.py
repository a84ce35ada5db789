"""VRAM Probe: the memory peak of what ran before it, or of a sampling, and its parts."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .host.probe import interval
from .host.probe.chart import draw
from .host.probe.settings import DETAILS, MODES, NODE_ID, RESET_ONLY, ProbeSettings
from .host.probe.wrappers import with_probe
from .probe.record import Detail
from .units import GIB

HISTORY = ["off", "append a row"]


class VRAMProbe(io.ComfyNode):
    """The node's schema is its documentation."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        anything = io.MatchType.Template("value")
        return io.Schema(
            node_id=NODE_ID,
            display_name="VRAM Probe",
            category="utilities",
            description=(
                "Shows the peak of memory, when it was reached, and its parts: weights, "
                "activations and other. It measures what ran since the last probe or measured "
                "sampling. On a MODEL wire it also measures each sampling of that model, live, by "
                "step and by block. Without a card it measures RAM."
            ),
            search_aliases=["vram", "memory", "peak", "monitor", "profiler"],
            is_output_node=True,
            # Otherwise the host would reuse the output of another probe with the same inputs.
            not_idempotent=True,
            inputs=[
                io.MatchType.Input(
                    "value",
                    template=anything,
                    optional=True,
                    tooltip=(
                        "Any wire. It comes out unchanged. A MODEL comes out as a copy that is "
                        "measured while ComfyUI samples it. No effect on memory."
                    ),
                ),
                io.String.Input(
                    "label",
                    default="",
                    tooltip=(
                        "A name for the chart, the summary and the history, such as VAE decode. "
                        "No effect on memory."
                    ),
                ),
                io.Combo.Input(
                    "mode",
                    options=MODES,
                    default=MODES[0],
                    tooltip=(
                        "measure and reset peak: also resets the peak counter, so that what runs "
                        "next has a peak of its own. measure: does not reset it, except in a "
                        "sampling with detail steps or more. A peak below an earlier one is then "
                        "only known from readings, and a note says so. reset only: measures "
                        "nothing. No effect on memory."
                    ),
                ),
                io.Combo.Input(
                    "detail",
                    options=DETAILS,
                    default="steps",
                    tooltip=(
                        "What is measured in a sampling, on a MODEL wire. totals: one peak. steps: "
                        "one for each step. blocks: one for each block. allocations: also the "
                        "largest tensors with their code lines, and a file for torch's memory "
                        "viewer (slow). With steps or more, the counter is reset between steps. "
                        "Without a card, blocks and allocations count exact tensor bytes (slow)."
                    ),
                ),
                io.Combo.Input(
                    "history",
                    options=HISTORY,
                    default=HISTORY[0],
                    tooltip=(
                        "append a row: adds this run to z_image_low_vram/vram_history.jsonl in the "
                        "output folder: peaks in bytes, seconds per step, model, size, versions; "
                        "no prompt texts. No effect on memory."
                    ),
                    advanced=True,
                ),
            ],
            outputs=[
                io.MatchType.Output(
                    template=anything,
                    id="value",
                    display_name="value",
                    tooltip="What came in, unchanged; a MODEL as a copy that is measured.",
                ),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip=(
                        "The figures as a text table, with a summary of all probes of this run so "
                        "far. On a MODEL wire: the figures of what ran before the sampling."
                    ),
                ),
                io.Float.Output(
                    "peak_gib",
                    display_name="peak_gib",
                    tooltip=(
                        "The peak before this probe in GiB (1024^3 bytes); not a number (NaN) "
                        "where nothing was measured."
                    ),
                ),
                io.Image.Output(
                    "chart",
                    display_name="chart",
                    tooltip="The timeline before this probe as a picture, for Save Image.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        value: Any = None,
        label: str = "",
        mode: str = MODES[0],
        detail: Detail = "steps",
        history: str = HISTORY[0],
    ) -> io.NodeOutput:
        node_id = cls.hidden.unique_id if cls.hidden else None
        settings = ProbeSettings(label, mode, detail, history != HISTORY[0], node_id)
        seen = interval.measure(value, settings)
        settings.live.update(seen.as_json())
        if mode != RESET_ONLY:
            value = with_probe(value, settings)
        peak_gib = float("nan") if seen.peak_bytes is None else seen.peak_bytes / GIB
        picture = draw(seen)
        interval.begin(value, settings)
        # The host keeps this very dict: what the probe sees later is written into it.
        ui = {"z_image_vram_probe": [settings.live]}
        return io.NodeOutput(value, seen.report, peak_gib, picture, ui=ui)
