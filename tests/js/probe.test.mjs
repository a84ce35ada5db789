// The arithmetic of the probe's chart and the store of its records; run by tests/test_js.py.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import test from "node:test";

import { bytesText } from "../../js/shared/bytes.js";
import * as geometry from "../../js/probe/geometry.js";
import { headlineOf } from "../../js/probe/headline.js";
import { Records, isEarlier, isNewer, newerEntries, promptOf } from "../../js/probe/records.js";
import { isForPanel, placeAfter } from "../../js/shared/keys.js";

const MIB = 2 ** 20;
const GIB = 2 ** 30;

test("bytes have the unit of which there is at least one, and three to four digits", () => {
  const told = {
    "0 B": 0,
    "1023 B": 1023,
    "1.00 KiB": 1024,
    "37.5 MiB": 37.5 * MIB,
    "486 MiB": 486 * MIB,
    "1.00 GiB": GIB,
    "12.46 GiB": 12.456 * GIB,
    "140 GiB": 140 * GIB,
  };
  for (const [text, bytes] of Object.entries(told)) assert.equal(bytesText(bytes), text);
});

test("ticks are round, inside, and never more than about the wanted", () => {
  assert.deepEqual(geometry.ticks(0, 12.3, 3), [0, 5, 10]);
  assert.deepEqual(geometry.ticks(11.93, 12.27, 3).map((t) => t.toFixed(1)), ["12.0", "12.2"]);
  assert.deepEqual(geometry.ticks(5, 5, 3), [5]);
  for (let high = 0.013; high < 1e6; high *= 1.7) {
    const found = geometry.ticks(0, high, 4);
    assert.ok(found.length >= 2 && found.length <= 6, `${high}: ${found}`);
    assert.ok(found[0] === 0 && found.at(-1) <= high * (1 + 1e-9), `${high}: ${found}`);
    const texts = found.map((tick) => tick.toFixed(geometry.tickDigits(found)));
    assert.equal(new Set(texts).size, texts.length, `${high}: ${texts}`);
  }
});

test("a time belongs to the sample that ends there or next, also outside of the times", () => {
  const times = [0, 1, 1, 4];
  const found = [-3, 0, 0.4, 1, 1.1, 4, 99].map((time) => geometry.sampleAt(times, time));
  assert.deepEqual(found, [0, 0, 1, 1, 3, 3, 3]);
  assert.equal(geometry.sampleAt([7], 2), 0);
});

test("thinning keeps the ends and the highest of each span", () => {
  const rows = Array.from({ length: 400 }, (_, i) => [i / 10, 1000, i === 173 ? 900 : i % 7, 0]);
  const kept = geometry.thin(rows, 50);
  assert.ok(kept.length <= 52);
  assert.equal(kept[0], rows[0]);
  assert.equal(kept.at(-1), rows.at(-1));
  assert.ok(kept.includes(rows[173]));
  assert.deepEqual(kept.map((row) => row[0]), kept.map((row) => row[0]).toSorted((a, b) => a - b));
  assert.equal(geometry.thin(rows, 400), rows);
});

test("the device's size is to scale only where it does not press the chart flat", () => {
  const near = geometry.verticalAxis({ peak: 12, lowest: 11, ceiling: 16, closeUp: false });
  assert.ok(near.hasCeiling && near.low === 0 && near.high > 16);
  const far = geometry.verticalAxis({ peak: 12, lowest: 11, ceiling: 80, closeUp: false });
  assert.ok(!far.hasCeiling && far.high < 14);
  const unknown = geometry.verticalAxis({ peak: 12, lowest: 11, ceiling: null, closeUp: false });
  assert.deepEqual(unknown, far);
  const measured = { peak: 12 * GIB, lowest: 11 * GIB, ceiling: 16 * GIB };
  const close = geometry.verticalAxis({ ...measured, closeUp: true });
  const full = geometry.verticalAxis({ ...measured, ceiling: 12.5 * GIB, closeUp: true });
  assert.ok(!close.hasCeiling && full.hasCeiling && full.high > 12.5 * GIB);
  assert.ok(close.low > 10 * GIB && close.low < 11 * GIB && close.high > 12 * GIB);
});

test("a cut axis still rises from the bottom to the top", () => {
  assert.ok(geometry.isFlat(12 * GIB, 11 * GIB));
  assert.ok(!geometry.isFlat(12 * GIB, 10 * GIB));
  assert.ok(!geometry.isFlat(12 * GIB, 0), "from nothing to all is no flat block");
  for (const closeUp of [false, true]) {
    const [lowest, peak] = [11 * GIB, 12 * GIB];
    const axis = geometry.verticalAxis({ peak, lowest, ceiling: null, closeUp });
    const heights = [0, axis.low / 2, axis.low, lowest, peak, axis.high].map((bytes) =>
      geometry.heightOf(bytes, axis),
    );
    assert.equal(heights[0], 0);
    assert.equal(heights.at(-1), 1);
    assert.deepEqual(heights, heights.toSorted((a, b) => a - b));
    assert.equal(heights[4] - heights[3] > 0.4, closeUp, "the changes fill a close-up");
  }
});

