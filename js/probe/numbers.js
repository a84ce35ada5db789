// Numbers as a reader wants them, and the arithmetic of the chart. No page is needed here.

/** Such as "0.34 s", "14.2 s" or "125 s". */
export function secondsText(seconds) {
  return `${seconds.toFixed(seconds < 10 ? 2 : seconds < 100 ? 1 : 0)} s`;
}

/** Such as "< 0.1", "3.4" or "53". */
export function percentText(part, whole) {
  const percent = (100 * part) / whole;
  return percent < 0.1 ? "< 0.1" : percent.toFixed(percent < 10 ? 1 : 0);
}

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

/** At most `wanted` rows of a timeline: of each stretch the highest, so that no peak is lost. */
export function thin(rows, wanted) {
  if (rows.length <= wanted) return rows;
  const total = (row) => row[1] + row[2] + row[3];
  const first = rows[0][0];
  const stretch = (rows.at(-1)[0] - first) / wanted;
  const kept = new Map();
  for (const row of rows) {
    const index = Math.min(wanted - 1, Math.floor((row[0] - first) / stretch));
    if (!kept.has(index) || total(row) > total(kept.get(index))) kept.set(index, row);
  }
  return [...new Set([rows[0], ...kept.values(), rows.at(-1)])];
}
