// What the node Fit to VRAM shows: whether the picture fits, and a bar for each stage of the run.

import { PARTS, barsOf, highest } from "./bars.js";
import { headlineOf } from "./headline.js";
import { offersOf } from "./offers.js";
import { stageRow } from "./stage_row.js";
import { style } from "./style.js";
import { text } from "./texts.js";
import { bytesText, shortText } from "../shared/bytes.js";
import { make, tell } from "../shared/elements.js";
import { moveFocus } from "../shared/keys.js";

const LAYOUT = `
  <div class="panel" role="region">
    <div class="empty"></div>
    <div class="error" role="alert"></div>
    <div class="headline" role="status" tabindex="-1">
      <span class="verdict"></span> <span class="streamed"></span>
    </div>
    <div class="asked"></div>
    <div class="offers" role="group"></div>
    <div class="chart">
      <div class="above" aria-hidden="true"></div>
      <div class="stages" role="list"></div>
      <div class="below" aria-hidden="true"></div>
    </div>
    <div class="legend" aria-hidden="true"></div>
    <div class="foot"></div>
  </div>`;

export class FitView {
  element = document.createElement("div");
  #parts = {};
  #plan = null;
  #told = { source: "sizeUnknown" };
  #offers = null; // how to use what would fit
  #pointed = null; // the stage below the mouse, or with the focus
  #signal;

  /** @param signal ends everything that the view listens to. */
  constructor(signal) {
    this.#signal = signal;
    const root = this.element.attachShadow({ mode: "open" });
    root.adoptedStyleSheets = [style];
    root.innerHTML = LAYOUT;
    for (const found of root.querySelectorAll("[class]")) this.#parts[found.className] ??= found;
    const { chart, stages } = this.#parts;
    const on = (kind, act) => chart.addEventListener(kind, act, { signal });
    const point = (event) => this.#point(event.target.closest?.(".stage")?.dataset.name ?? null);
    on("pointerover", point);
    on("pointerleave", () => this.#point(null));
    on("focusin", point);
    on("focusout", () => this.#point(null));
    on("keydown", (event) => moveFocus(event, [...stages.children]));
  }

  /** @param source where the plan comes from: "published", "ran" or "earlier".
   * @param offers `canUse(offer)` and `use(offer)`; null where the plan is not for the open graph.
   */
  show(plan, source, offers = null) {
    this.#plan = plan;
    this.#told = { source };
    this.#offers = offers;
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
    const isUnknown = plan === null && source === "sizeUnknown";
    parts.panel.setAttribute("aria-label", text("region"));
    parts.headline.classList.toggle("none", plan === null);
    for (const name of ["asked", "chart", "legend", "foot"]) parts[name].hidden = plan === null;
    parts.empty.hidden = !isUnknown;
    tell(parts.empty, isUnknown ? text("sizeUnknown") : "");
    parts.error.hidden = plan !== null || isUnknown;
    tell(parts.error, parts.error.hidden ? "" : text(source, reason));
    this.#drawHead(plan);
    this.#drawOffers(plan);
    if (plan === null) return;
    this.#drawChart(plan);
    this.#drawLegend(plan);
    const lines = [text(source, plan.text_tokens)];
    if (plan.copy_seconds) {
      const speed = (plan.copy_bytes_per_s / 1e9).toFixed(1);
      lines.push(text(plan.is_copy_measured ? "copyMeasured" : "copyAssumed", speed));
    }
    tell(parts.foot, lines.join(" "));
  }

  #drawHead(plan) {
    const { verdict, streamed, asked } = this.#parts;
    const words = plan === null ? { verdict: "", streamed: "" } : headlineOf(plan, text);
    const isOpen = plan === null || plan.budget_bytes === null;
    verdict.className = `verdict ${isOpen ? "" : plan.verdict.replace(" ", "-")}`;
    tell(verdict, words.verdict);
    tell(streamed, words.streamed);
    tell(asked, plan && text("asked", plan.width, plan.height, plan.batch_size));
  }

  /** What would fit instead: a button where the graph has widgets for it, else text. */
  #drawOffers(plan) {
    const { offers, headline } = this.#parts;
    const found = plan === null ? [] : offersOf(plan);
    const hadFocus = offers.contains(offers.getRootNode().activeElement);
    offers.hidden = found.length === 0;
    offers.setAttribute("aria-label", text("instead"));
    const items = found.map((offer) => {
      if (!this.#offers?.canUse(offer)) return make("span", "offer", offerText(offer));
      const button = make("button", "offer", offerText(offer));
      button.type = "button";
      button.title = text("useTip");
      button.addEventListener("click", () => this.#offers.use(offer), { signal: this.#signal });
      return button;
    });
    offers.replaceChildren(make("span", "", text("instead")), ...items);
    if (hadFocus) (offers.querySelector("button") ?? headline).focus({ preventScroll: true });
  }

  #drawChart(plan) {
    const { stages, above, below } = this.#parts;
    const bars = barsOf(plan);
    const focused = stages.getRootNode().activeElement?.dataset.name;
    stages.setAttribute("aria-label", text("stages"));
    stages.replaceChildren(...plan.stages.map((stage, i) => stageRow(stage, bars, i, plan)));
    [...stages.children].find(({ dataset }) => focused && dataset.name === focused)?.focus();
    const labels = [];
    if (bars.budget !== null) {
      labels.push(placed("budget-label", text("budget", shortText(plan.budget_bytes)), bars.budget));
    }
    above.replaceChildren(...labels);
    const isCard = bars.card !== null;
    const end = isCard ? text("card", shortText(plan.card_bytes)) : shortText(bars.end);
    below.replaceChildren(placed("", "0", 0), placed("", end, isCard ? bars.card : 100));
  }

  #point(name) {
    if (name === this.#pointed || this.#plan === null) return;
    this.#pointed = name;
    this.#drawLegend(this.#plan);
  }

  /** The figures of the stage that is pointed at or has the focus, else of the highest. */
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

/** A label at a place of the axis, on the side where there is room. */
function placed(className, label, percent) {
  const span = make("span", className, label);
  span.style.cssText = percent > 50 ? `right: ${100 - percent}%` : `left: ${percent}%`;
  return span;
}

/** What would fit instead. */
function offerText({ kind, values: { width, height, batch_size: batch, budget_gib: gib } }) {
  return {
    batch: text("batchOf", batch),
    size: `${width} × ${height}`,
    fp8: text("fp8"),
    budget: text("budget", `${gib} GiB`),
  }[kind];
}
