// The chart of a record as SVG: what the bytes were made of over time, the steps, the peak.

import { bytesText, unitOf } from "../shared/bytes.js";
import {
  PARTS,
  STEP,
  T,
  areasOf,
  axisOf,
  heightOf,
  marksOf,
  sampleAt,
  thin,
  tickDigits,
  ticks,
} from "./geometry.js";
import { secondsText } from "./numbers.js";
import { text, textIn } from "./texts.js";

const STEP_STRIP = 12;
const SAMPLE_PX = 3;
const MARGIN = { left: 30, digit: 6, right: 6, top: 16, bottom: 15 };
const NARROW_PX = 260; // the card's note and the peak's label need a line each
const LINE_PX = 12;

const template = document.createElement("template");
template.innerHTML = "<svg></svg>";
const SVG = template.content.firstChild.namespaceURI;

function element(name, attributes, ...children) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

/** Draws the record into the SVG element; returns how to find a sample and to mark it.
 *
 * @param closeUp whether the axis is cut; null decides by what was measured.
 */
export function drawChart(svg, record, { width, height, closeUp, ids }) {
  const rows = record.timeline;
  const times = rows.map((row) => row[T]);
  const axis = axisOf(record, closeUp);
  const strip = record.steps.length ? STEP_STRIP : 0;

  const hasNote = record.device.total_bytes !== null && !axis.hasCeiling;
  const top = MARGIN.top + (hasNote && width < NARROW_PX ? LINE_PX : 0);
  const bottom = Math.max(top + 20, height - MARGIN.bottom - strip);
  const marks = marksOf(axis, bottom - top);
  const longest = Math.max(...marks.map((mark) => mark.label.length));
  const left = Math.max(MARGIN.left, 9 + MARGIN.digit * longest);
  const box = { left, right: Math.max(left + 20, width - MARGIN.right), top, bottom };
  const start = times[0];
  const end = Math.max(times.at(-1), record.peak_at?.t_s ?? 0, start + 1e-3);
  const x = (time) => box.left + ((time - start) / (end - start)) * (box.right - box.left);
  const y = (bytes) => box.bottom - heightOf(bytes, axis) * (box.bottom - box.top);

  const cursor = element("line", { class: "cursor", y1: box.top, y2: box.bottom });
  cursor.setAttribute("visibility", "hidden");
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.replaceChildren(
    element("title", { id: ids.title }, text("title")),
    element("desc", { id: ids.desc }, describe(record)),
    ...scale(axis, marks, box, y),
    ...areas(thin(rows, Math.floor((box.right - box.left) / SAMPLE_PX)), x, y),
    ...stepMarks(record, end, box, x),
    ...(axis.closeUp ? [cut(box, y(axis.low))] : []),
    ...timeAxis(start, end, box, strip, x),
    ...ceilingMark(record, axis, box, y),
    ...peakMark(record, axis.peak, box, x, y),
    cursor,
  );
  return {
    closeUp: axis.closeUp,
    /** The index of the sample below a horizontal position. */
    sampleAt: (position) =>
      sampleAt(times, start + ((position - box.left) / (box.right - box.left)) * (end - start)),
    mark(index) {
      cursor.setAttribute("visibility", index === null ? "hidden" : "visible");
      if (index === null) return;
      cursor.setAttribute("x1", x(times[index]));
      cursor.setAttribute("x2", x(times[index]));
    },
  };
}

/** The chart in one sentence, for those who do not see it. */
function describe(record) {
  const parts = record.parts_at_peak;
  if (record.peak_bytes === null || !parts) return text("empty");
  const made = PARTS.map((name) => `${text(name)} ${bytesText(parts[name])}`).join(", ");
  return `${text("peak")} ${peakText(record)} (${made}); ${momentText(record, record.peak_at)}`;
}

/** Such as "7.31 GiB" or "at least 7.31 GiB". */
export function peakText({ peak_bytes: peak, is_at_least: isAtLeast }) {
  return isAtLeast ? text("atLeast", bytesText(peak)) : bytesText(peak);
}

/** Such as "7.31 s · step 3 · layers.12 · aten.mm.default". */
export function momentText(record, moment) {
  if (!moment) return "";
  const step = moment.step === null ? null : text("step", moment.step);
  const block = moment.block && textIn(record, moment.block);
  const named = [secondsText(moment.t_s), step, block, moment.operation];
  return named.filter(Boolean).join(" · ");
}

