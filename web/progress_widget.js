/** The progress panel on Learned Round Quantize: bar, current layer, time left, the worst layers, the summary. */

import { addPanel, element, setText } from "./panel.js";
import { IDLE, WORST, advance, formatError, percent, shortName, splitName, words } from "./progress_state.js";

export const PROGRESS_WIDGET = "learned_rounding_progress";

const HEIGHT = 192; // everything at once; fixed, so that the node does not jump when a run starts
const WIDTH = 340;

/** Panels by node; ComfyUI drops nodes without telling, so they are held weakly. */
const panels = new WeakMap();

/** Give a node its panel. */
export function addProgressWidget(node) {
  const panel = new ProgressPanel();
  panels.set(node, panel);
  addPanel(node, PROGRESS_WIDGET, panel.root, { height: HEIGHT, width: WIDTH, fixed: true });
}

/** Tell a node's panel of an event; nodes without one are ignored. */
export function showProgress(node, event, execution) {
  panels.get(node)?.receive(event, execution);
}

class ProgressPanel {
  #state = IDLE;
  #scheduled = false;

  constructor() {
    this.label = element("span", "lr-label");
    this.count = element("span", "lr-count");
    this.fill = element("div", "lr-fill");
    this.bar = element("div", "lr-bar", [this.fill], {
      role: "progressbar", "aria-label": "Quantization progress", "aria-valuemin": "0", "aria-valuemax": "100",
    });
    this.first = element("div", "lr-first", [], { role: "status" });
    this.layer = nameElement("lr-layer");
    this.second = element("div", "lr-second");
    this.rows = Array.from({ length: WORST }, () => {
      const name = nameElement("lr-name");
      const error = element("span", "lr-error");
      return { row: element("li", "lr-row", [name.root, error]), name, error };
    });
    this.worst = element("div", "lr-worst", [
      element("div", "lr-heading", ["Largest weight errors"], { title: "‖Ŵ − W‖ / ‖W‖ of a layer" }),
      element("ol", "lr-list", this.rows.map(({ row }) => row)),
    ]);
    this.root = element("div", "lr-panel lr-progress", [
      element("div", "lr-head", [this.label, this.count]),
      this.bar, this.first, this.layer.root, this.second, this.worst,
    ]);
    this.#draw();
  }

  receive(event, execution) {
    this.#state = advance(this.#state, event, execution);
    if (this.#scheduled) return; // many small layers may finish between two frames
    this.#scheduled = true;
    requestAnimationFrame(() => {
      this.#scheduled = false;
      this.#draw();
    });
  }

  #draw() {
    const state = this.#state;
    const share = percent(state);
    const [first, second, detail] = words(state);
    this.root.dataset.state = state.phase;
    this.root.classList.toggle("lr-failed", state.phase === "stopped" && !state.interrupted);
    setText(this.label, state.label ?? "", state.source);
    setText(this.count, state.total ? `${share} % · ${state.finished} / ${state.total}` : "");
    this.fill.style.width = `${share}%`;
    this.bar.setAttribute("aria-valuenow", share);
    setText(this.first, first, detail ?? first);
    this.layer.show(state.phase === "running" ? (state.layer ?? "") : "");
    setText(this.second, second, state.kept?.map(({ name, reason }) => `${name}: ${reason}`).join("\n"));
    this.worst.hidden = !state.worst?.length;
    this.rows.forEach(({ row, name, error }, place) => {
      const layer = state.worst?.[place];
      row.hidden = !layer;
      if (!layer) return;
      name.show(layer.name);
      setText(error, formatError(layer.error));
    });
  }
}

/** A layer name that gives up its middle when there is no room, with the whole name as title. */
function nameElement(className) {
  const head = element("span", "lr-name-head");
  const tail = element("span", "lr-name-tail");
  const root = element("span", className, [head, tail]);
  root.hidden = true;
  return {
    root,
    show(name) {
      if (root.title === name) return;
      root.title = name;
      root.hidden = !name;
      [head.textContent, tail.textContent] = splitName(shortName(name));
    },
  };
}
