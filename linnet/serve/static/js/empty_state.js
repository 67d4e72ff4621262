// What a new chat shows: examples to begin with.

import { h, icon } from "./dom.js";
import { EXAMPLES } from "./examples.js";

/**
 * @param {HTMLElement} list
 * @param {(example: import("./examples.js").Example) => void} onPick
 */
export function fillEmptyState(list, onPick) {
  list.replaceChildren(
    ...EXAMPLES.map((example) =>
      h(
        "button.example",
        { type: "button", onclick: () => onPick(example) },
        icon(example.icon),
        h("strong", {}, example.title),
        h("span", {}, example.about),
      ),
    ),
  );
}