function scale({ low, high }, marks, box, y) {
  const labelled = (bytes, label) => {
    const place = { x: box.left - 5, y: y(bytes) + 3.5, "text-anchor": "end" };
    return element("text", place, label);
  };
  const lines = marks.flatMap(({ bytes, label }) => {
    const line = { class: "grid", x1: box.left, x2: box.right, y1: y(bytes), y2: y(bytes) };
    return [element("line", line), labelled(bytes, label)];
  });
  const unit = element("text", { x: 0, y: box.top - 6 }, unitOf(high).name);
  return [...lines, unit, ...(low > 0 ? [labelled(0, "0")] : [])];
}

/** The zigzag where the axis is cut. */
function cut(box, at) {
  const points = [];
  for (let x = box.left - 4; x <= box.right; x += 4) {
    points.push(`${x},${at + 2 * (-1) ** points.length}`);
  }
  return element("polyline", { class: "cut", points: points.join(" ") });
}

function areas(rows, x, y) {
  return areasOf(rows).map(({ part, points }) => {
    const line = points.map(([time, bytes]) => `${x(time).toFixed(1)},${y(bytes).toFixed(1)}`);
    return element("polygon", { class: `part ${part}`, points: line.join(" ") });
  });
}

/** Where each step begins, and a strip with their numbers below the chart. */
function stepMarks(record, end, box, x) {
  const steps = record.steps.map(({ step, start_s: from, seconds }) => {
    return { step, from, to: from + seconds };
  });
  if (!steps.length) return [];
  const current = record.timeline.at(-1);
  const last = steps.at(-1);
  if (record.state === "running" && current[STEP] > last.step) {
    steps.push({ step: current[STEP], from: last.to, to: end });
  }
  const widest = (box.right - box.left) / steps.length;
  const every = [1, 2, 5, 10, 20, 50, 100].find((n) => n * widest >= 20) ?? 1000;
  return steps.flatMap(({ step, from, to }) => {
    const left = x(Math.min(from, end));
    const right = x(Math.min(to, end));
    const mark = { class: "step", x1: left, x2: left, y1: box.top, y2: box.bottom };
    const size = { width: right - left, height: STEP_STRIP - 2 };
    const cell = { class: `cell${step % 2 ? " odd" : ""}`, x: left, y: box.bottom + 1, ...size };
    const middle = { x: (left + right) / 2, y: box.bottom + STEP_STRIP - 2.5 };
    const isNamed = step % every === 0 || (step === 1 && every < 5);
    return [
      ...(widest > 5 ? [element("line", mark)] : []),
      element("rect", cell),
      ...(isNamed ? [element("text", { ...middle, "text-anchor": "middle" }, step)] : []),
    ];
  });
}

function timeAxis(start, end, box, strip, x) {
  const values = ticks(start, end, Math.max(1, Math.floor((box.right - box.left) / 64)));
  const digits = tickDigits(values);
  return values.map((value, i) => {
    const at = x(value);
    const anchor = i === 0 ? "start" : box.right - at < 14 ? "end" : "middle";
    const shown = i === 0 ? value.toFixed(value ? digits : 0) : value.toFixed(digits);
    const place = { x: at, y: box.bottom + strip + 11, "text-anchor": anchor };
    return element("text", place, `${shown} s`);
  });
}

/** The device's size as a line, or as a note where a line to scale would press the chart flat. */
function ceilingMark(record, axis, box, y) {
  const size = record.device.total_bytes;
  if (size === null) return [];
  const name = text(record.device.type === "cpu" ? "ram" : "card", bytesText(size));
  if (!axis.hasCeiling) {
    return [element("text", { x: MARGIN.left + 4, y: MARGIN.top - 6 }, `↑ ${name}`)];
  }
  const at = y(size);
  return [
    element("line", { class: "ceiling", x1: box.left, x2: box.right, y1: at, y2: at }),
    element("text", { class: "label", x: box.left + 4, y: at - 3 }, name),
  ];
}

function peakMark(record, peak, box, x, y) {
  if (record.peak_bytes === null) return [];
  const at = y(peak);
  const label = { class: "label", x: box.right, y: at - 4, "text-anchor": "end" };
  const marks = [
    element("line", { class: "peak-line", x1: box.left, x2: box.right, y1: at, y2: at }),
    element("text", label, `${text("peak")} ${bytesText(peak)}`),
  ];
  if (record.peak_at) {
    marks.push(element("circle", { class: "peak-dot", cx: x(record.peak_at.t_s), cy: at, r: 3 }));
  }
  return marks;
}
