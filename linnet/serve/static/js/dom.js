// Builds elements without markup strings, so that nothing a model or a file says can become one.

const SVG = "http://www.w3.org/2000/svg";

/**
 * Makes an element: `h("button.quiet", { type: "button", onclick: stop }, "Stop")`.
 *
 * @param {string} tag its name, then classes, joined by dots
 * @param {Record<string, unknown>} [properties] of the element; `aria-*`, `data-*` and `role` are
 *   set as attributes, and one that is `undefined` is left out
 * @param {...(Node | string | null | undefined | false)} children
 * @returns {HTMLElement}
 */
export function h(tag, properties = {}, ...children) {
  const [name, ...classes] = tag.split(".");
  const element = document.createElement(name);
  element.classList.add(...classes);
  for (const [key, value] of Object.entries(properties)) {
    if (value === undefined) continue;
    if (key.includes("-") || key === "role") element.setAttribute(key, String(value));
    else element[key] = value;
  }
  element.append(...children.filter((child) => child || child === ""));
  return element;
}

/**
 * @param {string} name of a symbol in index.html, without its `i-`
 * @returns {SVGElement}
 */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

/**
 * @param {string} name of the icon
 * @param {string} label what the button does, for the tooltip and for screen readers
 * @param {(event: Event) => void} onclick
 */
export function iconButton(name, label, onclick) {
  return h(
    "button.icon-button",
    { type: "button", title: label, "aria-label": label, onclick },
    icon(name),
  );
}

/** Shows `name` in a button that has an icon already. */
export function setIcon(button, name) {
  button.querySelector("use").setAttribute("href", `#i-${name}`);
}

/** @returns {HTMLElement} the element with this id, which index.html must have */
export function byId(id) {
  const element = document.getElementById(id);
  if (!element) throw new Error(`index.html has no element with the id ${id}`);
  return element;
}

/** Copies text, and shows on the button that it did. */
export async function copyText(button, text) {
  await writeClipboard(text);
  setIcon(button, "check");
  button.classList.add("done");
  setTimeout(() => {
    setIcon(button, "copy");
    button.classList.remove("done");
  }, 1200);
}

async function writeClipboard(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // A page that came over plain HTTP from another machine has no clipboard object.
    copySelected(text);
  }
}

function copySelected(text) {
  const area = h("textarea.unseen", { value: text });
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}
