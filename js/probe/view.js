// What a probe's node shows: the peak, the chart, what a moment was made of, and the buttons.

import { bytesText } from "../shared/bytes.js";
import { make } from "../shared/elements.js";
import { drawChart, momentText, peakText } from "./chart.js";
import { fillDetails } from "./details.js";
import { copyText, saveJson } from "./export.js";
import { percentText } from "./numbers.js";
import { style } from "./style.js";
import { text } from "./texts.js";

const RECORD_VERSION = 1;
const PARTS = ["weights", "activations", "other"];
const TOLD_MS = 1600;
let viewsMade = 0;

const LAYOUT = `
  <div class="panel">
    <div class="empty"></div>
    <div class="head">
      <span class="peak"></span><span class="share"></span><span class="state"></span>
    </div>
    <div class="where"></div>
    <div class="plot"><svg role="img"></svg><div class="pointer"></div></div>
    <div class="legend"></div>
    <div class="details" tabindex="0"></div>
    <div class="buttons">
      <span><button class="figures" type="button"></button>
        <button class="close-up" type="button"></button></span>
      <span><button class="copy" type="button"></button>
        <button class="save" type="button"></button></span>
    </div>
  </div>`;

export class ProbeView {
  element = document.createElement("div");
  record = null;
  #parts = {};
  #ids;
  #chart = null;
  #pointer = null; // horizontal position of the mouse over the chart
  #closeUp = null; // the user's choice; null leaves it to the chart
  #figures = false;
  #copied = "copy"; // what its button says
  #isEarlier = false;
  #isDrawing = false;

