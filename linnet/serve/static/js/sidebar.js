// The list of chats.

import { byId, h, iconButton } from "./dom.js";

const DAY_MS = 86_400_000;

export class Sidebar {
  #list = byId("chats");
  #actions;

  /**
   * @param {object} actions
   * @param {(id: string) => void} actions.open
   * @param {(id: string) => void} actions.remove
   */
  constructor(actions) {
    this.#actions = actions;
  }

  /**
   * @param {import("./chat_store.js").Title[]} titles newest first
   * @param {string} openId of the chat that is shown
   * @param {Set<string>} runningIds of the chats that are being answered
   */
  show(titles, openId, runningIds) {
    const groups = Map.groupBy(titles, ({ updated }) => ageOf(updated));
    this.#list.replaceChildren(
      ...[...groups].map(([age, members]) =>
        h(
          "section",
          { "aria-label": age },
          h("h2", {}, age),
          h("ul", {}, ...members.map((title) => this.#item(title, openId, runningIds))),
        ),
      ),
    );
  }

  #item({ id, title }, openId, runningIds) {
    const open = h(
      "button.chat-title",
      { type: "button", title, onclick: () => this.#actions.open(id) },
      title,
    );
    if (id === openId) open.setAttribute("aria-current", "page");
    open.classList.toggle("running", runningIds.has(id));
    const remove = iconButton("trash", `Delete the chat ${title}`, () => this.#actions.remove(id));
    return h("li", {}, open, remove);
  }
}

function ageOf(time) {
  const midnight = new Date().setHours(0, 0, 0, 0);
  if (time >= midnight) return "Today";
  if (time >= midnight - DAY_MS) return "Yesterday";
  return time >= midnight - 7 * DAY_MS ? "This week" : "Earlier";
}
