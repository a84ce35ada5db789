// What Fit to VRAM asks and how long its bars are; run by tests/test_js.py.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import test from "node:test";

import { barsOf, highest } from "../../js/fit/bars.js";
import { headlineOf } from "../../js/fit/headline.js";
import { changesFor, offersOf } from "../../js/fit/offers.js";
import { questionInPrompt, questionOf } from "../../js/fit/question.js";

const SET = { budget_gib: 8, prefer: "balance", width: 1024, height: 768, batch_size: 2 };
const OWN = { ...SET, has_vae: false, has_clip: false };
const widgets = (values) => Object.entries(values).map(([name, value]) => ({ name, value }));

/** A graph as the page has it: nodes by id, and links [id, origin, slot, target, slot]. */
function graphOf(nodes, links = []) {
  const graph = {
    links: Object.fromEntries(links.map(([id, origin_id, origin_slot]) => {
      return [id, { id, origin_id, origin_slot }];
    })),
    getLink: (id) => graph.links[id],
    getNodeById: (id) => nodes[id],
  };
  for (const [id, node] of Object.entries(nodes)) Object.assign(node, { id: Number(id), graph });
  return graph;
}

const fitNode = (latent = null, values = SET) => {
  return { inputs: [{ name: "latent", link: latent }], widgets: widgets(values) };
};
const sized = (width, height, batch_size, more = {}) => {
  return { mode: 0, widgets: widgets({ width, height, batch_size }), ...more };
};

test("without a latent the node's own widgets are asked", () => {
  const node = fitNode();
  graphOf({ 1: node });
  assert.deepEqual(questionOf(node), OWN);
});

test("a latent's node gives the size, through reroutes too", () => {
  const node = fitNode(3);
  const reroute = { type: "Reroute", inputs: [{ name: "", link: 2 }] };
  graphOf({ 1: node, 2: reroute, 3: sized(512, 640, 4) }, [[3, 2, 0], [2, 3, 0]]);
  assert.deepEqual(questionOf(node), { ...OWN, width: 512, height: 640, batch_size: 4 });
});

test("a size that the run decides is not known, and no part of it is", () => {
  const unknown = { ...OWN, width: null, height: null, batch_size: null };
  const upscaled = { mode: 0, widgets: widgets({ width: 512, height: 512 }) };
  const bypassed = sized(512, 512, 1, { mode: 4 });
  for (const origin of [upscaled, bypassed, { mode: 0 }, { mode: 0, subgraph: {} }]) {
    const node = fitNode(3);
    graphOf({ 1: node, 2: origin }, [[3, 2, 0]]);
    assert.deepEqual(questionOf(node), unknown);
  }
});

test("what is wired to a widget counts, and not what stands on it", () => {
  const node = fitNode();
  node.inputs.push({ name: "width", link: 5, widget: { name: "width" } });
  graphOf({ 1: node, 2: { mode: 0, widgets: [{ name: "value", value: 320 }] } }, [[5, 2, 0]]);
  assert.equal(questionOf(node).width, 320);
});

test("what a muted or bypassed node is wired to counts as in the prompt", () => {
  const ask = (origin, more = {}, links = []) => {
    const node = fitNode();
    node.inputs.push({ name: "width", type: "INT", link: 5, widget: { name: "width" } });
    node.inputs.push({ name: "vae", type: "VAE", link: 6 });
    graphOf({ 1: node, 2: origin, 7: origin, ...more }, [[5, 2, 0], [6, 7, 0], ...links]);
    const { width, has_vae: hasVae } = questionOf(node);
    return [width, hasVae];
  };
  const value = widgets({ value: 320 });
  assert.deepEqual(ask({ mode: 0, widgets: value }), [320, true]);
  for (const mode of [2, 4]) {
    assert.deepEqual(ask({ mode, widgets: value }), [SET.width, false], "its own widget");
    assert.deepEqual(ask({ type: "PrimitiveNode", mode, widgets: value }), [320, true]);
  }
  const source = { 3: { mode: 0, widgets: widgets({ value: 640 }) } };
  const wired = [{ type: "FLOAT", link: null }, { type: "INT", link: 8 }, { type: "VAE", link: 8 }];
  const through = (mode, more) => ask({ mode, inputs: wired, ...more }, source, [[8, 3, 0]]);
  assert.deepEqual(through(4), [640, true], "a bypassed node passes on what has the type");
  assert.deepEqual(through(2), [SET.width, false]);
  const any = { type: "Reroute", inputs: [{ type: "*", link: 8 }] };
  assert.deepEqual(through(0, any), [640, true]);
  assert.deepEqual(through(4, any), [640, true]);
  assert.deepEqual(through(2, any), [SET.width, false]);
});

