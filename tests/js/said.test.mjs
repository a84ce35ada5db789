// Texts of the server in the page's language; run by tests/test_js.py.

import assert from "node:assert/strict";
import test from "node:test";

import { said } from "../../js/shared/said.js";

const CHINESE = { allocator: "torch 的 $1 分配器", both: "$2：$1，以及页" };
const text = (name, ...values) => CHINESE[name].replace(/\$(\d)/g, (_, i) => values[i - 1]);

test("a text is said by its key, and so are texts among its values", () => {
  const words = { "it counts": ["both", ["allocator", "cuda"], "3"] };
  assert.equal(said("it counts", words, text), "3：torch 的 cuda 分配器，以及页");
});

test("a text without words stays as it came", () => {
  for (const words of [undefined, {}, { other: ["allocator", "cuda"] }]) {
    assert.equal(said("constructor", words, text), "constructor");
  }
});
