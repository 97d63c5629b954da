/**
 * All layers of a run as coloured cells. The hue is the format's; its full colour rises from the foot of a cell by the share of
 * the error of round to nearest that is removed, and the rest of the cell is mixed with grey. Unquantized layers are hatched, pending ones a line at the bottom. One canvas;
 * each frame repaints changed cells only, in batches that keep frames short.
 */

import { element } from "./panel.js";
import { layout, removedShare } from "./progress_state.js";
import { say } from "./words.js";

// A contrast of at least 3:1 with every dark theme; the style sheet darkens them for light themes.
const COLOURS = {
  float8_e4m3fn: "#3d8fe0",
  float8_e4m3fn_rowwise: "#23a3a8",
  float8_e4m3fn_blockwise: "#6f7de8",
  float8_e5m2: "#a06be0",
  int8_tensorwise: "#d9822b",
  int8_blockwise: "#4fa04c",
};
const OTHER = "#c264a6"; // a format of a later release
const GREY = "#8c8c8c";
const HATCHES = { kept: "#a8a8a8", refused: "#f0706a" }; // brighter, because thin lines look darker
const FOOT = 0.25; // height of a pending layer, as a fraction of a cell
const PALE = 0.4; // opacity of a format's colour over grey, where the error of round to nearest remains
const CELLS_A_FRAME = 400;
const FINE = 2; // minimum canvas pixels per page pixel, because nodes are also viewed enlarged
const HATCH = 4; // side of the hatch's tile, in page pixels

/** CSS background of the legend entry of a kind of cells. */
export function background(kind) {
  const line = HATCHES[kind];
  if (line) return `repeating-linear-gradient(135deg, ${line} 0 1.6px, transparent 1.6px 3px)`;
  if (kind === "planned") return `linear-gradient(to top, ${GREY} ${100 * FOOT}%, transparent 0)`;
  return COLOURS[kind] ?? OTHER;
}

const STEPS = { ArrowLeft: () => -1, ArrowRight: () => 1, ArrowUp: (row) => -row, ArrowDown: (row) => row };

/**
 * The strip. Arrow keys, Home and End move through its layers; Enter, Space or a click selects one.
 *
 * onPoint(cell or null)  the layer under the pointer or at the keyboard position changed
 * onPick(cell)           a layer was selected
 * describe(cell)         description for screen readers
 */
export class LayerStrip {
  #cells = [];
  #painted = []; // cells as painted on the canvas
  #waiting = false; // whether a frame that paints more cells is requested
  #pointed = null; // index under the pointer
  #chosen = null; // index selected by keys or a click
  #size = [0, 0]; // as last observed: reading it would force a layout of the page
  #shape = layout(0, 1, 1);
  #hatches = {}; // patterns by colour

