// Run by plain node (`node --test tests/web`), and by pytest through test_progress_state.py.

import assert from "node:assert/strict";
import { test } from "node:test";

import { nodeByExecutionId, originOf } from "../../web/graph_lookup.js";

// A graph of {id: node}, whose nodes have inputs [{link}] and links {id: {origin_id, origin_slot}}.
const graphOf = (nodes, links = {}) => {
  const graph = { nodes: Object.values(nodes), getNodeById: (id) => nodes[id] ?? null, getLink: (id) => links[id] };
  for (const node of graph.nodes) node.graph = graph;
  return graph;
};

test("an origin is found through reroutes and the edges of subgraphs", () => {
  const quantize = { inputs: [{ link: null }, { link: 1 }] };
  const inner = graphOf({ 3: quantize }, { 1: { origin_id: "-10", origin_slot: 1 } });
  const recipe = {};
  const made = graphOf({ 8: recipe }, { 5: { origin_id: 8, origin_slot: 0 } });
  made.outputs = [{ linkIds: [5] }];
  const maker = { subgraph: made, inputs: [] };
  const reroute = { isVirtualNode: true, inputs: [{ link: 2 }] };
  const outer = { subgraph: inner, inputs: [{ link: null }, { link: 3 }] };
  const root = graphOf({ 1: maker, 2: reroute, 4: outer }, { 2: { origin_id: 1, origin_slot: 0 }, 3: { origin_id: 2, origin_slot: 0 } });
  assert.equal(originOf(root, quantize, 1), recipe);
  assert.equal(originOf(root, quantize, 0), null);
  assert.equal(originOf(graphOf({}), quantize, 1), null);
});

test("nodes are found by execution id, in subgraphs too", () => {
  const graph = (nodes) => ({ getNodeById: (id) => nodes[id] });
  const inner = { id: 3 };
  const root = graph({ 7: { id: 7 }, 12: { id: 12, subgraph: graph({ 5: { id: 5, subgraph: graph({ 3: inner }) }, 3: { id: 3 } }) } });
  assert.equal(nodeByExecutionId(root, "7").id, 7);
  assert.equal(nodeByExecutionId(root, 7).id, 7);
  assert.equal(nodeByExecutionId(root, "12:5:3"), inner);
  for (const missing of ["8", "8:3", "7:3", "12:4", "12:3:1"]) assert.equal(nodeByExecutionId(root, missing), null);
});
