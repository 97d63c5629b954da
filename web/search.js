/**
 * Aliases in the node search.
 *
 * Frontends rank an alias below every other match, and older ones search titles and ids only. Here the beginning of an alias
 * finds a node, and a node whose alias is complete is the first one: of all if its title has the word too, else of those
 * whose titles do not have it.
 */

/** {node id: its aliases}; the server sends the same as `search_aliases` where ComfyUI supports it. */
const readAliases = async () => (await fetch(new URL("./search_aliases.json", import.meta.url))).json();

/** The title in the page's language, and in newer frontends the English one. */
const titlesOf = ({ display_name: title, search_aliases: aliases = [] }) => [title, ...aliases];

/** Whether a title or id has the words of a phrase; an id is split at its capitals. */
function isNamed({ name, display_name: title }, phrase) {
  const spaced = `${title} ${name.replace(/(?<=[a-z])(?=[A-Z])/g, " ")}`.toLowerCase();
  return ` ${spaced.replace(/[^\p{L}\p{N}]+/gu, " ")} `.includes(` ${phrase} `);
}

/**
 * Order of the node definitions `found` for `query`, with those of `aliased` that an alias finds.
 *
 * @param {{ name: string, display_name: string }[]} found what the frontend found, best first.
 * @param {[{ name: string, display_name: string }, string[]][]} aliased node definitions and their aliases.
 */
export function rankByAlias(query, found, aliased) {
  const word = query.trim().toLowerCase();
  if (!word) return found;
  const begun = aliased.filter(([, aliases]) => aliases.some((alias) => alias.startsWith(word))).map(([node]) => node);
  const exact = aliased.find(([, aliases]) => aliases.includes(word))?.[0];
  const ranked = [...found, ...begun.filter((node) => !found.includes(node))];
  if (!exact) return ranked;
  const others = ranked.filter((node) => node !== exact);
  const place = isNamed(exact, word) ? 0 : others.findLastIndex((node) => isNamed(node, word)) + 1;
  return [...others.slice(0, place), exact, ...others.slice(place)];
}

/** Let the search of all dialogs and of the sidebar find nodes by their aliases; a frontend with another search keeps its own. */
export async function addAliasesToSearch(extensionManager) {
  const nodes = extensionManager?._p?._s?.get("nodeDef"); // Pinia's store of node definitions
  const search = nodes?.nodeSearchService && Object.getPrototypeOf(nodes.nodeSearchService);
  if (typeof search?.searchNode !== "function") return;
  const table = Object.entries(await readAliases());
  const { searchNode } = search;
  search.searchNode = function (query, filters = [], options = {}, ...others) {
    const found = searchNode.call(this, query, filters, options, ...others);
    if (typeof query !== "string") return found;
    const aliased = table
      .map(([name, aliases]) => [nodes.nodeDefsByName[name], aliases])
      .filter(([node]) => node && filters.every(({ filterDef, value }) => filterDef.matches(node, value)))
      .map(([node, aliases]) => [node, [...aliases, ...titlesOf(node)].map((alias) => alias.toLowerCase())]);
    return rankByAlias(query, found, aliased).slice(0, options?.limit);
  };
}
