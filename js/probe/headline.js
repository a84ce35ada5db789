// What a probe's peak means against the card, in one sentence. No page is needed here.

import { bytesText, shortText } from "../shared/bytes.js";

/** Says what the peak means; `start` is the part that names it, `rest` what follows.
 *
 * Such as "Peak 7.31 GiB" and " of 8 GiB: 0.69 GiB left for the driver and other programs."
 * nodes/probe/report.py says the same in English. An allocator does not count the driver's own
 * memory, so what is left is not called free.
 *
 * @param isEarlier whether the record is of a run before the node's last one.
 * @param text gives the sentence of a name, see shared/texts.js.
 */
export function headlineOf(record, isEarlier, text) {
  const { peak_bytes: peak, is_at_least: isAtLeast } = record;
  const seen = isAtLeast ? text("atLeast", bytesText(peak)) : bytesText(peak);
  const start = text(isEarlier ? "peakEarlier" : (PEAKS[record.state] ?? "peakOf"), seen);
  return { start, rest: sentenceOf(record, start, text).slice(start.length) };
}

const PEAKS = {
  running: "peakSoFar",
  interrupted: "peakUntil",
  failed: "peakUntil",
  lost: "peakUntil",
};

/** The sentence; it begins with `start` in every language. */
function sentenceOf({ peak_bytes: peak, is_at_least: isAtLeast, ...record }, start, text) {
  const counted = countedIn(record);
  if (counted !== "onCard") return text(counted, start);
  const total = record.device.total_bytes;
  if (!total) return text("sizeUnknown", start);
  if (peak > total) return text("above", start, shortText(total), bytesText(peak - total));
  const left = bytesText(total - peak);
  return text("left", start, shortText(total), isAtLeast ? text("atMost", left) : left);
}

/** What the bytes are: those on a card, tensors in RAM, or the whole process. */
function countedIn({ device, measured_with: how }) {
  const isProcess = how.startsWith("RAM of the process");
  if (device.type === "cpu") return isProcess ? "process" : "tensors";
  return isProcess ? "unified" : "onCard";
}