test("the parts are stacked from the bottom up: other, weights, activations", () => {
  const rows = [[0, 1, 1, 1, null, null], [1, 100, 20, 3, 1, "a"], [2, 100, 40, 3, 1, "b"]];
  const areas = geometry.areasOf(rows);
  assert.deepEqual(areas.map(({ part }) => part), ["other", "weights", "activations"]);
  const tops = areas.map(({ points }) => points.slice(0, 4));
  assert.deepEqual(tops[0], [[0, 3], [1, 3], [1, 3], [2, 3]]);
  assert.deepEqual(tops[1], [[0, 103], [1, 103], [1, 103], [2, 103]]);
  assert.deepEqual(tops[2], [[0, 123], [1, 123], [1, 143], [2, 143]]);
  areas.slice(1).forEach(({ points }, i) => {
    assert.deepEqual(points.slice(4), tops[i].toReversed(), "each begins where the one below ends");
  });
});

class Storage {
  constructor(quota = Infinity) {
    this.quota = quota;
  }
  getItem() {
    return this.value ?? null;
  }
  setItem(_, value) {
    if (value.length > this.quota) throw new Error("QuotaExceededError");
    this.value = value;
  }
}

const entry = (node, state = "done", report = "") => {
  return { workflow: "w", node, prompt: "p", record: { state, report } };
};

test("records outlive the page, the newest first to stay", () => {
  const storage = new Storage();
  const records = new Records(storage);
  for (let i = 0; i < 30; i++) records.put(entry(String(i), "done", "x".repeat(90_000)));
  const again = new Records(storage);
  assert.ok(storage.value.length < 1.01e6);
  assert.equal(again.get("w", "29").record.state, "done");
  assert.equal(again.get("w", "0"), undefined);
  assert.equal(again.of("other").length, 0);
});

test("a record that does not end is written only when the page goes", () => {
  const storage = new Storage();
  const records = new Records(storage);
  records.put(entry("1", "running"));
  assert.equal(storage.value, undefined);
  records.save();
  assert.equal(new Records(storage).get("w", "1").record.state, "running");
});

test("neither a full storage nor what somebody else has written breaks the page", () => {
  new Records(new Storage(10)).put(entry("1"));
  const storage = new Storage();
  storage.value = "{not ours";
  assert.equal(new Records(storage).get("w", "1"), undefined);
  assert.equal(new Records(undefined).get("w", "1"), undefined);
});

test("a record of a prompt before is told apart", () => {
  const taken = (prompt, measured) => ({ prompt, record: { prompt_id: measured } });
  assert.ok(isEarlier(taken("b", "a")));
  assert.ok(!isEarlier(taken("b", "b")));
  assert.ok(!isEarlier(taken("b", "")), "a record that names no prompt");
});

test("the history's record counts where it is newer than the known one", () => {
  const history = ["a", "b", "c"];
  const known = (prompt, state) => ({ prompt, record: { state } });
  assert.ok(isNewer("b", undefined, history));
  assert.ok(isNewer("c", known("b", "done"), history));
  assert.ok(!isNewer("a", known("b", "done"), history));
  assert.ok(isNewer("b", known("b", "done"), history), "of a sampling that went on from there");
  assert.ok(isNewer("b", known("b", "running"), history));
  assert.ok(!isNewer("c", known("running now", "running"), history));
});

const told = (measured, state = "done") => [{ prompt_id: measured, state }];

test("a probe shows the records of its own node, workflow and newest prompt alone", () => {
  const records = new Records(new Storage());
  const ended = [
    { id: "a", workflow: "w", outputs: { 20: { z_image_vram_probe: told("a") } } },
    { id: "b", workflow: "other", outputs: { 20: { z_image_vram_probe: told("b") } } },
    { id: "c", workflow: "w", outputs: { 7: { images: [] }, 99: { z_image_vram_probe: told("c") } } },
    { id: "d", workflow: "w", outputs: { 21: { z_image_vram_probe: told("d") } } },
  ];
  const found = [];
  for (const entry of newerEntries(ended, "w", new Set(["20", "21"]), records)) {
    found.push([entry.node, entry.prompt, entry.record.prompt_id]);
    records.put(entry);
  }
  assert.deepEqual(found, [["20", "a", "a"], ["21", "d", "d"]]);
  const later = [...ended, { id: "e", workflow: "w", outputs: { 20: { z_image_vram_probe: told("a") } } }];
  const cached = [...newerEntries(later, "w", new Set(["20"]), records)].at(-1);
  assert.equal(cached.prompt, "e");
  assert.ok(isEarlier(cached), "the host took the probe from its cache: the record is older");
  // The output of a prompt whose sampling went on in a later one has the later one's record.
  ended[0].outputs[20].z_image_vram_probe = told("d");
  const [written] = newerEntries(ended, "w", new Set(["20"]), new Records(new Storage()));
  assert.equal(written.prompt, "d");
  records.put({ workflow: "w", node: "20", prompt: "runs now", record: { state: "running" } });
  const newer = [...newerEntries(ended, "w", new Set(["20", "21"]), records)];
  assert.deepEqual(newer.map(({ node }) => node), ["21"], "nothing older than what runs");
});

