// Fit to VRAM in the page: what the picture needs, on the node, before it is queued.

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { changesFor } from "./offers.js";
import { SIZES, latentOf, questionInPrompt, questionOf } from "./question.js";
import { textIn } from "./texts.js";
import { FitView } from "./view.js";
import { addPanel, showPanels } from "../shared/node_panel.js";
import { loadTexts } from "../shared/texts.js";
import { history, nodeAt, nodesOf, queued } from "../shared/prompts.js";

const NODE_TYPE = "ZImageFitToVRAM";
const ROUTE = "/z_image_low_vram/fit";
const OUTPUT = "z_image_fit";
const WIDGET = "vram_plan";
const SIZE_PX = { width: 400, height: 330, least: 270 };
const LOOK_MS = 200;

const panels = new WeakMap(); // by the node

/** The node that stands for a subgraph; of several, the first. */
function outerOf(subgraph, graph = app.rootGraph) {
  for (const node of graph.nodes) {
    if (!node.subgraph) continue;
    if (node.subgraph === subgraph) return node;
    const inner = outerOf(subgraph, node.subgraph);
    if (inner) return inner;
  }
  return null;
}

/** Keeps the plan that a node shows in step with its inputs. */
class FitPanel {
  #node;
  #view;
  #seen = null; // the question at the last look
  #shown = null; // the question that is answered on the node
  #run = null; // { question, plan } of the last run
  #turn = 0; // counts the questions, so that a late answer is not shown
  #offers = {
    canUse: (offer) => changesFor(this.#node, offer, outerOf) !== null,
    use: (offer) => change(changesFor(this.#node, offer, outerOf) ?? []),
  };

  constructor(node) {
    const ended = new AbortController();
    this.#node = node;
    this.#view = new FitView(ended.signal);
    addPanel(node, { name: WIDGET, view: this.#view, ended, size: SIZE_PX });
  }

  /** Asks once more at the next look. */
  again() {
    this.#shown = null;
  }

  /** Shows the plan of a run, for as long as the question stays the same. */
  ran(question, plan) {
    this.#run = { question: JSON.stringify(question), plan };
    this.#shown = null;
  }

  look() {
    this.#view.adapt();
    for (const widget of this.#node.widgets) {
      if (SIZES.includes(widget.name)) widget.disabled = latentOf(this.#node) !== undefined;
    }
    const question = questionOf(this.#node, outerOf);
    const asked = JSON.stringify(question);
    const isSettled = asked === this.#seen;
    this.#seen = asked;
    if (!isSettled || asked === this.#shown) return;
    this.#shown = asked;
    this.#turn += 1;
    const run = this.#run;
    if (run?.question === asked) this.#view.show(run.plan, "ran", this.#offers);
    else if (question.width !== null) this.#ask(asked);
    else if (run) this.#view.show(run.plan, "earlier");
    else this.#view.tell("sizeUnknown");
  }

  async #ask(asked) {
    const turn = this.#turn;
    const show = await answerTo(asked);
    // Otherwise something newer is shown.
    if (turn === this.#turn) show(this.#view, this.#offers);
  }
}

/** Sets widgets, as one step of the page's undo. */
function change(changes) {
  app.canvas.emitBeforeChange();
  for (const { node, widget, value } of changes) {
    widget.value = value;
    widget.callback?.(value, app.canvas, node);
  }
  app.canvas.emitAfterChange();
  app.canvas.setDirty(true, true);
}

/** Asks the server; gives a function that shows its answer on a view. */
async function answerTo(body) {
  try {
    const headers = { "Content-Type": "application/json" };
    const response = await api.fetchApi(ROUTE, { method: "POST", headers, body });
    const answer = await response.json().catch(() => ({}));
    if (response.ok && answer.stages) {
      return (view, offers) => view.show(answer, "published", offers);
    }
    if (answer.error) return (view) => view.tell("refused", textIn(answer, answer.error));
    return (view) => view.tell("noRoute");
  } catch {
    return (view) => view.tell("noAnswer");
  }
}

/** The panels of the open workflow's nodes; a subgraph that is placed twice has its nodes once. */
function openPanels() {
  const found = [...nodesOf(NODE_TYPE)].map(([, node]) => panels.get(node));
  return new Set(found.filter((panel) => panel));
}

function receive(prompt, node, plan) {
  const question = questionInPrompt(prompt.nodes, node);
  if (question && prompt.workflow === app.rootGraph.id) {
    panels.get(nodeAt(node))?.ran(question, plan);
  }
}

/** Shows what the open workflow's nodes gave out when they ran last. */
async function restore() {
  const ids = new Set([...nodesOf(NODE_TYPE)].map(([id]) => id));
  if (ids.size === 0) return;
  for (const prompt of await history()) {
    for (const [node, output] of Object.entries(prompt.outputs)) {
      const plan = output[OUTPUT]?.[0];
      if (plan && ids.has(node)) receive(prompt, node, plan);
    }
  }
}

app.registerExtension({
  name: "z-image-low-vram.fit_to_vram",

  async setup() {
    api.addEventListener("executed", async ({ detail }) => {
      const plan = detail.output?.[OUTPUT]?.[0];
      const node = String(detail.display_node ?? detail.node);
      if (plan) receive(await queued(detail.prompt_id), node, plan);
    });
    api.addEventListener("reconnected", () => {
      for (const panel of openPanels()) panel.again();
    });
    // Inputs change by mouse, by undo, by scripts and in other nodes, and no event covers all of
    // these in both renderers. One timer looks at all: the page also makes nodes that it never adds
    // to a graph, and so never removes.
    setInterval(() => {
      // Each as a task of its own: one that fails stops no other.
      for (const panel of openPanels()) queueMicrotask(() => panel.look());
    }, LOOK_MS);
    await loadTexts();
  },

  nodeCreated(node) {
    if (node.comfyClass === NODE_TYPE) panels.set(node, new FitPanel(node));
  },

  afterConfigureGraph() {
    showPanels([...nodesOf(NODE_TYPE)].map(([, node]) => node), WIDGET);
    restore().catch((error) => console.warn("Fit to VRAM: no history:", error));
  },
});
