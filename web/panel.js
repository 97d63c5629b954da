/** What our DOM widgets share: building elements, and putting them on a node in either kind of nodes. */

import { app } from "../../scripts/app.js";

const MARGIN = 10; // ComfyUI's own around DOM widgets on the canvas; their height includes it

/** An element with children (nodes or text) and attributes. */
export function element(tag, className, children = [], attributes = {}) {
  const made = document.createElement(tag);
  made.className = className;
  made.append(...children);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

/** Change text and title only if they differ: unchanged text costs no layout and is not read aloud again. */
export function setText(target, text, title = "") {
  if (target.textContent !== text) target.textContent = text;
  if (target.title !== title) target.title = title;
}

/**
 * Put a read-only element on a node.
 *
 * height, width  what it needs, in canvas units
 * fixed          whether it gains nothing from more height than that
 */
export function addPanel(node, name, root, { height, width, fixed = false }) {
  root.style.minHeight = `${height}px`; // nodes drawn by Vue measure the element and ask for nothing
  const widget = node.addDOMWidget(name, name.toUpperCase(), root, {
    serialize: false, // not a value of the prompt
    hideOnZoom: false,
    getMinHeight: () => height + 2 * MARGIN,
    ...(fixed && { getMaxHeight: () => height + 2 * MARGIN }),
  });
  widget.serialize = false; // nor of the saved workflow
  const [needed, tall] = node.computeSize();
  node.setSize([Math.max(node.size[0], needed, width), Math.max(node.size[1], tall)]);
  root.addEventListener("wheel", zoomCanvas, { passive: false });
  return widget;
}

/**
 * Where a workflow is loaded anew over the same nodes, as undo does, nodes drawn by Vue go on showing the elements of the
 * nodes before; put the element of this one in its predecessor's place.
 */
export function bringIntoView(node, root) {
  if (root.isConnected || node.graph !== app.canvas.graph) return;
  document.querySelector(`[data-node-id="${node.id}"] .${root.classList[1]}`)?.replaceWith(root);
}

/** Whether a panel of the node has nothing to show yet. */
export function isBlank(node) {
  return node.widgets?.some(({ element }) => element?.matches?.(".lr-panel[data-state=idle]")) ?? false;
}

// Nodes drawn by Vue hand the wheel on themselves; over a widget on the canvas it would do nothing.
function zoomCanvas(event) {
  if (!event.currentTarget.closest("[data-node-id]")) app.canvas.processMouseWheel(event);
}
