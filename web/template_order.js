/** The pack's templates in the order of their numbers: the server lists them in the order of the file system. */

const FOLDER = decodeURIComponent(new URL(".", import.meta.url).pathname.split("/").at(-2)); // the pack's name in ComfyUI

export function orderTemplates(api) {
  const { getWorkflowTemplates } = api;
  if (typeof getWorkflowTemplates !== "function") return;
  api.getWorkflowTemplates = async function (...args) {
    const templates = await getWorkflowTemplates.apply(this, args);
    templates?.[FOLDER]?.sort((one, other) => one.localeCompare(other, "en", { numeric: true }));
    return templates;
  };
}
