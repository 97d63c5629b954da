/** The text that a node puts out (`ui.text`), shown on the node. ComfyUI shows it for its own nodes only. */

import { addPanel, bringIntoView, element, setText } from "./panel.js";

export const TEXT_WIDGET = "learned_rounding_text";

/** Panels by node; ComfyUI drops nodes without telling, so they are held weakly. */
const panels = new WeakMap();

const LINE = 16;

/** Give a node its text, with room for `lines` of it; `placeholder` stands there until it has run. */
export function addTextWidget(node, placeholder, { lines = 4, width = 320 } = {}) {
  const root = element("div", "lr-panel lr-text", [placeholder], { role: "status" });
  root.dataset.state = "idle";
  addPanel(node, TEXT_WIDGET, root, { height: (lines + 1) * LINE, width });
  panels.set(node, root);
}

/** Show these lines on a node; others than ours have no place for them. */
export function showText(node, lines) {
  const root = panels.get(node);
  if (!root) return;
  const text = lines.join("\n");
  setText(root, text, text);
  root.dataset.state = "done";
  bringIntoView(node, root);
}
