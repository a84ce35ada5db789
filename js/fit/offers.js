// What would fit instead of a plan, and which widgets would have to change for it.

import { SIZES, placeOf, sizedBy } from "./question.js";

const INPUTS = { size: ["width", "height"], batch: ["batch_size"], budget: ["budget_gib"] };
const GIB = 2 ** 30;

/** Everything that would fit instead: `kind`, and the inputs with their values.
 *
 * @param plan as the server gives it; plans of older versions lack some keys.
 */
export function offersOf({ others, larger_bytes: larger }) {
  const found = others.map(({ differs_in: kind, ...values }) => ({ kind, values }));
  if (larger) found.push({ kind: "budget", values: { budget_gib: larger / GIB } });
  return found;
}

/** The widgets to change for an offer, as [{ node, widget, value }].
 *
 * @param node a Fit to VRAM of the open graph.
 * @param outerOf gives the node that stands for a subgraph.
 * @returns null where an input has no widget in the graph, or where one widget would get two
 *   values; the user then has to do it.
 */
export function changesFor(node, { kind, values }, outerOf) {
  const changes = new Map(); // by the widget
  for (const input of INPUTS[kind] ?? []) {
    const place = placeOf(SIZES.includes(input) ? sizedBy(node, outerOf) : node, input, outerOf);
    const value = values[input];
    if (!place || !allows(place.widget, value)) return null;
    if (changes.has(place.widget) && changes.get(place.widget).value !== value) return null;
    changes.set(place.widget, { ...place, value });
  }
  return changes.size ? [...changes.values()] : null;
}

function allows({ options, value: now }, value) {
  const { min = -Infinity, max = Infinity } = options ?? {};
  return typeof now === "number" && min <= value && value <= max;
}
