// The newest record of each probe, by workflow and node, kept over a reload of the page.
//
// A probe on a MODEL wire ends after its node has run, so its last record comes only by event.
// Records are kept in the tab's session storage: the workflow's file stays small and unchanged, and
// pictures carry no measurements.

export const OUTPUT = "z_image_vram_probe"; // where a probe's output has its record
const STORAGE_KEY = "z-image-low-vram.probe";
const KEPT_RECORDS = 24;
const KEPT_CHARACTERS = 1_000_000; // of the 5 million that the page shares with ComfyUI itself

export class Records {
  // `${workflow}/${node}` -> { workflow, node, prompt, record }, the oldest first.
  #entries = new Map();
  #storage;

  constructor(storage) {
    this.#storage = storage;
    try {
      for (const entry of JSON.parse(storage.getItem(STORAGE_KEY) ?? "[]")) this.#set(entry);
    } catch {
      // Not ours, or no storage in this browser: begin without.
    }
  }

  get(workflow, node) {
    return this.#entries.get(`${workflow}/${node}`);
  }

  /** All entries of a workflow. */
  of(workflow) {
    return [...this.#entries.values()].filter((entry) => entry.workflow === workflow);
  }

  /** Keeps the record in place of the node's last one. */
  put(entry) {
    this.#set(entry);
    if (isFinal(entry)) this.save();
  }

  #set(entry) {
    const key = `${entry.workflow}/${entry.node}`;
    this.#entries.delete(key);
    this.#entries.set(key, entry);
    if (this.#entries.size > KEPT_RECORDS) this.#entries.delete(this.#entries.keys().next().value);
  }

  /** Writes the newest records that fit. */
  save() {
    const kept = [];
    let characters = 0;
    for (const entry of [...this.#entries.values()].reverse()) {
      characters += JSON.stringify(entry).length;
      if (characters > KEPT_CHARACTERS) break;
      kept.unshift(entry);
    }
    try {
      this.#storage.setItem(STORAGE_KEY, JSON.stringify(kept));
    } catch {
      // Full or forbidden: a reload then shows what the history has.
    }
  }
}

export function isFinal(entry) {
  return entry.record.state !== "running";
}

/** Whether the node was taken from the host's cache: its record is that of a prompt before. */
export function isEarlier(entry) {
  const { prompt_id: measured } = entry.record;
  return Boolean(measured) && measured !== entry.prompt;
}

/** The running prompt that was made of the workflow and has one of its probes.
 *
 * @param probes ids of the workflow's probes.
 * @param prompts what runs now: `id`, `client`, `workflow` and `nodes`.
 * @param client the tab whose prompts are left out; null for none.
 */
export function promptOf(workflow, probes, prompts, client) {
  const hasProbe = ({ nodes }) => Object.keys(nodes ?? {}).some((id) => probes.has(id));
  const isWanted = (prompt) => client === null || prompt.client !== client;
  return prompts.find((p) => p.workflow === workflow && isWanted(p) && hasProbe(p))?.id;
}

/** Gives an entry for each record in the history that is newer than the one that is known.
 *
 * @param ended the history's prompts, the oldest first: `id`, `workflow` and `outputs`.
 * @param probes the ids of the workflow's probes.
 */
export function* newerEntries(ended, workflow, probes, records) {
  const prompts = ended.map((prompt) => prompt.id);
  for (const { id, outputs } of ended.filter((prompt) => prompt.workflow === workflow)) {
    for (const [node, output] of Object.entries(outputs)) {
      const record = output[OUTPUT]?.[0];
      if (!record || !probes.has(node)) continue;
      // A later run of the cached node has written into the same output.
      const isLater = prompts.indexOf(record.prompt_id) > prompts.indexOf(id);
      const prompt = isLater ? record.prompt_id : id;
      if (isNewer(prompt, records.get(workflow, node), prompts)) {
        yield { workflow, node, prompt, record };
      }
    }
  }
}

/** Whether the history's record of a prompt takes the place of the one that is known.
 *
 * @param prompts the history's prompts, the oldest first.
 */
export function isNewer(prompt, known, prompts) {
  if (!known) return true;
  if (known.prompt === prompt) return true; // a prompt in the history has ended
  const place = prompts.indexOf(known.prompt); // -1: it still runs, or the host was restarted
  return place !== -1 && place < prompts.indexOf(prompt);
}
