// What the node Fit to VRAM shows: whether the picture fits, and a bar for each stage of the run.

import { PARTS, barsOf, highest } from "./bars.js";
import { style } from "./style.js";
import { bytesText } from "../shared/bytes.js";
import { make } from "../shared/elements.js";
import { textsOf } from "../shared/texts.js";

const text = textsOf("zImageFitToVram");

const LAYOUT = `
  <div class="panel">
    <div class="empty"></div>
    <div class="error" role="alert"></div>
    <div class="head"><span class="verdict"></span><span class="asked"></span></div>
    <div class="short"></div>
    <div class="chart">
      <div class="above"></div>
      <div class="stages"></div>
      <div class="below"></div>
    </div>
    <div class="legend"></div>
    <div class="foot"></div>
  </div>`;

export class FitView {
  element = document.createElement("div");
  #parts = {};
  #plan = null;
  #told = { source: "sizeUnknown" };
  #pointed = null; // the stage below the mouse

  /** @param signal ends everything that the view listens to. */
  constructor(signal) {
    const root = this.element.attachShadow({ mode: "open" });
    root.adoptedStyleSheets = [style];
    root.innerHTML = LAYOUT;
    for (const found of root.querySelectorAll("[class]")) this.#parts[found.className] ??= found;
    const point = (event) => this.#point(event.target.closest?.(".stage")?.dataset.name ?? null);
    this.#parts.chart.addEventListener("pointerover", point, { signal });
    this.#parts.chart.addEventListener("pointerleave", () => this.#point(null), { signal });
  }

  /** @param source where the plan comes from: "published", "ran" or "earlier". */
  show(plan, source) {
    this.#plan = plan;
    this.#told = { source };
    this.draw();
  }

  /** In place of a plan: that the size is not known, or why there is none. */
  tell(name, reason = "") {
    this.#plan = null;
    this.#told = { source: name, reason };
    this.draw();
  }

  /** Whether the mouse wheel should scroll what it is over. */
  get canScroll() {
    const { panel } = this.#parts;
    return panel.scrollHeight > panel.clientHeight + 1;
  }

  /** Takes the colours of the renderer that shows it. */
  adapt() {
    this.#parts.panel.classList.toggle("nodes-2", this.element.closest(".lg-node") !== null);
  }

  draw() {
    this.adapt();
    const parts = this.#parts;
    const plan = this.#plan;
    const { source, reason } = this.#told;
    for (const name of ["head", "chart", "legend", "foot"]) parts[name].hidden = plan === null;
    parts.empty.hidden = plan !== null || source !== "sizeUnknown";
    parts.empty.textContent = text("sizeUnknown");
    parts.error.hidden = plan !== null || source === "sizeUnknown";
    parts.error.textContent = text(source, reason);
    parts.short.hidden = plan === null || plan.verdict === "fits";
    if (plan === null) return;
    this.#drawHead(plan);
    this.#drawChart(plan);
    this.#drawLegend(plan);
    const streamed = Math.max(...plan.stages.map((stage) => stage.streamed));
    const isStreamed = streamed > 0 && plan.verdict !== "too large";
    const lines = isStreamed ? [text("streamed", bytesText(streamed))] : [];
    lines.push(text(source, plan.text_tokens));
    parts.foot.replaceChildren(...lines.map((line) => make("div", "", line)));
  }

  #drawHead({ verdict, budget_bytes: budget, missing_bytes: missing, others, ...asked }) {
    const parts = this.#parts;
    const isOpen = budget === null;
    parts.verdict.textContent = text(isOpen ? "noBudget" : verdict);
    parts.verdict.className = `verdict ${isOpen ? "" : verdict.replace(" ", "-")}`;
    const size = text("asked", asked.width, asked.height, asked.batch_size);
    parts.asked.textContent = [size, isOpen ? text("nameOne") : ""].filter(Boolean).join(" · ");
    parts.asked.title = parts.asked.textContent;
    const short = text(verdict === "tight" ? "shortOfRoom" : "short", bytesText(missing));
    const told = others.map(otherText);
    const instead = told.length ? told.reduce((first, next) => text("either", first, next)) : null;
    parts.short.textContent = instead ? `${short} ${text("instead", instead)}` : short;
  }

  #drawChart(plan) {
    const { stages, above, below } = this.#parts;
    const bars = barsOf(plan);
    stages.replaceChildren(...plan.stages.map((stage, i) => stageRow(stage, bars, i, plan)));
    const labels = [];
    if (bars.budget !== null) {
      labels.push(placed("budget-label", text("budget", bytesText(plan.budget_bytes)), bars.budget));
    }
    above.replaceChildren(...labels);
    const isCard = bars.card !== null;
    const end = isCard ? text("card", bytesText(plan.card_bytes)) : bytesText(bars.end);
    below.replaceChildren(placed("", "0", 0), placed("", end, isCard ? bars.card : 100));
  }

  #point(name) {
    if (name === this.#pointed || this.#plan === null) return;
    this.#pointed = name;
    this.#drawLegend(this.#plan);
  }

  /** The figures of the stage below the mouse, else of the highest. */
  #drawLegend({ stages }) {
    const pointed = stages.find((stage) => stage.name === this.#pointed);
    const stage = pointed ?? highest(stages);
    const items = PARTS.map((part) => legendItem("part", text(part), part, stage[part]));
    items[2].title = text("workspaceTip");
    if (stage.stock > stage.activations) {
      items.push(legendItem("part thin", text("stock"), "activations", stage.stock));
      items[3].title = text("stockTip");
    }
    this.#parts.legend.replaceChildren(make("span", "of", text(stage.name)), ...items);
  }
}

function legendItem(className, label, part, bytes) {
  const item = make("span", className, label);
  item.style.setProperty("--part", `var(--${part})`);
  item.append(make("b", "", bytesText(bytes)));
  return item;
}

function stageRow(stage, bars, index, { budget_bytes: budget }) {
  const isOver = budget !== null && stage.peak > budget;
  const row = make("div", isOver ? "stage over" : "stage");
  row.dataset.name = stage.name;
  const setting = make("div", "setting", stage.setting);
  setting.title = stage.setting;
  const track = make("div", "track");
  track.setAttribute("role", "img");
  const told = PARTS.map((part) => `${text(part)} ${bytesText(stage[part])}`).join(", ");
  track.setAttribute("aria-label", `${text(stage.name)}: ${bytesText(stage.peak)} (${told})`);
  const bar = make("div", "bar");
  for (const { part, width } of bars.stages[index].parts) {
    const piece = make("div", part);
    piece.style.cssText = `--part: var(--${part}); width: ${width}%`;
    bar.append(piece);
  }
  track.append(bar);
  const { stock } = bars.stages[index];
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
  const peak = make("div", "peak", bytesText(stage.peak));
  row.append(make("div", "name", text(stage.name)), peak, setting, track);
  return row;
}

/** A label at a place of the axis, on the side where there is room. */
function placed(className, label, percent) {
  const span = make("span", className, label);
  span.style.cssText = percent > 50 ? `right: ${100 - percent}%` : `left: ${percent}%`;
  return span;
}

/** What would fit instead. */
function otherText({ differs_in: kind, width, height, batch_size: batch }) {
  return { batch: text("batchOf", batch), size: `${width} × ${height}`, fp8: text("fp8") }[kind];
}
