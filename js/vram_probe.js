// VRAM Probe in the page: hears what the running host measures and draws it on the probe's node.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { copyText } from "./probe_export.js";
import { Follower } from "./probe_follower.js";
import { Records, isEarlier, isFinal, isNewer } from "./probe_records.js";
import { loadTexts, text } from "./probe_texts.js";
import { ProbeView } from "./probe_view.js";

const NODE_TYPE = "ZImageVRAMProbe";
const EVENT = "z_image_low_vram.probe";
const OUTPUT = "z_image_vram_probe";
const WIDGET = "vram_chart";
const SIZE_PX = { width: 380, chart: 240, least: 190 };
const HISTORY_ITEMS = 10;

const records = new Records(window.sessionStorage);
const views = new WeakMap(); // by the view's element
const workflowOfPrompt = new Map(); // promises of a workflow's id, or of null
const follower = new Follower();
let isGraphLoaded = false;
let heard = null; // the prompt whose events this tab gets
let turns = 0; // of asking what runs

const viewOf = (node) => {
  const widget = node?.widgets?.find((candidate) => candidate.name === WIDGET);
  return widget?.element && views.get(widget.element);
};

/** The node with that id; "1:2" is node 2 in the subgraph of node 1. */
function nodeAt(id) {
  const [first, ...inner] = String(id).split(":");
  let node = app.rootGraph.getNodeById(first);
  for (const step of inner) node = node?.subgraph?.getNodeById(step);
  return node;
}

/** Ids and nodes of all probes of the open workflow. */
function* probes(graph = app.rootGraph, prefix = "") {
  for (const node of graph.nodes) {
    if (node.type === NODE_TYPE) yield [`${prefix}${node.id}`, node];
    else if (node.subgraph) yield* probes(node.subgraph, `${prefix}${node.id}:`);
  }
}

async function getJson(path) {
  const response = await api.fetchApi(path);
  return response.ok ? response.json() : {};
}

/** What the host runs now: number, id, nodes and extra data of each prompt. */
async function runningPrompts() {
  const { queue_running: running = [] } = await getJson("/queue");
  return running;
}

const workflowIdIn = (extra) => extra?.extra_pnginfo?.workflow?.id ?? null;

/** The id of the workflow that the prompt was made of; null where it names none. */
function workflowOf(prompt) {
  const ask = async () => {
    const item = (await runningPrompts()).find(([, id]) => id === prompt);
    const data = item ?? (await getJson(`/history/${prompt}`))[prompt]?.prompt;
    return workflowIdIn(data?.[3]);
  };
  if (!workflowOfPrompt.has(prompt)) workflowOfPrompt.set(prompt, ask().catch(() => null));
  return workflowOfPrompt.get(prompt);
}

function show(node, entry) {
  viewOf(node)?.show(entry.record, { isEarlier: isEarlier(entry) });
}

function keep(entry) {
  records.put(entry);
  if (entry.workflow === app.rootGraph.id) show(nodeAt(entry.node), entry);
}

/** Keeps a record that has come over the socket, and shows it where its workflow is open. */
async function receive(prompt, node, record) {
  heard = prompt;
  follower.stop();
  keep({ workflow: (await workflowOf(prompt)) ?? app.rootGraph.id, node, prompt, record });
}

/** Shows what is known of the open workflow's probes, and what the host has since. */
async function restore() {
  await askHistory();
  await follow();
}

/** The host may be away; it is asked again when it says that its queue has changed. */
function tryTo(act) {
  act().catch((error) => console.warn("VRAM Probe: the host does not answer:", error));
}

/** Follows the running prompt where it is the open workflow's and this tab hears nothing of it. */
async function follow() {
  const workflow = app.rootGraph.id;
  const ids = new Set([...probes()].map(([id]) => id));
  if (ids.size === 0) return follower.stop();
  const turn = ++turns;
  const running = (await runningPrompts()).find(([, , nodes, extra]) => {
    return workflowIdIn(extra) === workflow && Object.keys(nodes).some((id) => ids.has(id));
  });
  const prompt = running?.[1];
  if (turn !== turns) return; // the queue has changed meanwhile
  if (follower.prompt && follower.prompt !== prompt) await askHistory(); // how that one ended
  if (!prompt || prompt === heard) return follower.stop();
  const ask = () => getJson(`/z_image_low_vram/probes/${prompt}`);
  follower.start(prompt, ask, (node, record) => {
    if (ids.has(node) && workflow === app.rootGraph.id) keep({ workflow, node, prompt, record });
  });
}

