/** The progress panel: bar, current layer, time left, strip of all layers, worst layers, summary. */

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { originOf } from "./graph_lookup.js";
import { LayerStrip, background } from "./layer_strip.js";
import { addPanel, bringIntoView, element, setText } from "./panel.js";
import { formatNumber } from "./numbers.js";
import { addPreview } from "./preview.js";
import { IDLE, WORST, advance, endLost, follows, isMeasured, percent, replay, summarised, worstError } from "./progress_state.js";
import { cellLines, keepRule, labelWords, legend, shortName, splitName, words } from "./progress_text.js";
import { say, translate } from "./words.js";

export const PROGRESS_WIDGET = "learned_rounding_progress";

// Space for all parts, so that the node keeps its size when a run starts.
const SIZES = { quantize: { height: 268, width: 360 }, calibrate: { height: 120, width: 340 } };
const KEYS_OF_NODES = new Set(["Delete", "Backspace"]); // ComfyUI would remove the node
const CONFIGURE = "LearnedRoundingConfigure";

/** Panels by node, as weak references: ComfyUI does not report removed nodes. */
const panels = new WeakMap();

/** Panels that show a running prompt. */
const running = new Set();

/** Attach a panel to a node; `task` is a key of the sizes. */
export function addProgressWidget(node, task) {
  const panel = new ProgressPanel(node);
  panels.set(node, panel);
  addPanel(node, PROGRESS_WIDGET, panel.root, { ...SIZES[task], fixed: true });
  if (task === "quantize") addPreview(node, (rows) => panel.preview(rows));
}

/** Pass a message to a node's panel; returns false if an earlier one is missing. Nodes without a panel return true. */
export function showProgress(node, event) {
  return panels.get(node)?.receive(event) ?? true;
}

/** Pass all messages of the latest run to a node's panel. */
export function showRun(node, run) {
  panels.get(node)?.replay(run);
}

/** Show that runs have ended with a restarted server, which stores none of these panels' prompts: `stored`. */
export function endLostRuns(stored) {
  for (const panel of [...running]) panel.endUnless(stored);
}

/**
 * Pass the end of a run to a node's panel, again or without its other messages: {state: "done" or "calibrated", …} of each part.
 * Returns whether the panel knows the run's layers, or needs none.
 */
export function showSummary(node, summaries) {
  return panels.get(node)?.summarise(summaries) ?? true;
}

class ProgressPanel {
  #node;
  #state = IDLE;
  #scheduled = false;
  #shown = null; // cells of the current legend
  #cancelled = null; // prompt whose cancellation was requested
  #rule = null;