  /** @param signal ends everything that the view listens to. */
  constructor(signal) {
    const root = this.element.attachShadow({ mode: "open" });
    root.adoptedStyleSheets = [style];
    root.innerHTML = LAYOUT;
    for (const found of root.querySelectorAll("[class]")) this.#parts[found.className] ??= found;
    const svg = root.querySelector("svg");
    this.#parts.svg = svg;
    viewsMade += 1;
    this.#ids = { title: `title-${viewsMade}`, desc: `desc-${viewsMade}` };
    svg.setAttribute("aria-labelledby", this.#ids.title);
    svg.setAttribute("aria-describedby", this.#ids.desc);

    const on = (part, kind, act) => this.#parts[part].addEventListener(kind, act, { signal });
    on("pointer", "pointermove", (event) => this.#point(event.offsetX));
    on("pointer", "pointerleave", () => this.#point(null));
    on("figures", "click", () => this.#toggle(() => (this.#figures = !this.#figures)));
    on("close-up", "click", () => this.#toggle(() => (this.#closeUp = !this.#chart?.closeUp)));
    on("copy", "click", async () => {
      this.#tellCopied((await copyText(this.record.report)) ? "copied" : "copyFailed");
    });
    on("save", "click", () => saveJson(this.record));

    const resized = new ResizeObserver(() => this.draw());
    resized.observe(this.#parts.plot);
    resized.observe(this.element);
    signal.addEventListener("abort", () => resized.disconnect(), { once: true });
  }

  /** @param isEarlier whether the record is of a run before the node's last one. */
  show(record, { isEarlier }) {
    this.record = record;
    this.#isEarlier = isEarlier;
    this.draw();
  }

  /** Draws with the next frame, however often it is asked before. */
  draw() {
    if (this.#isDrawing) return;
    this.#isDrawing = true;
    requestAnimationFrame(() => {
      this.#isDrawing = false;
      this.#drawNow();
    });
  }

  /** Whether the mouse wheel should scroll what it is over. */
  get canScroll() {
    const { details } = this.#parts;
    return !details.hidden && details.scrollHeight > details.clientHeight;
  }

  #toggle(change) {
    change();
    this.draw();
  }

  #point(position) {
    this.#pointer = position;
    this.draw();
  }

  /** Writes on the copy button how it went, for a moment. */
  #tellCopied(name) {
    this.#copied = name;
    this.draw();
    setTimeout(() => this.#toggle(() => (this.#copied = "copy")), TOLD_MS);
  }

  #drawNow() {
    const { record } = this;
    const parts = this.#parts;
    const isKnown = record?.version === RECORD_VERSION;
    const hasChart = isKnown && record.timeline.length > 0;
    const hasPeak = isKnown && record.peak_bytes !== null;
    parts.panel.classList.toggle("nodes-2", this.element.closest(".lg-node") !== null);
    parts.empty.hidden = hasChart || this.#figures;
    parts.empty.textContent = text(emptyText(record, isKnown));
    for (const name of ["head", "where"]) parts[name].hidden = !hasPeak;
    for (const name of ["plot", "legend"]) parts[name].hidden = !hasChart || this.#figures;
    parts.details.hidden = !isKnown || !this.#figures;
    this.element.dataset.captureWheel = String(!parts.details.hidden);
    if (hasPeak) this.#drawHead(record);
    if (this.#figures && isKnown) fillDetails(parts.details, record);
    if (hasChart && !this.#figures) this.#drawChart(record);
    this.#drawButtons(isKnown, hasChart);
  }

  #drawChart(record) {
    const parts = this.#parts;
    const { clientWidth: width, clientHeight: height } = parts.plot;
    if (width === 0 || height === 0) return; // not on the screen
    const options = { width, height, closeUp: this.#closeUp, ids: this.#ids };
    this.#chart = drawChart(parts.svg, record, options);
    const index = this.#pointer === null ? null : this.#chart.sampleAt(this.#pointer);
    this.#chart.mark(index);
    const row = index === null ? null : record.timeline[index];
    const pointed = row && { weights: row[1], activations: row[2], other: row[3] };
    fillLegend(parts.legend, pointed ?? record.parts_at_peak);
    if (row) this.#tellMoment(row);
  }

  #drawButtons(isKnown, hasChart) {
    const { figures, copy, save, buttons } = this.#parts;
    const closeUp = this.#parts["close-up"];
    buttons.hidden = !isKnown;
    const notes = (isKnown && this.record.notes) || [];
    figures.textContent = text("figures") + (notes.length ? " ⓘ" : "");
    figures.title = notes.join("\n");
    figures.setAttribute("aria-pressed", this.#figures);
    closeUp.textContent = text("closeUp");
    closeUp.title = text("closeUpTip");
    closeUp.setAttribute("aria-pressed", this.#chart?.closeUp ?? false);
    closeUp.hidden = !hasChart || this.#figures;
    copy.textContent = text(this.#copied);
    copy.disabled = !this.record?.report;
    save.textContent = text("save");
  }

  #drawHead(record) {
    const { peak, share, state, where } = this.#parts;
    const total = record.device.total_bytes;
    peak.textContent = peakText(record);
    const percent = total && percentText(record.peak_bytes, total);
    share.textContent = total ? text("share", percent, bytesText(total)) : "";
    state.className = `state ${this.#isEarlier ? "earlier" : record.state}`;
    state.hidden = record.state === "done" && !this.#isEarlier;
    state.textContent = text(this.#isEarlier ? "earlier" : record.state);
    state.title = this.#isEarlier ? text("earlierTip") : "";
    const moment = momentText(record.peak_at);
    const told = [moment && text("peakAt", moment), record.device.name];
    where.textContent = told.filter(Boolean).join(" — ");
    where.title = where.textContent;
    where.classList.remove("pointed");
  }

  /** In place of where the peak is: the moment that the mouse points at. */
  #tellMoment([t_s, weights, activations, other, step, block]) {
    const { where } = this.#parts;
    const moment = momentText({ t_s, step, block, operation: null });
    where.textContent = `${bytesText(weights + activations + other)} · ${moment}`;
    where.classList.add("pointed");
  }
}

function emptyText(record, isKnown) {
  if (!record) return "empty";
  if (!isKnown) return "otherVersion";
  return { cached: "cachedLong", running: "waiting" }[record.state] ?? "nothing";
}

/** The three parts at the peak, or at the sample that the mouse points at. */
function fillLegend(legend, values) {
  const items = PARTS.map((name) => {
    const item = make("span", "part", text(name));
    item.style.setProperty("--part", `var(--${name})`);
    if (values) item.append(make("b", "", bytesText(values[name])));
    return item;
  });
  legend.replaceChildren(...items);
}
