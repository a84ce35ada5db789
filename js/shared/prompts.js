// Which prompt was made of which workflow, and what its nodes gave out.

import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";

const HISTORY_ITEMS = 10;
const promises = new Map(); // of what was queued, by the prompt's id

export async function getJson(path) {
  const response = await api.fetchApi(path);
  return response.ok ? response.json() : {};
}

/** The node with that id; "1:2" is node 2 in the subgraph of node 1. */
export function nodeAt(id) {
  const [first, ...inner] = String(id).split(":");
  let node = app.rootGraph.getNodeById(first);
  for (const step of inner) node = node?.subgraph?.getNodeById(step);
  return node;
}

/** Ids and nodes of all nodes of that type in the open workflow. */
export function* nodesOf(type, graph = app.rootGraph, prefix = "") {
  for (const node of graph.nodes) {
    if (node.type === type) yield [`${prefix}${node.id}`, node];
    else if (node.subgraph) yield* nodesOf(type, node.subgraph, `${prefix}${node.id}:`);
  }
}

/** What was queued as that prompt.
 *
 * @returns {Promise<{nodes: object?, workflow: string?}>} its nodes in the API format, and the id
 *   of the workflow that it was made of; null where they are not known.
 */
export function queued(prompt) {
  const ask = async () => {
    const now = (await running()).find(({ id }) => id === prompt);
    return now ?? partsOf((await getJson(`/history/${prompt}`))[prompt]?.prompt);
  };
  const keep = (parts) => {
    if (!parts.nodes) promises.delete(prompt); // the next one who asks may get an answer
    return parts;
  };
  if (!promises.has(prompt)) promises.set(prompt, ask().catch(() => partsOf()).then(keep));
  return promises.get(prompt);
}

/** The prompts that the host runs now: `id`, the `client` that queued it, and as in `queued`. */
export async function running() {
  const { queue_running: items = [] } = await getJson("/queue");
  return items.map((item) => ({ id: item[1], client: item[3]?.client_id, ...partsOf(item) }));
}

/** The newest prompts that have ended, the oldest first: `id`, `outputs`, and as in `queued`. */
export async function history() {
  const found = await getJson(`/history?max_items=${HISTORY_ITEMS}`);
  return Object.entries(found).map(([id, { prompt, outputs }]) => {
    return { id, outputs: outputs ?? {}, ...partsOf(prompt) };
  });
}

function partsOf(item) {
  return { nodes: item?.[2] ?? null, workflow: item?.[3]?.extra_pnginfo?.workflow?.id ?? null };
}