test("a bypassed node passes its latent on, through a reroute too", () => {
  const node = fitNode(3);
  node.inputs[0].type = "LATENT";
  const upscale = { mode: 4, inputs: [{ type: "LATENT", link: 5 }], widgets: widgets({ width: 9 }) };
  const reroute = { type: "Reroute", inputs: [{ type: "*", link: 4 }] };
  const links = [[3, 2, 0], [4, 6, 0], [5, 7, 0]];
  graphOf({ 1: node, 2: reroute, 6: upscale, 7: sized(512, 640, 4) }, links);
  assert.deepEqual(questionOf(node), { ...OWN, width: 512, height: 640, batch_size: 4 });
});

test("a subgraph takes the latent and the sizes from outside, whatever its ids are", () => {
  for (const from of [-10, "-10"]) {
    const node = fitNode(3);
    const inside = graphOf({ 1: node }, [[3, from, 0]]);
    const outer = { inputs: [{ name: "latent", link: 7 }], subgraph: inside };
    graphOf({ 1: outer, 2: sized(512, 512, 1) }, [[7, 2, 0]]);
    assert.equal(questionOf(node, (graph) => (graph === inside ? outer : null)).width, 512);
  }

  const alone = fitNode();
  alone.inputs.push({ name: "width", link: 4, widget: { name: "width" } });
  const within = graphOf({ 1: alone }, [[4, -10, 0]]);
  const shown = { inputs: [{ name: "width", link: null }], widgets: widgets({ width: 384 }) };
  graphOf({ 1: { ...shown, subgraph: within } });
  assert.equal(questionOf(alone, () => shown).width, 384);
});

test("a prompt asks the same as the graph that it was made of", () => {
  const prompt = {
    4: { inputs: { width: 512, height: ["8", 0], batch_size: 4 } },
    8: { inputs: { value: 640 } },
    9: { inputs: { ...SET, latent: ["4", 0] } },
    10: { inputs: { ...SET, latent: ["8", 0] } },
    11: { inputs: SET },
    13: { inputs: { ...SET, vae: ["7", 0] } },
    14: { inputs: { ...SET, clip: ["7", 1] } },
  };
  const asked = { ...OWN, width: 512, height: 640, batch_size: 4 };
  const unknown = { ...OWN, width: null, height: null, batch_size: null };
  assert.deepEqual(questionInPrompt(prompt, "9"), asked);
  assert.deepEqual(questionInPrompt(prompt, "10"), unknown);
  assert.deepEqual(questionInPrompt(prompt, "11"), OWN);
  assert.deepEqual(questionInPrompt(prompt, "13"), { ...OWN, has_vae: true });
  assert.deepEqual(questionInPrompt(prompt, "14"), { ...OWN, has_clip: true });
  const decoded = fitNode();
  decoded.inputs.push({ name: "vae", link: 6 });
  graphOf({ 1: decoded, 7: { mode: 0 } }, [[6, 7, 0]]);
  assert.deepEqual(questionOf(decoded), { ...OWN, has_vae: true });
  assert.equal(questionInPrompt(prompt, "12"), null);
  assert.equal(questionInPrompt(null, "9"), null);
  const node = fitNode(3);
  graphOf({ 1: node, 2: sized(512, 640, 4) }, [[3, 2, 0]]);
  const told = [questionOf(node), questionInPrompt(prompt, "9")].map((asks) => JSON.stringify(asks));
  assert.equal(told[0], told[1], "compared as text");
});

