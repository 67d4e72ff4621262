// A card for one tool call: what the model asks for, and a box for what the tool answered.

import { CodeBlock } from "./code_block.js";
import { h, icon } from "./dom.js";
import { GrowingText } from "./growing_text.js";
import { prettyJson } from "./tools.js";

export class ToolCallView {
  #name = h("strong");
  #status = h("span.call-status");
  #arguments = new CodeBlock("json");
  #shownArguments = null;
  #result = h("pre.call-result", { hidden: true, tabIndex: 0 });
  #resultText = new GrowingText(this.#result);
  #box = h("textarea", { rows: 2, placeholder: "Paste what the tool returned" });
  #form;

  /**
   * @param {() => void} onInput is called when the text of the box changes
   * @param {() => void} onSend is called when the reader wants to go on
   */
  constructor(onInput, onSend) {
    this.#box.addEventListener("input", onInput);
    this.#box.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) onSend();
    });
    this.#form = h("label.call-box", { hidden: true }, h("span", {}, "Result"), this.#box);
    this.element = h(
      "section.call",
      {},
      h("header", {}, icon("tool"), this.#name, this.#status),
      this.#arguments.element,
      this.#result,
      this.#form,
    );
  }

  /**
   * @param {import("./chat_tree.js").ToolCall} call
   * @param {{ isComplete: boolean, result: string | null, isEditing: boolean }} state whether all
   *   arguments are there; what the tool answered; whether the reader changes that
   */
  show(call, { isComplete, result, isEditing }) {
    this.#name.textContent = call.name || "…";
    this.element.setAttribute("aria-label", `Call of ${call.name}`);
    const text = isComplete ? prettyJson(call.arguments) : call.arguments;
    if (text !== this.#shownArguments) this.#arguments.show(text, isComplete);
    this.#shownArguments = text;
    const isOpen = isComplete && (result === null || isEditing);
    this.#status.textContent = statusOf(isComplete, result);
    this.#form.hidden = !isOpen;
    this.#result.hidden = result === null || isEditing;
    this.#resultText.show(result ?? "");
    if (isEditing && !this.#box.value) this.#box.value = result ?? "";
  }

  get value() {
    return this.#box.value;
  }
}

function statusOf(isComplete, result) {
  if (!isComplete) return "writing its arguments";
  return result === null ? "waits for a result" : "answered";
}
