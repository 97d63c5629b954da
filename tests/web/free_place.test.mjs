// Run by plain node (`node --test tests/web`), and by pytest through test_progress_state.py.

import assert from "node:assert/strict";
import { test } from "node:test";

import { freePlace } from "../../web/free_place.js";

const [SIZE, GAP] = [[100, 50], 10];
const place = (...obstacles) => freePlace([0, 0], SIZE, obstacles, GAP);

test("free room is taken where it is", () => {
  assert.deepEqual(place(), [0, 0]);
  assert.deepEqual(place([-60, 0, 50, 50], [0, 60, 100, 50]), [0, 0]);
});

test("the nearer of below and to the right", () => {
  assert.deepEqual(place([0, 0, 300, 50]), [0, 60]);
  assert.deepEqual(place([0, 0, 50, 300]), [60, 0]);
});

test("obstacles behind each other are passed", () => {
  assert.deepEqual(place([0, 0, 500, 50], [0, 80, 500, 50]), [0, 140]);
});
