// The arithmetic of a record's chart. No page is needed here; nodes/probe/chart.py does the same.

import { unitOf } from "../shared/bytes.js";
import palette from "../shared/palette.js";

// A row of the timeline: [t_s, weights, activations, other, step, block].
export const T = 0;
export const STEP = 4;
const COLUMNS = { weights: 1, activations: 2, other: 3 };
export const PARTS = Object.keys(COLUMNS);
// The parts from the bottom up. What changes most is on top, where its shape is the chart's own.
const STACK = Object.keys(palette.parts);
const MARK_PX = 30;

const total = (row) => row[1] + row[2] + row[3];

/** Values from low to high, at most about as many as wanted: 1, 2 or 5 times a power of 10. */
export function ticks(low, high, wanted) {
  const span = high - low;
  if (!(span > 0)) return [low];
  const rough = span / Math.max(1, wanted);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999);
  const values = [];
  for (let i = Math.ceil(low / step - 1e-9) || 0; i * step <= high + step * 1e-9; i++) {
    values.push(i * step);
  }
  return values;
}

/** Digits after the point that tell neighbouring ticks apart. */
export function tickDigits(values) {
  if (values.length < 2) return values[0] === 0 ? 0 : 1;
  return Math.max(0, -Math.floor(Math.log10(values[1] - values[0]) + 1e-9));
}

/** The index of the sample that a time belongs to: the first of the sorted times not before it. */
export function sampleAt(times, time) {
  const index = times.findIndex((end) => end >= time);
  return index === -1 ? times.length - 1 : index;
}

/** Whether the memory changes so little that a chart to scale would be one flat block. */
export function isFlat(peak, lowest) {
  return lowest > 0 && peak - lowest < 0.15 * peak;
}

/** The vertical axis of the chart, in bytes.
 *
 * The device's size is drawn to scale where the measured bytes still fill more than half of the
 * chart; otherwise it would press them flat. A close-up cuts the axis: what lies below `low` is
 * pressed into the share `below` of the height, so that the changes above it are seen.
 */
export function verticalAxis({ peak, lowest, ceiling, closeUp }) {
  if (closeUp) {
    const room = Math.max((peak - lowest) * 0.12, peak * 0.0005, 1);
    const hasCeiling = ceiling !== null && ceiling - peak < 1.5 * (peak - lowest);
    const high = Math.max(peak, hasCeiling ? ceiling : 0) + room;
    return { below: 0.3, low: Math.max(0, lowest - room), high, hasCeiling };
  }
  const hasCeiling = ceiling !== null && ceiling < 1.9 * peak;
  const high = Math.max(peak, hasCeiling ? ceiling : 0, 1) * 1.06;
  return { below: 0, low: 0, high, hasCeiling };
}

/** How high on the axis that many bytes are, 0 to 1. */
export function heightOf(bytes, { below, low, high }) {
  if (bytes < low) return (below * Math.max(0, bytes)) / low;
  return below + ((1 - below) * (Math.min(bytes, high) - low)) / (high - low);
}

/** The vertical axis of a record, see `verticalAxis`, with the record's `peak`.
 *
 * @param closeUp whether it is cut; null decides by what was measured.
 */
export function axisOf(record, closeUp = null) {
  const totals = record.timeline.map(total);
  const peak = Math.max(record.peak_bytes ?? 0, ...totals);
  const inSteps = totals.filter((_, i) => record.timeline[i][STEP] !== null); // not the loading
  const lowest = Math.min(...(inSteps.length ? inSteps : totals));
  closeUp ??= isFlat(peak, lowest);
  const ceiling = record.device.total_bytes;
  return { ...verticalAxis({ peak, lowest, ceiling, closeUp }), closeUp, peak };
}

/** Where the axis has numbers, in bytes, and the numbers in the unit of its end. */
export function marksOf({ below, low, high }, height) {
  const unit = unitOf(high);
  const wanted = Math.max(2, Math.floor(((1 - below) * height) / MARK_PX));
  const values = ticks(low / unit.bytes, high / unit.bytes, wanted);
  const digits = tickDigits(values);
  return values.map((value) => ({ bytes: value * unit.bytes, label: value.toFixed(digits) }));
}

/** The stack from the bottom up: each `part` as a closed line of [seconds, bytes].
 *
 * In steps: a sample is the highest since the one before, and what lay between is not known.
 */
export function areasOf(rows) {
  // A single sample is drawn as wide as the chart.
  const drawn = rows.length > 1 ? rows : [rows[0], [rows[0][T] + 1e-3, ...rows[0].slice(1)]];
  const sums = drawn.map(() => 0);
  const edge = () =>
    drawn.slice(1).flatMap((row, i) => [drawn[i], row].map((end) => [end[T], sums[i + 1]]));
  return STACK.map((part) => {
    const bottom = edge();
    drawn.forEach((row, i) => (sums[i] += row[COLUMNS[part]]));
    return { part, points: [...edge(), ...bottom.reverse()] };
  });
}

/** At most `wanted` rows of a timeline: the highest of each span, so that no peak is lost. */
export function thin(rows, wanted) {
  if (rows.length <= wanted) return rows;
  const first = rows[0][0];
  const span = (rows.at(-1)[0] - first) / wanted;
  const kept = new Map();
  for (const row of rows) {
    const index = Math.min(wanted - 1, Math.floor((row[0] - first) / span));
    if (!kept.has(index) || total(row) > total(kept.get(index))) kept.set(index, row);
  }
  return [...new Set([rows[0], ...kept.values(), rows.at(-1)])];
}
