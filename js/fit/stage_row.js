// A stage of the run: its name, setting and peak, and the bar of what the peak is made of.

import { PARTS } from "./bars.js";
import { text, textIn } from "./texts.js";
import { bytesText } from "../shared/bytes.js";
import { make } from "../shared/elements.js";

/** The row of a stage; `bars` as barsOf gives them. */
export function stageRow(stage, bars, index, plan) {
  const { budget_bytes: budget } = plan;
  const setting = textIn(plan, stage.setting);
  const isOver = budget !== null && stage.peak > budget;
  const row = make("div", isOver ? "stage over" : "stage");
  row.dataset.name = stage.name;
  row.tabIndex = 0;
  row.setAttribute("role", "listitem");
  const over = isOver ? text("over") : "";
  const parts = partsText(stage);
  const told = [text("peakOf", text(stage.name), bytesText(stage.peak)), over, parts, setting];
  row.setAttribute("aria-label", told.filter(Boolean).join("; "));
  const track = trackOf(bars, bars.stages[index]);
  track.setAttribute("aria-label", parts);
  row.append(
    make("div", "name", text(stage.name)),
    make("div", "peak", bytesText(stage.peak)),
    make("div", "setting", setting),
    track,
  );
  return row;
}

/** What the bar shows, in words. */
function partsText(stage) {
  const parts = PARTS.map((part) => `${text(part)} ${bytesText(stage[part])}`);
  if (stage.stock > stage.activations) parts.push(`${text("stock")} ${bytesText(stage.stock)}`);
  return parts.join(", ");
}

function trackOf(bars, { parts, stock }) {
  const track = make("div", "track");
  track.setAttribute("role", "img");
  const bar = make("div", "bar");
  for (const { part, width } of parts) {
    const piece = make("div", part);
    piece.style.cssText = `--part: var(--${part}); width: ${width}%`;
    bar.append(piece);
  }
  track.append(bar);
  if (stock) {
    const stretch = make("div", "stock");
    stretch.style.cssText = `left: ${stock.left}%; width: ${stock.width}%`;
    track.append(stretch);
  }
  for (const name of ["card", "budget"]) {
    if (bars[name] === null) continue;
    const mark = make("div", `mark ${name}`);
    mark.style.left = `${bars[name]}%`;
    track.append(mark);
  }
  return track;
}
