// One message of the reader on the page: its text, its files, and a way to change it.

import { BranchSwitch } from "./answer_footer.js";
import { copyText, h, icon, iconButton } from "./dom.js";
import { plural } from "./format.js";

const PREVIEW_LEN = 4_000; // characters of a file that are shown
const FOLDED_LEN = 1_200; // characters from which a text is folded

/**
 * @typedef {object} UserActions
 * @property {(text: string) => boolean} resend with another text; returns whether it could
 * @property {(step: -1 | 1) => void} step to another alternative
 */
export class UserView {
  #turn;
  #actions;
  #branches;
  #tools;
  #bubble;

  /**
   * @param {import("./chat_tree.js").Turn} turn
   * @param {UserActions} actions
   */
  constructor(turn, actions) {
    this.#turn = turn;
    this.#actions = actions;
    this.#branches = new BranchSwitch(actions.step);
    this.#bubble = this.#makeBubble();
    const copy = iconButton("copy", "Copy the message", () => copyText(copy, turn.text));
    this.#tools = h(
      "div.turn-tools",
      {},
      this.#branches.element,
      copy,
      iconButton("edit", "Edit and send again", () => this.edit()),
    );
    this.element = h(
      "article.turn.user",
      { "aria-label": "You" },
      h("div.files", {}, ...(turn.attachments ?? []).map(fileView)),
      this.#bubble,
      h("footer", {}, this.#tools),
    );
  }

  update(branch) {
    this.#branches.show(branch.place, branch.length);
  }

  /** Puts a text box in place of the message. */
  edit() {
    const box = h("textarea", { value: this.#turn.text, "aria-label": "Edit your message" });
    const cancel = () => {
      form.replaceWith(this.#bubble);
      this.#tools.hidden = false;
    };
    const form = h(
      "form.edit",
      {
        onsubmit: (event) => {
          event.preventDefault();
          if (this.#actions.resend(box.value.trim())) cancel();
        },
        onkeydown: (event) => {
          if (event.key === "Escape") {
            event.stopPropagation();
            cancel();
          } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
            event.preventDefault();
            form.requestSubmit();
          }
        },
      },
      box,
      h(
        "div.edit-actions",
        {},
        h("button.quiet", { type: "button", onclick: cancel }, "Cancel"),
        h("button.primary", { type: "submit" }, "Send"),
      ),
    );
    box.rows = Math.min(12, this.#turn.text.split("\n").length + 1);
    this.#bubble.replaceWith(form);
    this.#tools.hidden = true;
    box.focus();
    box.setSelectionRange(box.value.length, box.value.length);
  }

  remove() {
    this.element.remove();
  }

  #makeBubble() {
    const { text } = this.#turn;
    const bubble = h("div.bubble", { hidden: !text }, h("p", {}, text));
    if (text.length <= FOLDED_LEN && text.split("\n").length <= 16) return bubble;
    bubble.classList.add("folded");
    const unfold = h("button.quiet", { type: "button", "aria-expanded": "false" }, "Show all");
    unfold.addEventListener("click", () => {
      const isFolded = bubble.classList.toggle("folded");
      unfold.textContent = isFolded ? "Show all" : "Show less";
      unfold.setAttribute("aria-expanded", String(!isFolded));
    });
    bubble.append(unfold);
    return bubble;
  }
}

function fileView({ name, text, tokens }) {
  const rest = text.length - PREVIEW_LEN;
  return h(
    "details.file",
    {},
    h(
      "summary",
      {},
      icon("file"),
      h("span.file-name", {}, name),
      tokens !== null && h("span.file-size", {}, plural(tokens, "token")),
    ),
    h("pre", { tabIndex: 0 }, rest > 0 ? `${text.slice(0, PREVIEW_LEN)}\n…` : text),
  );
}
