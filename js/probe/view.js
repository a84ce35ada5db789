// What a probe's node shows: the peak, the chart, what a moment was made of, and the buttons.

import { bytesText } from "../shared/bytes.js";
import { make, tell } from "../shared/elements.js";
import { hasModifier, placeAfter } from "../shared/keys.js";
import { drawChart, momentText } from "./chart.js";
import { fillDetails } from "./details.js";
import { copyText, saveJson } from "./export.js";
import { PARTS, T, sampleAt } from "./geometry.js";
import { headlineOf } from "./headline.js";
import { style } from "./style.js";
import { text, textIn } from "./texts.js";

const RECORD_VERSION = 1;
const TOLD_MS = 1600;
const KEYS = { ArrowUp: "ArrowRight", ArrowDown: "ArrowLeft", PageUp: "PageDown", PageDown: "PageUp" };
let viewsMade = 0;

const LAYOUT = `
  <div class="panel" role="region">
    <div class="spoken" role="status"></div>
    <div class="empty"></div>
    <div class="head">
      <div class="headline"><span class="verdict"></span><span class="rest"></span></div>
      <span class="state"></span>
    </div>
    <div class="where"></div>
    <div class="plot">
      <svg role="img"></svg><div class="pointer" role="slider" tabindex="0"></div>
    </div>
    <div class="legend"></div>
    <div class="details" role="group" tabindex="0"></div>
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
  #index = null; // the sample that the keyboard has chosen
  #closeUp = null; // the user's choice; null leaves it to the chart
  #figures = false;
  #copied = "copy"; // what its button says
  #read = null; // the headline that was read out
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
    on("pointer", "focus", ({ target }) => {
      if (target.matches(":focus-visible")) this.#toggle(() => (this.#index = this.#at()));
    });
    on("pointer", "keydown", (event) => this.#choose(event));
    on("pointer", "blur", () => this.#toggle(() => (this.#index = null)));
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
    if (record.state === "running" && this.#read !== null) {
      this.#read = null; // the end of this run is read out even where it is that of the last one
      tell(this.#parts.spoken, "");
    }
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
    const { details, panel } = this.#parts;
    return [details, panel].some((part) => part.scrollHeight > part.clientHeight + 1);
  }

  #toggle(change) {
    change();
    this.draw();
  }

  #point(position) {
    this.#pointer = position;
    this.draw();
  }

  /** Goes from sample to sample with the arrow keys, a tenth of them with Page Up and Page Down. */
  #choose(event) {
    const count = this.record?.timeline.length ?? 0;
    if (count === 0 || hasModifier(event)) return;
    const key = KEYS[event.key] ?? event.key;
    const chosen = placeAfter(key, this.#at(), count, Math.ceil(count / 10));
    if (chosen === null) return;
    event.preventDefault();
    this.#toggle(() => (this.#index = chosen));
  }

  /** The sample of the keyboard: the chosen one, else that of the peak. */
  #at() {
    const { timeline, peak_at: at } = this.record;
    const chosen = this.#index ?? sampleAt(timeline.map((row) => row[T]), at?.t_s ?? Infinity);
    return Math.min(chosen, timeline.length - 1);
  }

  /** Writes on the copy button how it went, for a moment. */
  #tellCopied(name) {
    const { spoken } = this.#parts;
    this.#copied = name;
    tell(spoken, text(name));
    this.draw();
    setTimeout(() => {
      this.#toggle(() => (this.#copied = "copy"));
      if (spoken.textContent === text(name)) tell(spoken, ""); // so that the next one is read out
    }, TOLD_MS);
  }

  #drawNow() {
    const { record } = this;
    const parts = this.#parts;
    const isKnown = record?.version === RECORD_VERSION;
    const hasChart = isKnown && record.timeline.length > 0;
    const hasPeak = isKnown && record.peak_bytes !== null;
    parts.panel.classList.toggle("nodes-2", this.element.closest(".lg-node") !== null);
    parts.empty.hidden = hasChart || this.#figures;
    tell(parts.empty, text(emptyText(record, isKnown)));
    parts.panel.setAttribute("aria-label", text("region"));
    for (const name of ["head", "where"]) parts[name].hidden = !hasPeak;
    for (const name of ["plot", "legend"]) parts[name].hidden = !hasChart || this.#figures;
    parts.details.hidden = !isKnown || !this.#figures;
    if (hasPeak) this.#drawHead(record);
    if (this.#figures && isKnown) fillDetails(parts.details, record);
    if (hasChart && !this.#figures) this.#drawChart(record);
    this.#drawButtons(isKnown, hasChart);
    this.element.dataset.captureWheel = String(this.canScroll);
  }

  #drawChart(record) {
    const parts = this.#parts;
    const { clientWidth: width, clientHeight: height } = parts.plot;
    if (width === 0 || height === 0) return; // not on the screen
    const options = { width, height, closeUp: this.#closeUp, ids: this.#ids };
    this.#chart = drawChart(parts.svg, record, options);
    const chosen = this.#index === null ? null : this.#at(); // a record may be shorter than the last
    const index = this.#pointer === null ? chosen : this.#chart.sampleAt(this.#pointer);
    this.#chart.mark(index);
    const row = index === null ? null : record.timeline[index];
    const pointed = row && { weights: row[1], activations: row[2], other: row[3] };
    fillLegend(parts.legend, pointed ?? record.parts_at_peak);
    if (row) this.#tellMoment(row);
    this.#drawSlider(record);
  }

  /** The sample of the keyboard, for those who do not see the chart. */
  #drawSlider(record) {
    const { timeline } = record;
    const { pointer } = this.#parts;
    const row = timeline[this.#at()];
    const made = PARTS.map((name, i) => `${text(name)} ${bytesText(row[1 + i])}`).join(", ");
    const range = { label: text("title"), valuemin: 0, valuemax: timeline.length - 1 };
    const now = { valuenow: this.#at(), valuetext: `${sampleText(record, row)} (${made})` };
    for (const [name, value] of Object.entries({ ...range, ...now })) {
      pointer.setAttribute(`aria-${name}`, value);
    }
  }

  #drawButtons(isKnown, hasChart) {
    const { figures, copy, save, buttons } = this.#parts;
    const closeUp = this.#parts["close-up"];
    buttons.hidden = !isKnown;
    const notes = (isKnown && this.record.notes) || [];
    figures.textContent = text("figures") + (notes.length ? " ⓘ" : "");
    figures.title = notes.map((note) => textIn(this.record, note)).join("\n");
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
    const { verdict, rest, state, where, spoken } = this.#parts;
    const words = headlineOf(record, this.#isEarlier, text);
    tell(verdict, words.start);
    tell(rest, words.rest);
    const name = this.#isEarlier ? "earlier" : record.state;
    state.className = `state ${name}`;
    state.hidden = name === "done";
    tell(state, state.hidden ? "" : text(name));
    state.title = this.#isEarlier ? text("earlierTip") : "";
    // While it runs, the figures change several times a second: only the end is read out.
    const end = words.start + words.rest + (state.hidden ? "" : ` ${text(name)}`);
    if (record.state !== "running" && end !== this.#read) tell(spoken, (this.#read = end));
    const moment = momentText(record, record.peak_at);
    const told = [moment && text("peakAt", moment), textIn(record, record.device.name)];
    tell(where, told.filter(Boolean).join(" — "));
    where.classList.remove("pointed");
  }

  /** In place of where the peak is: the moment that is pointed at. */
  #tellMoment(row) {
    const { where } = this.#parts;
    tell(where, sampleText(this.record, row));
    where.classList.add("pointed");
  }
}

/** Such as "7.31 GiB · 12.4 s · step 3 · layers.12". */
function sampleText(record, [t_s, weights, activations, other, step, block]) {
  const moment = momentText(record, { t_s, step, block, operation: null });
  return `${bytesText(weights + activations + other)} · ${moment}`;
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