test("what runs is followed only where it was made of the open workflow and has its probes", () => {
  const prompts = [
    { id: "a", workflow: "other", nodes: { 20: {} } },
    { id: "b", workflow: "w", nodes: { 7: {} } },
    { id: "c", workflow: "w", nodes: null },
    { id: "d", client: "other tab", workflow: "w", nodes: { 7: {}, 20: {} } },
  ];
  assert.equal(promptOf("w", new Set(["20", "21"]), prompts, "this tab"), "d");
  assert.equal(promptOf("w", new Set(["20"]), prompts.slice(0, 3), "this tab"), undefined);
  assert.equal(promptOf("w", new Set(["20"]), prompts, "other tab"), undefined, "it hears its own");
  assert.equal(promptOf("w", new Set(["20"]), prompts, null), "d", "it may have missed something");
});

const textsOf = (language) => {
  const file = new URL(`../../locales/${language}/main.json`, import.meta.url);
  const texts = JSON.parse(readFileSync(file, "utf8")).zImageVramProbe;
  return (name, ...values) => {
    assert.ok(name in texts, name);
    return texts[name].replace(/\$(\d)/g, (_, index) => values[index - 1]);
  };
};
const recordOf = (changed = {}) => ({
  state: "done",
  peak_bytes: 7.31 * GIB,
  is_at_least: false,
  measured_with: "torch's cuda allocator",
  device: { type: "cuda", total_bytes: 8 * GIB },
  ...changed,
});
const headline = (changed, isEarlier = false, language = "en") => {
  const { start, rest } = headlineOf(recordOf(changed), isEarlier, textsOf(language));
  return start + rest;
};

test("the headline says what the peak means against the card", () => {
  const left = "of 8 GiB: 707 MiB left for the driver and other programs.";
  const ram = { type: "cpu", total_bytes: 16 * GIB };
  const rss = "RAM of the process (RSS)";
  const tracked = "exact tensor bytes (every operation is watched)";
  const unknown = { type: "cuda", total_bytes: null };
  const told = [
    [{}, `Peak 7.31 GiB ${left}`],
    [{ state: "running" }, `Peak so far 7.31 GiB ${left}`],
    [{ state: "interrupted" }, `Peak until then 7.31 GiB ${left}`],
    [{ state: "lost" }, `Peak until then 7.31 GiB ${left}`],
    [{ is_at_least: true }, `Peak at least 7.31 GiB ${left.replace("707", "at most 707")}`],
    [{ peak_bytes: 9 * GIB }, "Peak 9.00 GiB: that is 1.00 GiB more than the card's 8 GiB."],
    [{ device: unknown }, "Peak 7.31 GiB. The size of the card is not known."],
    [{ device: ram, measured_with: tracked, peak_bytes: 91 * MIB },
      "Peak 91.0 MiB of tensors, in RAM: no GPU was used."],
    [{ device: ram, measured_with: rss },
      "Peak 7.31 GiB of RAM, for all of ComfyUI: no GPU was used."],
    [{ device: { ...ram, type: "mps" }, measured_with: rss },
      "Peak 7.31 GiB of RAM, for all of ComfyUI: this GPU shares it."],
  ];
  for (const [changed, sentence] of told) assert.equal(headline(changed), sentence);
  assert.equal(headline({}, true), `Earlier peak 7.31 GiB ${left}`);
  for (const [changed] of told) {
    const { start, rest } = headlineOf(recordOf(changed), false, textsOf("zh"));
    assert.ok(start.startsWith(textsOf("zh")("peakOf", "").slice(0, 2)) || start.includes("峰值"));
    assert.ok(rest.length > 3 && !rest.includes("$"), rest);
  }
});

test("keys for a panel are not the page's, and all others are", () => {
  const press = (key, more = {}) => isForPanel({ key, ...more });
  for (const key of ["Delete", "Backspace", " ", "r", ".", "ArrowDown", "Enter"]) {
    assert.ok(press(key), key);
  }
  for (const key of ["Tab", "Escape", "F5", "Shift"]) assert.ok(!press(key), key);
  for (const held of ["ctrlKey", "metaKey", "altKey"]) assert.ok(!press("z", { [held]: true }));
  const places = ["ArrowDown", "ArrowUp", "Home", "End", "PageDown", "PageUp", "a"].map((key) =>
    placeAfter(key, 4, 6, 3),
  );
  assert.deepEqual(places, [5, 3, 0, 5, 5, 1, null]);
});