  constructor({ onPoint, onPick, describe }) {
    this.onPoint = onPoint;
    this.onPick = onPick;
    this.describe = describe;
    this.canvas = element("canvas", "lr-cells", [], { "aria-hidden": "true" });
    this.cursor = element("div", "lr-cursor", [], { hidden: "" });
    this.root = element("div", "lr-strip", [this.canvas, this.cursor], {
      tabindex: "0", role: "slider", "aria-label": say("strip"), "aria-valuemin": "1",
    });
    this.root.addEventListener("pointermove", ({ offsetX, offsetY }) => this.#point(this.#at(offsetX, offsetY)));
    this.root.addEventListener("pointerleave", () => this.#point(null));
    this.root.addEventListener("click", ({ offsetX, offsetY }) => {
      this.root.focus({ preventScroll: true }); // the canvas, which had it, would act on keys
      this.#choose(this.#at(offsetX, offsetY), true);
    });
    this.root.addEventListener("keydown", (event) => this.#press(event));
    this.root.addEventListener("focus", () => this.#chosen === null && this.root.matches(":focus-visible") && this.#choose(0));
    new ResizeObserver(([{ contentRect }]) => {
      this.#size = [contentRect.width, contentRect.height];
      this.#repaint();
    }).observe(this.root);
  }

  /** Show these cells; the array must not change later. */
  show(cells) {
    if (cells === this.#cells) return;
    const others = cells.length !== this.#cells.length;
    this.#cells = cells;
    this.root.hidden = cells.length === 0;
    this.root.setAttribute("aria-valuemax", cells.length);
    if (others) {
      this.#pointed = null;
      this.#chosen = null;
      this.#repaint();
    } else {
      this.#paint();
    }
    this.#mark();
  }

  /** Clear the selection. */
  release() {
    this.#chosen = null;
    this.#mark();
  }

  get #index() {
    return this.#pointed ?? this.#chosen;
  }

  #at(x, y) {
    const { columns, width, height } = this.#shape;
    const index = Math.floor(y / height) * columns + Math.min(columns - 1, Math.floor(x / width));
    return x >= 0 && y >= 0 && index < this.#cells.length ? index : null;
  }

  #point(index) {
    if (index === this.#pointed) return;
    this.#pointed = index;
    this.#mark();
  }

  #choose(index, picked = false) {
    if (index === null) return;
    this.#chosen = index;
    this.#mark();
    if (picked) this.onPick(this.#cells[index]);
  }

  #press(event) {
    const last = this.#cells.length - 1;
    const from = this.#chosen ?? 0;
    const ends = { Home: 0, End: last };
    if (event.key in STEPS) this.#choose(Math.min(last, Math.max(0, from + STEPS[event.key](this.#shape.columns))));
    else if (event.key in ends) this.#choose(ends[event.key]);
    else if (event.key === "Enter" || event.key === " ") this.#choose(from, true);
    else if (event.key === "Escape" && this.#chosen !== null) this.release();
    else return;
    event.preventDefault();
    event.stopPropagation(); // ComfyUI binds some of these keys
  }

  /** Move the frame and the description to the cell under the pointer or at the keyboard position. */
  #mark() {
    const index = this.#index;
    const cell = this.#cells[index] ?? null;
    this.cursor.hidden = !cell;
    if (cell) {
      const { columns, width, height } = this.#shape;
      Object.assign(this.cursor.style, {
        left: `${(index % columns) * width}px`, top: `${Math.floor(index / columns) * height}px`, width: `${width}px`, height: `${height}px`,
      });
    }
    this.root.setAttribute("aria-valuenow", (index ?? 0) + 1);
    this.root.setAttribute("aria-valuetext", cell ? this.describe(cell) : say("noLayer"));
    this.onPoint(cell);
  }

  #repaint() {
    const [width, height] = this.#size;
    if (!width || !height) return;
    const fine = Math.max(FINE, window.devicePixelRatio);
    [this.canvas.width, this.canvas.height] = [width, height].map((side) => Math.round(side * fine));
    this.#shape = layout(this.#cells.length, width, height);
    this.#painted = [];
    this.#paint();
    this.#mark();
  }

  #paint() {
    const { columns, width, height } = this.#shape;
    const context = this.canvas.getContext("2d");
    const fine = Math.max(FINE, window.devicePixelRatio);
    context.setTransform(fine, 0, 0, fine, 0, 0);
    const [wide, high] = [width, height].map((side) => side - (side > 3 ? 1 : side / 4)); // with space between cells
    let left = CELLS_A_FRAME;
    for (let index = 0; index < this.#cells.length; index += 1) {
      const cell = this.#cells[index];
      if (this.#painted[index] === cell) continue;
      if (left === 0) return this.#paintMore();
      left -= 1;
      const [x, y] = [(index % columns) * width, Math.floor(index / columns) * height];
      context.clearRect(x, y, width, height);
      this.#fill(context, cell, x, y, wide, high);
      this.#painted[index] = cell;
    }
  }

  #paintMore() {
    if (this.#waiting) return;
    this.#waiting = true;
    requestAnimationFrame(() => {
      this.#waiting = false;
      this.#paint();
    });
  }

  #fill(context, cell, x, y, width, height) {
    const line = HATCHES[cell.state];
    context.fillStyle = line ? this.#hatch(context, line) : GREY;
    if (cell.state === "planned") context.fillRect(x, y + height * (1 - FOOT), width, height * FOOT);
    else context.fillRect(x, y, width, height);
    if (cell.state !== "quantized") return;
    context.fillStyle = background(cell.format);
    const removed = Math.round(height * removedShare(cell));
    context.globalAlpha = PALE;
    context.fillRect(x, y, width, height - removed);
    context.globalAlpha = 1;
    context.fillRect(x, y + height - removed, width, removed);
  }

  #hatch(context, colour) {
    return (this.#hatches[colour] ??= hatch(context, colour));
  }
}

/** Create a pattern of diagonal lines that meet at the edges of its tile. */
function hatch(context, colour) {
  const tile = new OffscreenCanvas(HATCH, HATCH);
  const lines = tile.getContext("2d");
  lines.strokeStyle = colour;
  lines.lineWidth = 1.8;
  for (const shift of [-HATCH, 0, HATCH]) {
    lines.moveTo(shift, HATCH);
    lines.lineTo(shift + HATCH, 0);
  }
  lines.stroke();
  return context.createPattern(tile, "repeat");
}
