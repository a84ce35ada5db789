// VRAM Probe in the page: hears what the running host measures and draws it on the probe's node.

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { addPanel, showPanels, viewOf } from "../shared/node_panel.js";
import { history, nodeAt, nodesOf, queued, running } from "../shared/prompts.js";
import { loadTexts } from "../shared/texts.js";
import { copyText } from "./export.js";
import { OUTPUT, Records, isEarlier, isFinal, newerEntries, promptOf } from "./records.js";
import { text } from "./texts.js";
import { ProbeView } from "./view.js";

const NODE_TYPE = "ZImageVRAMProbe";
const EVENT = "z_image_low_vram.probe";
const WIDGET = "vram_chart";
const SIZE_PX = { width: 380, height: 240, least: 190 };

const records = new Records(window.sessionStorage);
let isGraphLoaded = false;
let heard = null; // the prompt whose events this tab gets
let followed = null; // the prompt whose events this tab has asked for, with its workflow
let turns = 0; // of asking what runs
let isLate = true; // the page was opened or cut off: its own prompt may have sent something before

function show(node, entry) {
  viewOf(node, WIDGET)?.show(entry.record, { isEarlier: isEarlier(entry) });
}

function keep(entry) {
  records.put(entry);
  if (entry.workflow === app.rootGraph.id) show(nodeAt(entry.node), entry);
}

/** Keeps a record that has come over the socket, and shows it where its workflow is open. */
async function receive(prompt, node, record) {
  // The last record may come a moment after its prompt, when another one runs already.
  if (record.state === "running") heard = prompt;
  const { workflow } = followed?.prompt === prompt ? followed : await queued(prompt);
  keep({ workflow: workflow ?? app.rootGraph.id, node, prompt, record });
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

/** Asks for the events of a running prompt, unless this tab hears them from the start.
 *
 * The answer is what its probes saw until then.
 */
async function follow() {
  const workflow = app.rootGraph.id;
  const ids = new Set([...nodesOf(NODE_TYPE)].map(([id]) => id));
  if (ids.size === 0) return;
  const turn = ++turns;
  const prompts = await running();
  if (turn !== turns) return; // the queue has changed meanwhile
  const prompt = promptOf(workflow, ids, prompts, isLate ? null : api.clientId);
  isLate = false;
  if (followed && followed.prompt !== prompt) {
    followed = null;
    await askHistory(); // how that one ended
  }
  if (!prompt || prompt === followed?.prompt || !api.clientId) return;
  followed = { prompt, workflow };
  const seen = await recordsOf(prompt).catch((error) => {
    followed = null; // the next change of the queue asks again
    isLate = true;
    throw error;
  });
  for (const [node, record] of Object.entries(seen)) {
    const known = records.get(workflow, node);
    const hasEnded = known?.prompt === prompt && isFinal(known); // by an event, meanwhile
    if (ids.has(node) && !hasEnded) keep({ workflow, node, prompt, record });
  }
}

async function recordsOf(prompt) {
  const path = `/z_image_low_vram/probes/${prompt}?clientId=${api.clientId}`;
  const response = await api.fetchApi(path);
  if (!response.ok) throw new Error(`${path}: ${response.status}`);
  return response.json();
}

async function askHistory() {
  const workflow = app.rootGraph.id;
  const ids = new Set();
  for (const [id, node] of nodesOf(NODE_TYPE)) {
    ids.add(id);
    const entry = records.get(workflow, id);
    if (entry) show(node, entry);
  }
  if (ids.size === 0) return;
  for (const entry of newerEntries(await history(), workflow, ids, records)) keep(entry);
  await endLostRuns(workflow);
}

/** A run that ended while the page was away sends nothing more. */
async function endLostRuns(workflow) {
  const open = records.of(workflow).filter((entry) => !isFinal(entry));
  if (open.length === 0) return;
  const now = await running();
  for (const entry of open) {
    const isStale = records.get(workflow, entry.node) === entry;
    if (isStale && !now.some(({ id }) => id === entry.prompt)) {
      keep({ ...entry, record: { ...entry.record, state: "lost" } });
    }
  }
}

function addView(node) {
  const ended = new AbortController();
  const view = new ProbeView(ended.signal);
  addPanel(node, { name: WIDGET, view, ended, size: SIZE_PX });
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
    // The host has forgotten which prompt this tab follows.
    api.addEventListener("reconnected", () => {
      followed = heard = null;
      isLate = true;
      if (isGraphLoaded) tryTo(restore);
    });
    window.addEventListener("pagehide", () => records.save());
    await loadTexts();
  },

  nodeCreated(node) {
    if (node.comfyClass === NODE_TYPE) addView(node);
  },

  afterConfigureGraph() {
    showPanels([...nodesOf(NODE_TYPE)].map(([, node]) => node), WIDGET);
    isGraphLoaded = true;
    tryTo(restore);
  },

  getNodeMenuItems(node) {
    const view = viewOf(node, WIDGET);
    if (!view) return [];
    const { record } = view;
    const item = { content: text("issue"), callback: () => copyIssueReport(record) };
    return [record?.issue_report ? item : { ...item, disabled: true }];
  },
});