const stage = (name, weights, activations, workspace, stock = activations) => {
  return { name, weights, activations, workspace, stock, peak: weights + activations + workspace };
};

test("the axis ends at the card, and without one at the larger of budget and peaks", () => {
  const stages = [stage("denoise", 4, 1, 1), stage("VAE decode", 1, 2, 1)];
  const ends = (budget_bytes, card_bytes) => barsOf({ stages, budget_bytes, card_bytes }).end;
  assert.deepEqual([ends(8, 24), ends(8, null), ends(2, null), ends(null, null)], [24, 8, 6, 6]);
  assert.equal(ends(30, 4), 30, "what is larger than the card is still drawn");
  const bars = barsOf({ stages, budget_bytes: 8, card_bytes: 16 });
  assert.deepEqual([bars.budget, bars.card], [50, 100]);
  assert.equal(barsOf({ stages, budget_bytes: null, card_bytes: null }).budget, null);
});

test("the parts of a bar add up to its peak, and stock never leaves the axis", () => {
  const stages = [stage("denoise", 4, 1, 1, 3), stage("VAE decode", 1, 2, 1, 50)];
  const bars = barsOf({ stages, budget_bytes: 8, card_bytes: null });
  const widths = bars.stages.map(({ parts }) => parts.reduce((sum, part) => sum + part.width, 0));
  assert.deepEqual(widths, [75, 50]);
  assert.deepEqual(bars.stages[0].stock, { left: 50, width: 37.5 });
  assert.deepEqual(bars.stages[1].stock, { left: 12.5, width: 87.5 });
  const same = barsOf({ stages: [stage("text encode", 1, 1, 1)], budget_bytes: 8 });
  assert.equal(same.stages[0].stock, null);
  assert.equal(highest(stages).name, "denoise");
});

const textsOf = (language) => {
  const file = new URL(`../../locales/${language}/main.json`, import.meta.url);
  const texts = JSON.parse(readFileSync(file, "utf8")).zImageFitToVram;
  return (name, ...values) => {
    assert.ok(name in texts, name);
    return texts[name].replace(/\$(\d)/g, (_, index) => values[index - 1]);
  };
};
const GIB = 2 ** 30;
const planOf = (changed = {}) => ({
  verdict: "fits",
  budget_bytes: 8 * GIB,
  named_bytes: 8 * GIB,
  missing_bytes: 0,
  larger_bytes: null,
  copy_seconds: 0.19,
  wait_seconds: 0,
  stages: [{ ...stage("denoise", 7 * GIB, GIB / 2, GIB / 2), streamed: 4.43 * GIB }],
  others: [],
  ...changed,
});
const headline = (changed, language = "en") => {
  const { verdict, streamed } = headlineOf(planOf(changed), textsOf(language));
  return [verdict, streamed].filter(Boolean).join(" ");
};
const still = [{ ...stage("denoise", GIB, GIB, 0), streamed: 0 }];

