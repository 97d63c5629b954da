/** Lists of files in the widgets of loaders: read again after a node has saved a file. */

import { app } from "../../scripts/app.js";

const SAVERS = ["LearnedRoundingSave", "LearnedRoundingSaveCalibration"];

/** Request the lists of all nodes again, as the key R does; newer frontends do it without a message. */
export async function refreshLoaderLists() {
  await (app.reloadNodeDefs ?? app.refreshComboInNodes).call(app);
}

/** Call a function after each run of a node that saves files. */
export function afterSaving(node, work) {
  if (!SAVERS.includes(node.comfyClass)) return;
  const { onExecuted } = node;
  node.onExecuted = function (...args) {
    onExecuted?.apply(this, args);
    work();
  };
}