  constructor(node) {
    this.#node = node;
    this.label = element("span", "lr-label");
    this.count = element("span", "lr-count");
    this.fill = element("div", "lr-fill");
    this.bar = element("div", "lr-bar", [this.fill], {
      role: "progressbar", "aria-label": say("progress"), "aria-valuemin": "0", "aria-valuemax": "100",
    });
    this.first = element("div", "lr-first", [], { role: "status" });
    this.plan = element("dl", "lr-preview");
    this.layer = nameElement("lr-layer");
    this.second = element("div", "lr-second");
    this.strip = new LayerStrip({
      onPoint: (cell) => this.#tell(cell),
      onPick: (cell) => this.#pick(cell),
      describe: (cell) => [shortName(cell.name), ...cellLines(cell, this.#state.rounding)].join(", "),
    });
    this.legend = element("div", "lr-legend");
    this.rows = Array.from({ length: WORST }, () => {
      const name = nameElement("lr-name");
      const error = element("span", "lr-error");
      return { row: element("li", "lr-row", [name.root, error]), name, error };
    });
    this.heading = element("div", "lr-heading");
    this.worst = element("div", "lr-worst", [
      this.heading,
      element("ol", "lr-list", this.rows.map(({ row }) => row)),
    ]);
    this.cardName = nameElement("lr-card-name");
    this.cardLines = Array.from({ length: 3 }, () => element("div", "lr-card-line"));
    this.card = element("div", "lr-card", [this.cardName.root, ...this.cardLines], { hidden: "" });
    this.notice = element("span", "lr-notice", [], { role: "status" });
    this.keep = button(say("addToKeep"), say("addToKeepTip"), () => this.#keep());
    this.cancel = button(say("cancel"), say("cancelTip"), () => this.#cancel());
    this.root = element("div", "lr-panel lr-progress", [
      element("div", "lr-head", [this.label, this.count]),
      this.bar, this.plan, this.first, this.layer.root, this.second, this.strip.root, this.legend,
      element("div", "lr-detail", [this.worst, this.card]),
      element("div", "lr-foot", [this.notice, this.keep, this.cancel]),
    ]);
    // On nodes drawn by Vue the event would start a drag.
    for (const target of [this.strip.root, this.keep, this.cancel]) target.addEventListener("pointerdown", (event) => event.stopPropagation());
    this.root.addEventListener("keydown", (event) => KEYS_OF_NODES.has(event.key) && event.stopPropagation());
    this.root.addEventListener("focusout", ({ relatedTarget }) => this.root.contains(relatedTarget) || this.strip.release());
    this.#draw();
  }

  /** Show what a run will do: rows [label, text], or one sentence; it is visible until the first run. */
  preview(rows) {
    const texts = typeof rows === "string" ? [element("dd", "lr-preview-error", [rows])] : rows.flatMap(([label, text]) => [element("dt", "", [label]), element("dd", "", [text], { title: text })]);
    this.plan.replaceChildren(...texts);
  }

  receive(event) {
    const complete = follows(this.#state, event);
    this.#become(advance(this.#state, event));
    return complete;
  }

  replay(run) {
    this.#become(replay(this.#state, run));
  }

  summarise(summaries) {
    this.#become(summarised(this.#state, summaries));
    return this.#state.cells.length > 0 || Boolean(this.#state.calibrated);
  }

  /** End the run if its prompt is not among these. */
  endUnless(stored) {
    if (!stored.has(this.#state.prompt)) this.#become(endLost(this.#state));
  }

  #become(state) {
    if (state.prompt !== this.#state.prompt) this.#setRule(null);
    this.#state = state;
    if (state.phase === "running") running.add(this);
    else running.delete(this);
    if (this.#scheduled) return; // many small layers may finish between two frames
    this.#scheduled = true;
    requestAnimationFrame(() => {
      this.#scheduled = false;
      this.#draw();
    });
  }

  #draw() {
    bringIntoView(this.#node, this.root);
    const state = this.#state;
    const share = percent(state);
    const [first, second, detail] = words(state);
    this.root.dataset.state = state.phase;
    const failed = state.phase === "stopped" && !state.interrupted;
    this.root.classList.toggle("lr-failed", failed);
    setText(this.label, labelWords(state), [labelWords(state), state.source].filter(Boolean).join("\n"));
    setText(this.count, [failed && say("failed"), state.total && `${share} % · ${state.finished} / ${state.total}`].filter(Boolean).join(" · "));
    this.fill.style.width = `${share}%`;
    this.bar.setAttribute("aria-valuenow", share);
    setText(this.first, first, detail ?? first);
    this.layer.show(state.phase === "running" ? (state.layer ?? "") : "");
    setText(this.second, second, second);
    this.strip.show(state.cells);
    this.#drawLegend();
    this.#drawWorst();
    this.#drawFoot();
  }

  #drawLegend() {
    const { cells } = this.#state;
    if (cells === this.#shown) return;
    this.#shown = cells;
    const entries = legend(cells);
    entries.forEach(({ kind, label, count }, place) => {
      const entry = this.legend.children[place] ?? this.legend.appendChild(element("span", "lr-entry", [element("i", "lr-swatch"), ""]));
      const [swatch, text] = entry.childNodes;
      if (swatch.dataset.kind !== kind) {
        swatch.dataset.kind = kind;
        swatch.style.background = background(kind);
      }
      const shown = `${label}: ${count}`;
      if (text.data !== shown) text.data = shown;
    });
    while (this.legend.children.length > entries.length) this.legend.lastChild.remove();
    this.legend.title = [...entries.map(({ label, count }) => `${label}: ${count}`), ...this.#refused(), say("shades")].join("\n");
  }

  #refused() {
    return (this.#state.kept ?? []).map(({ name, reason }) => `${name}: ${translate(reason)}`);
  }

  #drawWorst() {
    const worst = this.#state.worst ?? [];
    this.worst.hidden = !worst.length || !this.card.hidden;
    const heading = worst.some(isMeasured) ? "largestOutputErrors" : "largestWeightErrors";
    setText(this.heading, say(heading), say(`${heading}Tip`));
    this.rows.forEach(({ row, name, error }, place) => {
      const layer = worst[place];
      row.hidden = !layer;
      if (!layer) return;
      name.show(layer.name);
      setText(error, formatNumber(worstError(layer)));
    });
  }

  #drawFoot() {
    const running = this.#state.phase === "running";
    this.cancel.hidden = !running;
    this.cancel.disabled = this.#cancelled !== null && this.#cancelled === this.#state.prompt;
    setText(this.cancel, say(this.cancel.disabled ? "cancelling" : "cancel"), this.cancel.title);
    this.keep.hidden = this.#rule === null || !configureOf(this.#node);
    const { cells } = this.#state;
    const warnings = (this.#state.warnings ?? []).map(translate);
    this.notice.classList.toggle("lr-warning", this.#rule === null && warnings.length > 0);
    if (this.#rule === null) setText(this.notice, warnings.join(" ") || (cells.length ? say("hint") : ""), warnings.join("\n"));
  }

  /** Show the card of a layer in place of the worst layers, or these again. */
  #tell(cell) {
    this.card.hidden = !cell;
    if (cell) {
      this.cardName.show(cell.name);
      const lines = cellLines(cell, this.#state.rounding);
      this.cardLines.forEach((line, place) => setText(line, lines[place] ?? "", lines[place]));
    }
    this.#drawWorst();
  }

  async #pick({ name }) {
    const rule = keepRule(name);
    this.#setRule(rule);
    try {
      await navigator.clipboard.writeText(rule);
      setText(this.notice, say("copied", { rule }), rule);
    } catch {
      setText(this.notice, rule, say("notCopied", { rule }));
    }
  }

  #setRule(rule) {
    this.#rule = rule;
    this.#drawFoot();
  }

  /** Append the pattern to the keep list of Configure Quantization. */
  #keep() {
    const configure = configureOf(this.#node);
    const list = configure?.widgets.find(({ name }) => name === "keep");
    if (!list) return;
    const lines = list.value.split("\n").filter((line) => line.trim());
    const known = lines.includes(this.#rule);
    if (!known) {
      list.value = [...lines, this.#rule].join("\n");
      list.callback?.(list.value);
      configure.setDirtyCanvas(true, true);
      noteStep();
    }
    setText(this.notice, say(known ? "known" : "added", { node: configure.title }), this.#rule);
  }

  async #cancel() {
    this.#cancelled = this.#state.prompt;
    this.#drawFoot();
    try {
      await api.interrupt(this.#state.prompt);
    } catch {
      this.#cancelled = null; // the server does not answer
      this.#drawFoot();
    }
  }
}

function button(text, title, onClick) {
  const made = element("button", "lr-button", [text], { type: "button", title, hidden: "" });
  made.addEventListener("click", onClick);
  return made;
}

/** Record a change as one step of undo; newer frontends renamed the method. */
function noteStep() {
  const tracker = app.extensionManager.workflow.activeWorkflow?.changeTracker;
  (tracker?.captureCanvasState ?? tracker?.checkState)?.call(tracker);
}

/** The Configure Quantization node connected to a node's recipe, if its keep list is not connected itself. */
function configureOf(node) {
  const slot = node.inputs?.findIndex(({ name }) => name === "recipe") ?? -1;
  const origin = slot < 0 ? null : originOf(app.rootGraph, node, slot);
  const isGiven = origin?.inputs?.some(({ name, link }) => name === "keep" && link != null);
  return origin?.comfyClass === CONFIGURE && !isGiven ? origin : null;
}

/** A layer name whose middle is shortened in a narrow space, with the whole name as title. */
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