test("the headline says first whether it fits, then what is streamed", () => {
  const told = [
    [{}, "Fits in 8 GiB. 4.4 GiB of weights are streamed per step, about 0.2 s, while the card " +
      "computes."],
    [{ wait_seconds: 0.13 }, "Fits in 8 GiB. 4.4 GiB of weights are streamed per step, about " +
      "0.2 s; the card waits for up to 0.1 s of it."],
    [{ stages: still }, "Fits in 8 GiB. While sampling, all weights stay on the card."],
    [{ named_bytes: 0, budget_bytes: 5.25 * GIB, stages: still }, "Fits in the 5.25 GiB that the " +
      "card has free. While sampling, all weights stay on the card."],
    [{ verdict: "tight", missing_bytes: 2 ** 20 * 120, stages: still }, "Tight in 8 GiB: 120 MiB " +
      "short of the room for workspaces, so it may run out of memory. While sampling, all weights " +
      "stay on the card."],
    [{ verdict: "too large", budget_bytes: GIB, named_bytes: GIB, missing_bytes: 2 ** 20 * 120 },
      "Does not fit in 1 GiB: 120 MiB short."],
    [{ budget_bytes: null, named_bytes: 0 }, "No limit: the highest peak is 8.00 GiB, in Denoise. " +
      "Set budget_gib to plan for a card."],
    [{ copy_seconds: 0.002 }, "Fits in 8 GiB. 4.4 GiB of weights are streamed per step, about " +
      "0.01 s, while the card computes."],
  ];
  for (const [changed, sentence] of told) assert.equal(headline(changed), sentence);
  assert.match(headline({}, "zh"), /^8 GiB 放得下。 每步从内存传输 4.4 GiB 权重/);
});

test("a plan of a history that lacks the newer keys has a headline and no offer of a budget", () => {
  const { named_bytes, larger_bytes, copy_seconds, wait_seconds, ...old } = planOf();
  const { verdict, streamed } = headlineOf(old, textsOf("en"));
  assert.equal(`${verdict} ${streamed}`, "Fits in 8 GiB. 4.4 GiB of weights are streamed per step.");
  assert.deepEqual(offersOf(old), []);
});

const SMALLER = { differs_in: "size", width: 1024, height: 768, batch_size: 2 };
const FEWER = { differs_in: "batch", width: 2048, height: 2048, batch_size: 1 };
const offered = offersOf({ others: [FEWER, SMALLER, { differs_in: "fp8" }], larger_bytes: 6 * GIB });
const [fewer, smaller, fp8, larger] = offered;
const changed = (node, offer, outerOf = () => null) =>
  changesFor(node, offer, outerOf)?.map((one) => [one.node.id, one.widget.name, one.value]) ?? null;

test("what would fit changes the node's own widgets, or those of the latent's node", () => {
  const alone = fitNode();
  graphOf({ 1: alone });
  assert.deepEqual(changed(alone, smaller), [[1, "width", 1024], [1, "height", 768]]);
  assert.deepEqual(changed(alone, fewer), [[1, "batch_size", 1]]);
  assert.deepEqual(changed(alone, larger), [[1, "budget_gib", 6]]);
  const node = fitNode(3);
  graphOf({ 1: node, 2: sized(2048, 2048, 2) }, [[3, 2, 0]]);
  assert.deepEqual(changed(node, smaller), [[2, "width", 1024], [2, "height", 768]]);
  assert.deepEqual(changed(node, larger), [[1, "budget_gib", 6]]);
});

test("what no widget of the graph sets is left to the user", () => {
  const node = fitNode(3);
  graphOf({ 1: node, 2: { mode: 0, widgets: [] } }, [[3, 2, 0]]);
  assert.equal(changed(node, smaller), null);
  assert.equal(changed(node, fp8), null);
  const limited = fitNode();
  graphOf({ 1: limited });
  limited.widgets.find(({ name }) => name === "width").options = { min: 1088 };
  assert.equal(changed(limited, smaller), null);
  const square = fitNode();
  for (const [link, name] of [[5, "width"], [6, "height"]]) {
    square.inputs.push({ name, link, widget: { name } });
  }
  const one = { mode: 0, widgets: [{ name: "value", value: 2048 }] };
  graphOf({ 1: square, 2: one }, [[5, 2, 0], [6, 2, 0]]);
  assert.equal(changed(square, smaller), null, "one widget cannot be 1024 and 768");
  assert.deepEqual(changed(square, { kind: "size", values: { width: 512, height: 512 } }),
    [[2, "value", 512]]);
});