async function askHistory() {
  const workflow = app.rootGraph.id;
  const ids = new Set();
  for (const [id, node] of probes()) {
    ids.add(id);
    const entry = records.get(workflow, id);
    if (entry) show(node, entry);
  }
  if (ids.size === 0) return;
  const history = await getJson(`/history?max_items=${HISTORY_ITEMS}`);
  const prompts = Object.keys(history);
  for (const [id, { prompt: queued, outputs }] of Object.entries(history)) {
    if (workflowIdIn(queued?.[3]) !== workflow) continue;
    for (const [node, output] of Object.entries(outputs ?? {})) {
      const record = output[OUTPUT]?.[0];
      if (!record || !ids.has(node)) continue;
      // A later run of the cached node has written into the same output.
      const isLater = prompts.indexOf(record.prompt_id) > prompts.indexOf(id);
      const prompt = isLater ? record.prompt_id : id;
      if (!isNewer(prompt, records.get(workflow, node), prompts)) continue;
      keep({ workflow, node, prompt, record });
    }
  }
  await endLostRuns(workflow);
}

/** A run that ended while the page was away sends nothing more. */
async function endLostRuns(workflow) {
  const open = records.of(workflow).filter((entry) => !isFinal(entry));
  if (open.length === 0) return;
  const running = await runningPrompts();
  for (const entry of open) {
    const isStale = records.get(workflow, entry.node) === entry;
    if (isStale && !running.some(([, id]) => id === entry.prompt)) {
      keep({ ...entry, record: { ...entry.record, state: "lost" } });
    }
  }
}

/** In the classic canvas, lets zoom, pan and the node's menu work over the chart. */
function passToCanvas(node, view, signal) {
  const { element } = view;
  const isClassic = () => element.closest(".dom-widget") !== null;
  const pass = (event, act) => {
    if (!isClassic()) return; // Nodes 2.0 does so by itself
    event.preventDefault();
    act();
  };
  const wheel = (event) => {
    if (event.ctrlKey || !view.canScroll) pass(event, () => app.canvas.processMouseWheel(event));
  };
  const middle = (act) => (event) => {
    if (event.button === 1 || event.buttons & 4) pass(event, () => act(event));
  };
  const menu = (event) =>
    pass(event, () => {
      app.canvas.adjustMouseEvent(event);
      app.canvas.processContextMenu(node, event);
    });
  const on = (kind, act) => element.addEventListener(kind, act, { signal, passive: false });
  on("wheel", wheel);
  on("pointerdown", middle((event) => app.canvas.processMouseDown(event)));
  on("pointermove", middle((event) => app.canvas.processMouseMove(event)));
  on("pointerup", middle((event) => app.canvas.processMouseUp(event)));
  on("contextmenu", menu);
}

function addView(node) {
  const ended = new AbortController();
  const view = new ProbeView(ended.signal);
  views.set(view.element, view);
  const widget = node.addDOMWidget(WIDGET, "vram_chart", view.element, {
    serialize: false, // not part of a prompt
    hideOnZoom: false,
    getMinHeight: () => SIZE_PX.least,
  });
  widget.serialize = false; // nor of the workflow's file
  passToCanvas(node, view, ended.signal);
  const { onRemoved } = node;
  node.onRemoved = function (...args) {
    ended.abort();
    return onRemoved?.apply(this, args);
  };
  const [width, height] = node.computeSize();
  const roomy = height + SIZE_PX.chart - SIZE_PX.least;
  node.setSize([Math.max(SIZE_PX.width, width), Math.max(roomy, node.size[1])]);
  view.draw();
}

async function copyIssueReport(record) {
  const isCopied = await copyText(record.issue_report);
  const severity = isCopied ? "success" : "error";
  const summary = text(isCopied ? "issueCopied" : "copyFailed");
  app.extensionManager.toast.add({ severity, summary, life: 4000 });
}

app.registerExtension({
  name: "z-image-low-vram.vram_probe",

  async setup() {
    // Only the tab that has queued a prompt hears this.
    api.addEventListener("execution_start", ({ detail }) => {
      heard = detail.prompt_id;
      follower.stop();
    });
    api.addEventListener(EVENT, ({ detail }) =>
      receive(detail.prompt_id, String(detail.node_id), detail.record),
    );
    api.addEventListener("executed", ({ detail }) => {
      const record = detail.output?.[OUTPUT]?.[0];
      const node = String(detail.display_node ?? detail.node);
      if (record) return receive(detail.prompt_id, node, record);
    });
    // Of a prompt that another tab has queued, this tab hears that the queue has changed.
    api.addEventListener("status", ({ detail }) => {
      if (!detail?.exec_info || !isGraphLoaded) return;
      const isIdle = detail.exec_info.queue_remaining === 0;
      tryTo(isIdle && heard === null ? restore : follow);
      if (isIdle) heard = null;
    });
    window.addEventListener("pagehide", () => records.save());
    await loadTexts();
  },

  nodeCreated(node) {
    if (node.comfyClass === NODE_TYPE) addView(node);
  },

  afterConfigureGraph() {
    isGraphLoaded = true;
    tryTo(restore);
  },

  getNodeMenuItems(node) {
    const view = viewOf(node);
    if (!view) return [];
    const { record } = view;
    const item = { content: text("issue"), callback: () => copyIssueReport(record) };
    return [record?.issue_report ? item : { ...item, disabled: true }];
  },
});
