// The list behind the button "Figures": everything that a record tells besides its chart.

import { bytesText } from "../shared/bytes.js";
import { make } from "../shared/elements.js";
import { peakText } from "./chart.js";
import { PARTS } from "./geometry.js";
import { secondsText } from "./numbers.js";
import { text, textIn } from "./texts.js";

/** Everything else that the record tells, as a list. */
export function fillDetails(details, record) {
  const scrolled = details.scrollTop;
  const list = (rows) => {
    const made = make("dl", "");
    for (const [name, value, isAbsent] of rows) {
      made.append(make("dt", "", name), make("dd", isAbsent ? "absent" : "", value));
    }
    return made;
  };
  const words = (english) => textIn(record, english);
  const sections = [
    [text("atPeak"), peakRows(record)],
    [text("atEnd"), record.figures.map((figure) => figureRow(figure, words))],
    [text("steps"), record.steps.map(stepRow)],
    [text("largest"), record.largest.map(tensorRow)],
  ];
  const content = sections
    .filter(([, rows]) => rows.length)
    .flatMap(([title, rows]) => [make("h4", "", title), list(rows)]);
  const lines = (title, texts) =>
    texts?.length ? [make("h4", "", title), ...texts.map((line) => make("p", "", words(line)))] : [];
  details.replaceChildren(
    ...lines(text("notes"), record.notes),
    make("p", "", text("measuredWith", words(record.measured_with))),
    ...content,
    ...lines(text("summary"), record.summary),
    ...lines(text("files"), record.files),
  );
  details.setAttribute("aria-label", text("figures"));
  details.scrollTop = scrolled;
}

/** What the chart shows of the peak, for those who do not see it. */
function peakRows(record) {
  if (record.peak_bytes === null) return [];
  const { device, parts_at_peak: parts } = record;
  const names = parts ? PARTS : [];
  const made = names.map((name) => [text(name), bytesText(parts[name])]);
  const name = textIn(record, device.name);
  const total = device.total_bytes ? [[name, bytesText(device.total_bytes)]] : [];
  return [[text("peak"), peakText(record)], ...made, ...total];
}

function figureRow({ name, bytes, reason }, words) {
  return bytes === null
    ? [words(name), text("notAvailable", words(reason)), true]
    : [words(name), bytesText(bytes), false];
}

function stepRow({ step, seconds, peak_bytes: peak }) {
  return [text("step", step), `${bytesText(peak)} · ${secondsText(seconds)}`];
}

function tensorRow({ bytes, shape, dtype, where }) {
  const told = [bytesText(bytes), shape && `[${shape.join(", ")}]`, dtype];
  return [where || "?", told.filter(Boolean).join(" · ")];
}
