/** Nodes of options are as high as their content, and no node drawn by Vue has an empty half. */

const LINE = 14; // of ComfyUI's text boxes
const FRAME = 30; // margins of a DOM widget on the canvas, and the padding of the box
const OPEN = 4; // lines of a box that is edited
const MOST = 8;
const SLACK = 8; // empty space of a node drawn by Vue that is left as it is

/** Make a node's text boxes as high as their text, and the node as high as its widgets, now and after every change. */
export function fitToContent(node) {
  const boxes = node.widgets?.filter(({ element }) => element instanceof HTMLTextAreaElement) ?? [];
  for (const { element, options } of boxes) {
    const height = () => {
      const lines = Math.max(element.value.split("\n").length, document.activeElement === element ? OPEN : 1);
      return Math.min(lines, MOST) * LINE + FRAME;
    };
    Object.assign(options, { getMinHeight: height, getMaxHeight: height });
    for (const event of ["focus", "blur", "input"]) element.addEventListener(event, () => fitHeight(node));
  }
  whenPlaced(node, (saved) => fitHeight(node, saved));
}

/** Remove the empty space of a node that is drawn by Vue; its size on the canvas stays. */
export function fitInVue(node) {
  whenPlaced(node, () => LiteGraph.vueNodesMode && fitHeight(node));
}

/** Call a function for a new node, and again, with true, when a workflow has set its size. */
function whenPlaced(node, work) {
  const { onConfigure } = node;
  node.onConfigure = function (...given) {
    onConfigure?.apply(this, given);
    work(true);
  };
  work(false);
}

/** Set the height of a node to that of its content; on the canvas a saved height is only raised. */
export function fitHeight(node, saved = false) {
  if (LiteGraph.vueNodesMode) {
    requestAnimationFrame(() => requestAnimationFrame(() => removeEmptySpace(node))); // once Vue has drawn the change
    return;
  }
  const height = node.computeSize()[1];
  setHeight(node, saved ? Math.max(height, node.size[1]) : height);
}

/** Shorten a node drawn by Vue by the space below its widgets, which the widgets that Vue hides have on the canvas. */
function removeEmptySpace(node) {
  const root = document.querySelector(`[data-node-id="${node.id}"]`);
  const widgets = root?.querySelector(".lg-node-widgets");
  if (!widgets || !node.graph) return;
  const scale = root.getBoundingClientRect().width / root.offsetWidth;
  const end = widgets.nextElementSibling?.getBoundingClientRect().top ?? root.getBoundingClientRect().bottom;
  const empty = (end - widgets.getBoundingClientRect().bottom) / scale;
  if (empty > SLACK) setHeight(node, node.size[1] - empty + SLACK);
}

function setHeight(node, height) {
  if (Math.abs(height - node.size[1]) < 1) return;
  node.setSize([node.size[0], height]);
  node.setDirtyCanvas(true, true);
}
