/** Rotation of nodes from workflows that are older than its widget: off, although new nodes rotate by default. */

/** Switch the rotation off when a workflow without a value for it fills the widgets of Configure Quantization. */
export function keepUnrotated(node) {
  if (node.comfyClass !== "LearnedRoundingConfigure") return;
  const place = node.widgets.findIndex(({ name }) => name === "convrot");
  const { onConfigure } = node;
  node.onConfigure = function (saved, ...others) {
    onConfigure?.call(this, saved, ...others);
    const values = saved?.widgets_values;
    if (Array.isArray(values) && values.length <= place) node.widgets[place].value = "off";
  };
}
