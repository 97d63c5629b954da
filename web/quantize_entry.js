/** The menu entry "Quantize this model": insert the nodes that quantize and save what a node outputs. */

import { app } from "../../scripts/app.js";
import { freePlace } from "./free_place.js";
import { say } from "./words.js";

const COMMAND = "LearnedRounding.QuantizeThis";
const TYPES = ["MODEL", "CLIP"]; // in the order of preference, for nodes that output both
const QUANTIZED = ["LearnedRoundingQuantize", "LearnedRoundingLoadQuantized"]; // output quantized models
const [GAP, TITLE] = [60, 30]; // canvas units
const [STABLE, LONGEST] = [10, 60]; // frames

// New nodes: their places from the upper left corner, and their widths.
const NODES = {
  LearnedRoundingConfigure: { at: [0, 0], width: 400 },
  LearnedRoundingQuantize: { at: [400 + GAP, 0], width: 460 },
  LearnedRoundingSave: { at: [400 + GAP, 440 + GAP + TITLE], width: 460 },
};
// [node, output, node, input]
const LINKS = [
  ["LearnedRoundingConfigure", "recipe", "LearnedRoundingQuantize", "recipe"],
  ["LearnedRoundingQuantize", "quantized", "LearnedRoundingSave", "quantized"],
];
const AREA = [860 + GAP, 800 + TITLE];

/** Slot of the output to quantize; -1 if the node has none. */
function quantizableOutput(node) {
  const outputs = QUANTIZED.includes(node.comfyClass) ? [] : (node.outputs ?? []);
  return TYPES.map((type) => outputs.findIndex((output) => output.type === type)).find((slot) => slot >= 0) ?? -1;
}

const slotOf = (slots, name) => slots.findIndex((slot) => slot.name === name);

const boxOf = ({ pos, size }) => [pos[0], pos[1] - TITLE, size[0], size[1] + TITLE];

/** The smallest box around two. */
function union(one, other) {
  const low = [0, 1].map((axis) => Math.min(one[axis], other[axis]));
  const high = [0, 1].map((axis) => Math.max(one[axis] + one[axis + 2], other[axis] + other[axis + 2]));
  return [...low, high[0] - low[0], high[1] - low[1]];
}

/** [x, y, width, height] of everything on the canvas that new nodes must not cover: nodes, and groups without `node`. */
function obstacles(node) {
  const { nodes, groups } = node.graph;
  const contains = ([x, y, width, height]) =>
    node.pos[0] >= x && node.pos[0] < x + width && node.pos[1] >= y && node.pos[1] < y + height;
  return [...nodes.map(boxOf), ...groups.map((group) => [...group.boundingRect]).filter((box) => !contains(box))];
}

/** Insert the nodes beside `node`, connected to its output, as one step of undo. */
async function insertQuantization(node) {
  const { canvas } = app;
  const start = [node.pos[0] + node.size[0] + GAP, node.pos[1] - TITLE];
  const [x, y] = freePlace(start, AREA, obstacles(node), GAP);
  canvas.emitBeforeChange();
  try {
    const made = {};
    for (const [type, { at, width }] of Object.entries(NODES)) {
      made[type] = LiteGraph.createNode(type);
      made[type].pos = [x + at[0], y + TITLE + at[1]];
      node.graph.add(made[type]);
      made[type].setSize([Math.max(width, made[type].size[0]), made[type].size[1]]);
    }
    const quantize = made.LearnedRoundingQuantize;
    node.connect(quantizableOutput(node), quantize, slotOf(quantize.inputs, "source"));
    for (const [from, output, to, input] of LINKS) {
      made[from].connect(slotOf(made[from].outputs, output), made[to], slotOf(made[to].inputs, input));
    }
    canvas.selectItems(Object.values(made));
    showArea(union(boxOf(node), [x, y, ...AREA]));
    await settle(Object.values(made));
  } finally {
    canvas.emitAfterChange();
  }
}

/** Wait until the sizes of new nodes no longer change: Vue measures them after it has drawn them. */
async function settle(nodes) {
  let before = "";
  for (let frame = 0, stable = 0; frame < LONGEST && stable < STABLE; frame++) {
    await new Promise(requestAnimationFrame);
    const now = nodes.map(({ size }) => [...size]).join();
    stable = now === before ? stable + 1 : 0;
    before = now;
  }
}

/** Move the view to an area unless the view contains it. Not animated: Vue nodes are measured meanwhile, at the wrong place. */
function showArea(area) {
  const { canvas } = app;
  const [x, y, width, height] = area;
  const [left, top, wide, high] = canvas.visible_area;
  const isInView = x >= left && y >= top && x + width <= left + wide && y + height <= top + high;
  if (isInView) return;
  canvas.ds.fitToBounds(area, { zoom: 0.8 });
  canvas.setDirty(true, true);
}

const entryLabel = () => say("quantizeThis");

/** Parts of the extension: the entry of the menu of nodes, and a button of the toolbox where Vue nodes have a menu of their own. */
export const QUANTIZE_ENTRY = {
  getNodeMenuItems: (node) =>
    quantizableOutput(node) < 0 ? [] : [null, { content: entryLabel(), callback: () => insertQuantization(node) }],

  commands: [
    {
      id: COMMAND,
      label: entryLabel,
      icon: "pi pi-box",
      function() {
        const [node] = Object.values(app.canvas.selected_nodes);
        if (node && quantizableOutput(node) >= 0) insertQuantization(node);
      },
    },
  ],

  getSelectionToolboxCommands: (node) =>
    LiteGraph.vueNodesMode && node.outputs && quantizableOutput(node) >= 0 ? [COMMAND] : [],
};
