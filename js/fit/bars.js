// The lengths of the bars of a plan, in percent of the axis. No page is needed here.

export const PARTS = ["weights", "activations", "workspace"];

/** The bars of all stages on one axis.
 *
 * The axis ends at the card's size, or, without a card, at the largest of the peaks and the budget.
 *
 * @returns `end` of the axis in bytes; where `budget` and `card` are on it, or null; and for each
 *   stage its `parts`, and the stretch `stock` that ComfyUI's own activations would take beside the
 *   same weights, or null where they are the same.
 */
export function barsOf({ stages, budget_bytes: budget, card_bytes: card }) {
  const end = Math.max(card ?? 0, budget ?? 0, ...stages.map((stage) => stage.peak), 1);
  const percent = (bytes) => (100 * bytes) / end;
  const clipped = (from, bytes) => Math.min(percent(bytes), 100 - percent(from));
  return {
    end,
    budget: budget ? percent(budget) : null,
    card: card ? percent(card) : null,
    stages: stages.map((stage) => {
      const { weights, activations, stock } = stage;
      const hasStock = stock > activations;
      return {
        parts: PARTS.map((part) => ({ part, width: percent(stage[part]) })),
        stock: hasStock ? { left: percent(weights), width: clipped(weights, stock) } : null,
      };
    }),
  };
}

/** The stage with the highest peak. */
export function highest(stages) {
  return stages.reduce((high, stage) => (stage.peak > high.peak ? stage : high));
}
