"""One stage of a run with one setting: what it takes of the card within a budget."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..denoiser.cost import NO_WORK, RTX_3060, Work, seconds
from ..denoiser.sizes import round_up

# The card whose modelled time decides. Always this one, whatever a card measures, so that the same
# request and budget get the same plan each time.
ASSUMED_CARD = RTX_3060


@dataclass(frozen=True)
class Stage:
    """One stage with one setting.

    name: text encode, denoise, VAE decode or VAE encode.
    setting: of our nodes, for a reader.
    weight_bytes: all weights of the stage's model, wherever they are.
    buffer_bytes: room for the weights in use, where not all weights are resident.
    activation_bytes: peak of live tensors.
    stock_bytes: peak of live tensors with the host alone.
    workspace_bytes: kept free besides, for kernels and the allocator.
    page_bytes: weights take a whole number of these on the card.
    ram_bytes: of pinned RAM, for maps that wait there.
    is_repeated: the stage runs once per sampling step, and streams weights each time.
    is_judged: it counts for what fits. The host's own decode does not: it tiles when it must.
    copy_bytes: of the buffers, what torch's allocator holds.
    prefetch_bytes: room for the weights in use where a block's are copied while another computes; 0
        where the host cannot do that.
    prefetches: that room is taken.
    control_copy_bytes: of `copy_bytes`, what blocks of ControlNets hold, which are not prefetched.
    is_cast: resident weights are copied at each use too, which is part of the activations.
    score_bytes: of the text encoder's attention, which may be a part of the activations.
    work: of one step, where that decides between settings.
    """

    name: str
    setting: str
    weight_bytes: int
    buffer_bytes: int
    activation_bytes: int
    stock_bytes: int
    workspace_bytes: int
    page_bytes: int = 1
    ram_bytes: int = 0
    is_repeated: bool = False
    is_judged: bool = True
    copy_bytes: int = 0
    prefetch_bytes: int = 0
    prefetches: bool = False
    control_copy_bytes: int = 0
    is_cast: bool = False
    score_bytes: int = 0
    work: Work = NO_WORK

    @property
    def need_bytes(self) -> int:
        """Everything but weights."""
        return self.activation_bytes + self.workspace_bytes

    def within(self, budget_bytes: int | None) -> Stage:
        """The stage with prefetch, where the budget has the room and no step takes longer.

        It costs resident weights, at most 0.5 GiB of the published model in bfloat16, which are
        streamed too.
        """
        if not self.prefetch_bytes:
            return self
        # What is prefetched lies in the buffer of its block, so that none is copied from there.
        copies = self.control_copy_bytes
        buffers = self.prefetch_bytes + copies
        fast = replace(self, buffer_bytes=buffers, copy_bytes=copies, prefetches=True)
        fits = budget_bytes is None or fast.least_bytes <= budget_bytes
        is_faster = fast.step_seconds(budget_bytes) <= self.step_seconds(budget_bytes)
        return fast if fits and is_faster else self

    @property
    def least_bytes(self) -> int:
        """The smallest budget in which the stage fits, workspaces included."""
        return self.hard_least_bytes + self.workspace_bytes

    @property
    def hard_least_bytes(self) -> int:
        """The smallest budget in which it can run at all: live tensors and the weights in use."""
        return self.activation_bytes + min(self.buffer_bytes, self.weight_bytes)

    def resident_bytes(self, budget_bytes: int | None) -> int:
        """Of the model's weights, those that stay on the card."""
        whole = round_up(self.weight_bytes, self.page_bytes)
        if budget_bytes is None or self.need_bytes + whole <= budget_bytes:
            return self.weight_bytes
        room = max(0, budget_bytes - self.need_bytes - self.buffer_bytes)
        return min(self.weight_bytes, room // self.page_bytes * self.page_bytes)

    def streamed_bytes(self, budget_bytes: int | None) -> int:
        """Of the model's weights, those that come from RAM each time."""
        return self.weight_bytes - self.resident_bytes(budget_bytes)

    def step_seconds(self, budget_bytes: int | None) -> float:
        """Modelled time of a step on `ASSUMED_CARD`, with the weights that are streamed for it."""
        streamed = self.streamed_bytes(budget_bytes)
        return seconds(self.work, ASSUMED_CARD, streamed_bytes=streamed, prefetches=self.prefetches)

    def held_bytes(self, budget_bytes: int | None) -> int:
        """The most that torch's allocator holds of a block's weights besides the activations."""
        return self.copy_bytes if self.streamed_bytes(budget_bytes) else 0

    def weights_on_card_bytes(self, budget_bytes: int | None) -> int:
        """What weights take of the card: the resident ones, and the buffers for the others."""
        resident = self.resident_bytes(budget_bytes)
        buffers = self.buffer_bytes if resident < self.weight_bytes else 0
        return round_up(resident, self.page_bytes) + buffers

    def peak_bytes(self, budget_bytes: int | None) -> int:
        """The most that the stage takes of the card."""
        return self.need_bytes + self.weights_on_card_bytes(budget_bytes)
