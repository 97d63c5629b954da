// Run by plain node (`node --test tests/web`), and by pytest through test_progress_state.py.

import assert from "node:assert/strict";
import { test } from "node:test";

import { matters } from "../../web/dependent_options.js";

const given = (values) => (name) => values[name];

test("one condition is enough, and all of its parts must hold", () => {
  const conditions = [{ format: ["a"], size: ["x", "y"] }, { format: ["b"] }];
  assert.equal(matters(conditions, given({ format: "a", size: "x" })), true);
  assert.equal(matters(conditions, given({ format: "a", size: "z" })), false);
  assert.equal(matters(conditions, given({ format: "b", size: "z" })), true);
  assert.equal(matters(conditions, given({ format: "c", size: "x" })), false);
});

test("all values but some, and 0 is not false", () => {
  const conditions = [{ steps: { not: [-1, false, "auto"] } }];
  assert.equal(matters(conditions, given({ steps: -1 })), false);
  assert.equal(matters(conditions, given({ steps: "auto" })), false);
  assert.equal(matters(conditions, given({ steps: 0 })), true);
});

test("what another node decides may be anything", () => {
  assert.equal(matters([{ format: ["a"] }], given({})), true);
  assert.equal(matters([{ format: ["a"], size: ["x"] }], given({ size: "z" })), false);
});
