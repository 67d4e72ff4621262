// Short news at the edge of the page, read out by screen readers.

import { byId, h } from "./dom.js";

const SHOWN_MS = 6_000;

/**
 * @param {string} message
 * @param {{ label: string, run: () => void }} [action] offered beside it
 */
export function toast(message, action) {
  const box = h("div.toast", {}, h("span", {}, message));
  const close = () => box.remove();
  if (action) {
    const onclick = () => {
      close();
      action.run();
    };
    box.append(h("button.quiet", { type: "button", onclick }, action.label));
  }
  byId("toasts").append(box);
  setTimeout(close, SHOWN_MS);
}

/** Tells screen readers, and nobody else. */
export function announce(message) {
  byId("announcer").textContent = message;
}
